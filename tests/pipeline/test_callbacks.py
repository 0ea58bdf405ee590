"""Callbacks see what diffusers' see, after every row, and what they change does what it does there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from torch import Tensor

from fastldm.errors import ArgumentError
from tests import oracle
from tests.pipeline import pairs
from tests.pipeline.pairs import Pair, generators
from tests.tasks.conftest import CLASSES, noise_picture

pytestmark = pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning")  # diffusers', one image

TOLERANCE = 1e-4
CAT, DOG = "the red cat", "a dog in the snow, oil on canvas"
MODELS = {"text_to_image": (4, diffusers.StableDiffusionPipeline), **CLASSES}
TASKS = list(MODELS)
SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "lcm": (diffusers.LCMScheduler, {}),
}
FEW = ["ddim", "heun", "dpmpp_2m"]  # a row on its own, two rows a step, a memory of earlier rows
SOME = [
    *(("text_to_image", sampler) for sampler in (*FEW, "euler_a")),
    ("image_to_image", "dpmpp_2m"),
    ("inpaint", "heun"),
    ("inpaint_9", "euler_a"),
    ("instruct", "heun"),
]
TINY = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PICTURE, OTHER = noise_picture(0).crop((0, 0, 24, 16)), noise_picture(1).crop((0, 0, 24, 16))
MASK = torch.zeros(1, 1, 16, 24)
MASK[..., 4:12, 6:20] = 1
CALLS: dict[str, dict[str, Any]] = {
    "text_to_image": {"height": 16, "width": 24},
    "image_to_image": {"image": PICTURE, "strength": 0.6, "num_inference_steps": 5},
    "inpaint": {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24},
    "inpaint_9": {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24},
    "instruct": {"image": PICTURE},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """model(task): diffusers' pipeline of that task and ours, from one folder, made once."""
    return cache(lambda task: pairs.of_task(*MODELS[task], TINY, tmp_path_factory.mktemp(task)))


@dataclass
class Seen:
    """Records what a callback sees, then lets `edit(pipe, row, tensors)` change it."""

    edit: Callable[[Any, int, dict[str, Any]], dict[str, Any] | None] = lambda pipe, row, tensors: None
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    tensors: list[dict[str, Tensor | None]] = field(default_factory=list)

    def __call__(self, pipe: Any, row: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        state = (pipe.num_timesteps, float(pipe.guidance_scale), pipe.do_classifier_free_guidance)
        self.rows.append((row, timestep.item(), timestep.dtype, timestep.shape, *state))
        self.tensors.append({name: None if t is None else t.clone() for name, t in tensors.items()})
        answer = self.edit(pipe, row, tensors)
        return tensors if answer is None else answer


def of_diffusers(pair: Pair, sampler: str) -> Any:
    kind, extra = SAMPLERS[sampler]
    parts = {**pair.ref.components, "scheduler": kind.from_config(pair.ref.scheduler.config, **extra)}
    pipe = type(pair.ref)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, callback: Callable[..., Any] | None, task: str, **call: Any) -> Tensor:
    """The final ones. A new generator is seeded for each call."""
    options = {"prompt": CAT, "num_inference_steps": 4, **CALLS[task], **call}
    options["generator"] = generators(options.pop("seed", 3))
    if callback is not None:
        options["callback_on_step_end"] = callback
    found: Tensor = pipe(**options, output_type="latent").images
    return found


def both(
    pair: Pair, task: str, sampler: str, edit: Callable[..., Any], names: Sequence[str] = ("latents",), **call: Any
) -> tuple[Seen, Seen]:
    """Ours and diffusers', the final latents appended to what was seen; asserts that they are equal."""
    mine, theirs = Seen(edit), Seen(edit)
    reference = of_diffusers(pair, sampler)
    options = {"callback_on_step_end_tensor_inputs": list(names), **call}
    a = latents(pair.fast, mine, task, scheduler=reference.scheduler, **options)
    b = latents(reference, theirs, task, **options)
    assert oracle.relative_error(a, b) <= TOLERANCE
    return mine, theirs


def assert_same(mine: Seen, theirs: Seen) -> None:
    assert mine.rows == theirs.rows
    for row, (a, b) in enumerate(zip(mine.tensors, theirs.tensors, strict=True)):
        assert list(a) == list(b)
        for name, tensor in a.items():
            assert tensor is not None, name
            assert tensor.shape == b[name].shape, name
            assert tensor.dtype == b[name].dtype, name
            assert torch.isfinite(b[name]).all()
            assert float((tensor - b[name]).norm()) <= TOLERANCE * float(b[name].norm()), (row, name)


# --------------------------------------------------------------------------------------------------------- what it sees


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_row_is_seen(model: Callable[[str], Pair], task: str, sampler: str) -> None:
    """Its index, its timestep and its latents, and the state of the call: two rows a step for Heun."""
    mine, theirs = both(model(task), task, sampler, lambda *_: None)
    assert len(mine.rows) == mine.rows[0][4] > 2
    assert_same(mine, theirs)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_is_seen(model: Callable[[str], Pair], task: str, guidance_scale: float) -> None:
    """Of two prompts with two images each, in diffusers' order of branches. Unguided there are no negatives to see."""
    names = [n for n in model(task).ref._callback_tensor_inputs if guidance_scale > 1 or n != "negative_prompt_embeds"]
    if task == "inpaint":
        names.remove("masked_image_latents")  # nothing reads them with 4 channels
    call = {"prompt": [CAT, DOG], "negative_prompt": ["", CAT], "num_images_per_prompt": 2}
    call |= {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    mine, theirs = both(model(task), task, "ddim", lambda *_: None, names, **call)
    assert_same(mine, theirs)


def test_no_guidance_no_negative_embeddings(model: Callable[[str], Pair]) -> None:
    names = ["negative_prompt_embeds"]
    mine, theirs = both(model("text_to_image"), "text_to_image", "ddim", lambda *_: None, names, guidance_scale=1.0)
    assert mine.tensors == theirs.tensors == [{"negative_prompt_embeds": None}] * 4


def test_it_gets_copies(model: Callable[[str], Pair]) -> None:
    """What a callback keeps, the rows that follow do not change."""
    kept: list[Tensor] = []
    seen = Seen(lambda pipe, row, tensors: kept.append(tensors["latents"]))
    latents(model("text_to_image").fast, seen, "text_to_image")
    assert all(torch.equal(a, b["latents"]) for a, b in zip(kept, seen.tensors, strict=True))
    assert not torch.equal(kept[0], kept[-1])


def test_its_pipeline_is_the_pipeline(model: Callable[[str], Pair]) -> None:
    fast = model("text_to_image").fast
    views: list[Any] = []
    call = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "clip_skip": 1}
    latents(fast, lambda pipe, row, timestep, tensors: views.append(pipe) or tensors, "text_to_image", **call)
    (view,) = set(views)
    assert (view.guidance_scale, view.guidance_rescale, view.clip_skip, view.interrupt) == (3.0, 0.5, 1, False)
    assert (view.device, view.dtype, view.vae_scale_factor) == (fast.device, fast.dtype, fast.vae_scale_factor)
    assert view.scheduler is fast.scheduler
    assert latents(view, None, "text_to_image").equal(latents(fast, None, "text_to_image"))


# -------------------------------------------------------------------------------------------------- what it may change


def moved(pipe: Any, row: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    return {"latents": 0.8 * tensors["latents"] + 0.1} if row == 1 else None


def moved_in_place(pipe: Any, row: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    if row == 1:
        tensors["latents"].mul_(0.8).add_(0.1)
    return None


def moved_in_place_and_kept_back(pipe: Any, row: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    tensors["latents"].mul_(0.9)
    return {}


def guided_otherwise(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
    if row == 1:
        pipe._guidance_scale = 2.0


def guided_less_and_less(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
    pipe._guidance_scale = 9.0 - row


@pytest.mark.parametrize(
    "edit", [moved, moved_in_place, moved_in_place_and_kept_back, guided_otherwise, guided_less_and_less]
)
@pytest.mark.parametrize(("task", "sampler"), SOME)
def test_latents_and_guidance(
    model: Callable[[str], Pair], task: str, sampler: str, edit: Callable[..., dict[str, Any] | None]
) -> None:
    mine, theirs = both(model(task), task, sampler, edit)
    assert_same(mine, theirs)


def test_rescale(model: Callable[[str], Pair]) -> None:
    def rescaled(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        pipe._guidance_rescale = 0.7 * (row > 0)

    mine, theirs = both(model("text_to_image"), "text_to_image", "euler", rescaled)
    assert_same(mine, theirs)


def test_image_guidance(model: Callable[[str], Pair]) -> None:
    def guided(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        pipe._image_guidance_scale = 2.5

    mine, theirs = both(model("instruct"), "instruct", "euler", guided)
    assert_same(mine, theirs)


@pytest.mark.parametrize("tokens", [5, 100])
@pytest.mark.parametrize(("task", "sampler"), SOME)
def test_embeddings(model: Callable[[str], Pair], task: str, sampler: str, tokens: int) -> None:
    """Of any length, in place of those of all branches."""

    def said_otherwise(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        if row == 1:
            shape = (len(tensors["prompt_embeds"]), tokens, 24)
            tensors["prompt_embeds"] = torch.randn(shape, generator=generators(0))

    mine, theirs = both(model(task), task, sampler, said_otherwise, ["prompt_embeds", "latents"], prompt=[CAT, DOG])
    assert_same(mine, theirs)


def test_embeddings_in_place(model: Callable[[str], Pair]) -> None:
    def louder(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        tensors["prompt_embeds"][1:] *= 1.5

    mine, theirs = both(model("text_to_image"), "text_to_image", "ddim", louder, ["prompt_embeds", "latents"])
    assert_same(mine, theirs)
    assert torch.equal(mine.tensors[2]["prompt_embeds"][:1], mine.tensors[0]["prompt_embeds"][:1])


def test_negative_embeddings(model: Callable[[str], Pair]) -> None:
    """diffusers hands them over, and never reads them again; here they are the first half of `prompt_embeds`."""
    new = torch.randn(1, 77, 24)

    def negative(pipe: Any, row: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return {"negative_prompt_embeds": new} if row == 1 else None

    def whole(pipe: Any, row: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return {"prompt_embeds": torch.cat((new, tensors["prompt_embeds"][1:]))} if row == 1 else None

    fast, ends = model("text_to_image").fast, []
    for edit, name in ((negative, "negative_prompt_embeds"), (whole, "prompt_embeds")):
        ends.append(latents(fast, Seen(edit), "text_to_image", callback_on_step_end_tensor_inputs=[name]))
    assert torch.equal(*ends)
    assert oracle.relative_error(ends[0], latents(fast, None, "text_to_image")) > 0.001


@pytest.mark.parametrize("task", ["inpaint", "inpaint_9"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_masks(model: Callable[[str], Pair], task: str, sampler: str) -> None:
    def other_way_round(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        if row == 1:
            tensors["mask"] = 1 - tensors["mask"]

    mine, theirs = both(model(task), task, sampler, other_way_round, ["mask", "latents"], num_images_per_prompt=2)
    assert_same(mine, theirs)


def test_masked_image_latents(model: Callable[[str], Pair]) -> None:
    def blank(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        tensors["masked_image_latents"].zero_()

    names = ["masked_image_latents", "latents"]
    mine, theirs = both(model("inpaint_9"), "inpaint_9", "ddim", blank, names)
    assert_same(mine, theirs)


def test_image_latents(model: Callable[[str], Pair]) -> None:
    def brighter(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        tensors["image_latents"] = 2 * tensors["image_latents"]

    mine, theirs = both(model("instruct"), "instruct", "ddim", brighter, ["image_latents", "latents"])
    assert_same(mine, theirs)


# ------------------------------------------------------------------------------------------------- cutting off guidance


HALVES = ("prompt_embeds", "mask", "masked_image_latents", "image_latents")


def cut_off(row: int) -> Callable[..., None]:
    """As diffusers needs it: of everything that there is for each branch, the conditional one's share is kept."""

    def edit(pipe: Any, now: int, tensors: dict[str, Any]) -> None:
        if now == row % pipe.num_timesteps:
            pipe._guidance_scale = 0.0
            for name in set(HALVES) & set(tensors):
                parts = tensors[name].chunk(3 if "image_latents" in tensors else 2)
                tensors[name] = parts[0 if "image_latents" in tensors else -1]

    return edit


def branch_by_branch(task: str) -> list[str]:
    """What the callback must be given for that; with 4 channels nothing reads `masked_image_latents`."""
    more = {"inpaint": ["mask"], "inpaint_9": ["mask", "masked_image_latents"], "instruct": ["image_latents"]}
    return ["latents", "prompt_embeds", *more.get(task, [])]


@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize(("task", "sampler"), [*SOME, ("text_to_image", "dpmpp_2m_sde")])
def test_cut_off(model: Callable[[str], Pair], task: str, sampler: str, row: int) -> None:
    """After the first row (for Heun in the middle of a step), after the second, after the last."""
    call = {"prompt": [CAT, DOG], "num_images_per_prompt": 2}
    mine, theirs = both(model(task), task, sampler, cut_off(row), branch_by_branch(task), **call)
    assert_same(mine, theirs)


def multiple(ratio: float) -> MultiPipelineCallbacks:
    return MultiPipelineCallbacks([Idle(), SDCFGCutoffCallback(cutoff_step_ratio=ratio)])


class Idle(PipelineCallback):
    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        return callback_kwargs


OFFICIAL: dict[str, Callable[[], Any]] = {
    "at 40 %": lambda: SDCFGCutoffCallback(cutoff_step_ratio=0.4),
    "at the first row": lambda: SDCFGCutoffCallback(cutoff_step_ratio=0.0),
    "at row 2": lambda: SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2),
    "never": lambda: SDCFGCutoffCallback(cutoff_step_ratio=1.0),
    "among others": lambda: multiple(0.4),
}


@pytest.mark.parametrize("make", OFFICIAL.values(), ids=OFFICIAL.keys())
@pytest.mark.parametrize(("task", "sampler"), [("text_to_image", "heun"), ("image_to_image", "dpmpp_2m")])
def test_the_official_cut_off(
    model: Callable[[str], Pair], task: str, sampler: str, make: Callable[[], PipelineCallback]
) -> None:
    pair = model(task)
    reference = of_diffusers(pair, sampler)
    mine = latents(pair.fast, make(), task, scheduler=reference.scheduler)
    theirs = latents(reference, make(), task)
    assert oracle.relative_error(mine, theirs) <= TOLERANCE


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("task", "sampler"), SOME[1:-1])
def test_the_official_cut_off_where_diffusers_fails_with_it(
    model: Callable[[str], Pair], task: str, sampler: str, images: int
) -> None:
    """It keeps one row of the embeddings, of however many, and both halves of the mask: ours knows what was meant."""
    pair = model(task)
    reference = of_diffusers(pair, sampler)
    official = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    mine = latents(pair.fast, official, task, scheduler=reference.scheduler, num_images_per_prompt=images)
    call = {"num_images_per_prompt": images, "callback_on_step_end_tensor_inputs": branch_by_branch(task)}
    assert oracle.relative_error(mine, latents(reference, Seen(cut_off(1)), task, **call)) <= TOLERANCE


def test_one_row_of_embeddings_is_too_few_for_two_prompts(model: Callable[[str], Pair]) -> None:
    official = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    with pytest.raises(ArgumentError, match="prompt_embeds") as caught:
        latents(model("text_to_image").fast, official, "text_to_image", prompt=[CAT, DOG])
    assert caught.value.field == "callback_on_step_end"


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_a_guidance_of_1_or_less_is_a_cut_off(model: Callable[[str], Pair], task: str, scale: float) -> None:
    """In diffusers the next row fails over embeddings of both branches."""

    def low(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        if row == 1:
            pipe._guidance_scale = scale
            assert not pipe.do_classifier_free_guidance

    fast, call = model(task).fast, {"prompt": [CAT, DOG]}
    end = latents(fast, Seen(low), task, **call)
    call["callback_on_step_end_tensor_inputs"] = branch_by_branch(task)
    assert torch.equal(end, latents(fast, Seen(cut_off(1)), task, **call))


@pytest.mark.parametrize(("task", "sampler"), SOME[:5])
def test_guidance_from_a_row_on(model: Callable[[str], Pair], task: str, sampler: str) -> None:
    """With embeddings for the branch that begins, as diffusers needs them, too."""

    def begun(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        if row == 1:
            pipe._guidance_scale = 5.0
            negative = torch.randn(1, 77, 24, generator=generators(0))
            tensors["prompt_embeds"] = torch.cat((negative, tensors["prompt_embeds"]))

    names = ["prompt_embeds", "latents"]
    mine, theirs = both(model(task), task, sampler, begun, names, guidance_scale=1.0)
    assert_same(mine, theirs)


def test_guidance_on_and_off_and_on(model: Callable[[str], Pair]) -> None:
    kept: list[Tensor] = []

    def flickering(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        kept.append(tensors["prompt_embeds"])
        pipe._guidance_scale = 4.0 * (row % 2)
        tensors["prompt_embeds"] = kept[0] if row % 2 else kept[0].chunk(2)[-1]

    mine, theirs = both(
        model("text_to_image"), "text_to_image", "dpmpp_2m", flickering, ["prompt_embeds", "latents"], prompt=[CAT, DOG]
    )
    assert_same(mine, theirs)


# ----------------------------------------------------------------------------------------------------------- stopping


def stopped(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
    if row == 1:
        pipe._interrupt = True


@pytest.mark.parametrize(("task", "sampler"), SOME[:-1])
def test_interrupt(model: Callable[[str], Pair], task: str, sampler: str) -> None:
    mine, theirs = both(model(task), task, sampler, stopped)
    assert len(mine.rows) == 2
    assert_same(mine, theirs)


def test_interrupt_where_diffusers_goes_on(model: Callable[[str], Pair]) -> None:
    seen = Seen(stopped)
    end = latents(model("instruct").fast, seen, "instruct")
    assert len(seen.rows) == 2
    assert torch.equal(end, seen.tensors[-1]["latents"])


def test_what_is_there_when_it_is_interrupted_is_painted(model: Callable[[str], Pair]) -> None:
    pair, images = model("text_to_image"), []
    for pipe in (pair.fast, pair.ref):
        call = {"prompt": CAT, "num_inference_steps": 5, "height": 16, "width": 24, "output_type": "pt"}
        images.append(pipe(generator=generators(3), callback_on_step_end=Seen(stopped), **call).images)
    assert oracle.relative_error(*images) <= TOLERANCE


# -------------------------------------------------------------------------------------------------------------- errors


def answering(answer: Any) -> Callable[..., Any]:
    return lambda pipe, row, timestep, tensors: answer


def setting(name: str, value: Any) -> Callable[..., Any]:
    def callback(pipe: Any, row: int, timestep: Any, tensors: Any) -> Any:
        setattr(pipe, name, value)
        return tensors

    return callback


WRONG = {
    "nothing": answering(None),
    "a tensor": answering(torch.zeros(1)),
    "a name that is none": answering({"latent": torch.zeros(1, 4, 8, 12)}),
    "None for latents": answering({"latents": None}),
    "an array": answering({"latents": torch.zeros(1, 4, 8, 12).numpy()}),
    "integers": answering({"latents": torch.zeros(1, 4, 8, 12, dtype=torch.int64)}),
    "latents of another size": answering({"latents": torch.zeros(1, 4, 8, 11)}),
    "latents for two": answering({"latents": torch.zeros(2, 4, 8, 12)}),
    "embeddings of another width": answering({"prompt_embeds": torch.zeros(2, 77, 23)}),
    "embeddings without tokens": answering({"prompt_embeds": torch.zeros(2, 0, 24)}),
    "embeddings of one token alone": answering({"prompt_embeds": torch.zeros(2, 24)}),
    "too many tokens": answering({"prompt_embeds": torch.zeros(2, 1025, 24)}),
    "embeddings for three": answering({"prompt_embeds": torch.zeros(3, 77, 24)}),
    "embeddings of one branch": answering({"prompt_embeds": torch.zeros(1, 77, 24)}),
    "negative embeddings of another length": answering({"negative_prompt_embeds": torch.zeros(1, 5, 24)}),
    "a guidance that is no number": setting("_guidance_scale", "7"),
    "a guidance without end": setting("_guidance_scale", float("inf")),
    "a negative guidance": setting("_guidance_scale", -1.0),
    "a rescale beyond 1": setting("_guidance_rescale", 2.0),
}


@pytest.mark.parametrize("callback", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_answer_is_an_error_of_the_callback(model: Callable[[str], Pair], callback: Callable[..., Any]) -> None:
    fast = model("text_to_image").fast
    before = latents(fast, None, "text_to_image")
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with pytest.raises(ArgumentError, match=r"^callback_on_step_end") as caught:
        latents(fast, callback, "text_to_image", callback_on_step_end_tensor_inputs=names)
    assert caught.value.field == "callback_on_step_end"
    assert torch.equal(latents(fast, None, "text_to_image"), before)


def test_guidance_without_embeddings_for_it_is_an_error(model: Callable[[str], Pair]) -> None:
    with pytest.raises(ArgumentError, match="prompt_embeds") as caught:
        latents(model("text_to_image").fast, setting("_guidance_scale", 5.0), "text_to_image", guidance_scale=1.0)
    assert caught.value.field == "callback_on_step_end"


def test_its_own_exception_comes_through(model: Callable[[str], Pair]) -> None:
    fast, error = model("text_to_image").fast, KeyError("mine")

    def raising(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        pipe._guidance_scale = 3.0
        if row == 2:
            raise error

    before = latents(fast, None, "text_to_image")
    seen = Seen(raising)
    with pytest.raises(KeyError) as caught:
        latents(fast, seen, "text_to_image")
    assert caught.value is error
    assert len(seen.rows) == 3
    assert torch.equal(latents(fast, None, "text_to_image"), before)


# ------------------------------------------------------------------------------------------------------------- threads


def test_views_of_concurrent_calls_do_not_see_each_other(model: Callable[[str], Pair]) -> None:
    """Three calls in step, row by row: each changes its own guidance, one ends early, a third has no part in it."""
    fast = model("text_to_image").fast
    meet = threading.Barrier(3, timeout=60)

    def cutting(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        assert pipe.guidance_scale == (7.5 if row == 0 else 0.0)
        pipe._guidance_scale = 0.0

    def rising(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        assert pipe.guidance_scale == 7.5 + row
        pipe._guidance_scale += 1.0

    def plain(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
        assert (pipe.guidance_scale, pipe.interrupt) == (7.5, False)

    def in_step(edit: Callable[..., None]) -> Callable[..., None]:
        def waiting(pipe: Any, row: int, tensors: dict[str, Any]) -> None:
            meet.wait()
            edit(pipe, row, tensors)
            meet.wait()

        return waiting

    alone = [latents(fast, Seen(edit), "text_to_image") for edit in (cutting, rising, plain)]
    found: list[Tensor | None] = [None] * 3

    def call(place: int, edit: Callable[..., None]) -> None:
        found[place] = latents(fast, Seen(in_step(edit)), "text_to_image")

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate((cutting, rising, plain))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine is not None and torch.equal(mine, own) for mine, own in zip(found, alone, strict=True))
