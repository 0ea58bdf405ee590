"""What goes wrong while a call runs: the caller's function, signals, forks; and what no call may touch."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.model.unet import UNet
from fastldm.runtime.engine import Engine, Job
from tests.pipeline import smallest
from tests.pipeline.pairs import generators

CALL: dict[str, Any] = {"prompt": "the red cat", "seed": 1, "num_inference_steps": 3, "output_type": "pt"}
NEXT: dict[str, Any] = {
    "prompt": "a",
    "seed": 2,
    "num_inference_steps": 1,
    "guidance_scale": 1,
    "output_type": "latent",
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("smallest")
    smallest.make(at)
    return at


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known function in place of the network, so that thousands of rows take seconds: the loop is what is tested."""
    monkeypatch.setattr(UNet, "forward", lambda self, x, modulation, context: 0.3 * x[:, :4] + 0.1)


# ----------------------------------------------------------------------------------------- R04: calls from the callback


@pytest.mark.parametrize("through", ["view", "pipeline"])
@pytest.mark.parametrize("times", [1, 20])
def test_r04_a_callback_calls_the_pipeline(pipe: fastldm.Pipeline, through: str, times: int) -> None:
    outer, inner = pipe(**CALL).images, pipe(**NEXT).images
    found: list[Tensor] = []

    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        again = view if through == "view" else pipe
        found.extend(again(**NEXT).images for _ in range(times if row == 1 else 0))
        return tensors

    assert torch.equal(pipe(**CALL, callback_on_step_end=after_row).images, outer)
    assert len(found) == times
    assert all(torch.equal(image, inner) for image in found)


def test_r04_calls_within_calls(pipe: fastldm.Pipeline) -> None:
    """Ten deep, each with guidance of its own, which its callback changes."""
    call = CALL | {"num_inference_steps": 2}

    def halved(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        view._guidance_scale /= 2
        return tensors

    def painted(depth: int) -> list[Tensor]:
        found: list[Tensor] = []

        def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
            if row == 0 and depth:
                found.extend(painted(depth - 1))
            return halved(view, row, timestep, tensors)

        return [pipe(**call, guidance_scale=9.0 + depth, callback_on_step_end=after_row).images, *found]

    alone = [pipe(**call, guidance_scale=9.0 + d, callback_on_step_end=halved).images for d in range(9, -1, -1)]
    together = painted(9)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


# ------------------------------------------------------------------------------------- R05: the callback raises or lies


class Stop(Exception):
    pass


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_karras", "euler_a"])
def test_r05_a_callback_raises_at_each_of_50_steps(pipe: fastldm.Pipeline, sampler: str) -> None:
    call = CALL | {"num_inference_steps": 50, "scheduler": sampler}
    image = pipe(**call).images
    after = pipe(**NEXT).images
    for last in range(50):
        reason = Stop(last)

        def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
            if row == last:  # noqa: B023
                raise reason  # noqa: B023
            return tensors

        with pytest.raises(Stop) as caught:
            pipe(**call, callback_on_step_end=after_row)
        assert caught.value is reason
        assert torch.equal(pipe(**NEXT).images, after)
    assert torch.equal(pipe(**call).images, image)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError])
def test_r05_whatever_a_callback_raises_comes_through(pipe: fastldm.Pipeline, kind: type[BaseException]) -> None:
    reason = kind("mine")
    after = pipe(**NEXT).images

    def after_row(*_: Any) -> Tensors:
        raise reason

    with pytest.raises(kind) as caught:
        pipe(**CALL, callback_on_step_end=after_row)
    assert caught.value is reason
    assert torch.equal(pipe(**NEXT).images, after)


LATENTS = (2, 4, 4, 4)
WRONG: dict[str, object] = {
    "None": None,
    "a list": [],
    "a tensor": torch.zeros(LATENTS),
    "a tuple": ({},),
    "a name": "latents",
    "an unknown name": {"latent": torch.zeros(LATENTS)},
    "a name that is no string": {1: torch.zeros(LATENTS)},
    "a name of another task": {"image_latents": torch.zeros(LATENTS)},
    "latents: None": {"latents": None},
    "latents: a list": {"latents": [[0.0]]},
    "latents: an array": {"latents": np.zeros(LATENTS, np.float32)},
    "latents: a number": {"latents": 1.0},
    "latents: taller": {"latents": torch.zeros(2, 4, 8, 4)},
    "latents: wider": {"latents": torch.zeros(2, 4, 4, 5)},
    "latents: of one image": {"latents": torch.zeros(1, 4, 4, 4)},
    "latents: of four images": {"latents": torch.zeros(4, 4, 4, 4)},
    "latents: without the batch": {"latents": torch.zeros(4, 4, 4)},
    "latents: of one channel": {"latents": torch.zeros(2, 1, 4, 4)},
    "latents: without dimensions": {"latents": torch.zeros(())},
    "latents: empty": {"latents": torch.zeros(0, 4, 4, 4)},
    "latents: integers": {"latents": torch.zeros(LATENTS, dtype=torch.int64)},
    "latents: booleans": {"latents": torch.zeros(LATENTS, dtype=torch.bool)},
    "latents: complex": {"latents": torch.zeros(LATENTS, dtype=torch.complex64)},
    "latents: on meta": {"latents": torch.zeros(LATENTS, device="meta")},
    "latents: sparse": {"latents": torch.zeros(LATENTS).to_sparse()},
    "latents: NaN": {"latents": torch.full(LATENTS, torch.nan)},
    "latents: one infinity": {"latents": torch.zeros(LATENTS).index_put((torch.tensor(1),), torch.tensor(torch.inf))},
    "latents: over float32": {"latents": torch.full(LATENTS, 1e300, dtype=torch.float64)},
    "embeds: narrower": {"prompt_embeds": torch.zeros(4, 77, 23)},
    "embeds: of three rows": {"prompt_embeds": torch.zeros(3, 77, 24)},
    "embeds: of one branch": {"prompt_embeds": torch.zeros(2, 77, 24)},
    "embeds: no tokens": {"prompt_embeds": torch.zeros(4, 0, 24)},
    "embeds: integers": {"prompt_embeds": torch.zeros(4, 77, 24, dtype=torch.int32)},
    "embeds: on meta": {"prompt_embeds": torch.zeros(4, 77, 24, device="meta")},
    "embeds: NaN": {"prompt_embeds": torch.full((4, 77, 24), torch.nan)},
    "negative: of another length": {"negative_prompt_embeds": torch.zeros(2, 76, 24)},
    "negative: None": {"negative_prompt_embeds": None},
    "negative: infinite": {"negative_prompt_embeds": torch.full((2, 77, 24), torch.inf)},
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_r05_a_callback_returns_what_is_none_of_its_tensors(pipe: fastldm.Pipeline, answer: Any) -> None:
    after = pipe(**NEXT).images
    rows: list[int] = []

    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Any:
        rows.append(row)
        return answer

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with pytest.raises(fastldm.Error) as caught:
        pipe(
            **CALL,
            num_images_per_prompt=2,
            callback_on_step_end=after_row,
            callback_on_step_end_tensor_inputs=names,
        )
    assert caught.value.field == "callback_on_step_end"
    assert "callback_on_step_end" in str(caught.value)
    assert rows == [0]
    assert torch.equal(pipe(**NEXT).images, after)


@pytest.mark.parametrize("name", ["_guidance_scale", "_guidance_rescale"])
@pytest.mark.parametrize("value", [None, "7", torch.nan, -1.0, 1e9, torch.ones(2)], ids=str)
def test_r05_a_callback_sets_a_guidance_that_is_none(pipe: fastldm.Pipeline, name: str, value: object) -> None:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        setattr(view, name, value)
        return tensors

    with pytest.raises(fastldm.Error) as caught:
        pipe(**CALL, callback_on_step_end=after_row)
    assert caught.value.field == "callback_on_step_end"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_r05_a_callback_may_return_another_float(pipe: fastldm.Pipeline, dtype: torch.dtype) -> None:
    def half(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        return {"latents": (0.5 * tensors["latents"]).to(dtype)}

    def half_in_float32(*args: Any) -> Tensors:
        return {"latents": half(*args)["latents"].float()}

    images = [pipe(**CALL, callback_on_step_end=f).images for f in (half, half_in_float32)]
    assert torch.equal(*images)


def test_r05_what_is_not_finite_by_itself_is_not_blamed_on_the_callback(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet, "forward", lambda self, x, modulation, context: x[:, :4] * torch.nan)
    with pytest.raises(fastldm.Error, match="not finite after the last step") as caught:
        pipe(**CALL, callback_on_step_end=lambda view, row, timestep, tensors: tensors)
    assert caught.value.field == "latents"


# ----------------------------------------------------------------------------------------------------- R06: signals


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # within a __del__ Python drops it
def test_r06_a_signal_at_500_random_moments(pipe: fastldm.Pipeline) -> None:
    armed = False

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    pipe(**CALL)
    start = time.perf_counter()
    image, after = pipe(**CALL).images, pipe(**NEXT).images
    longest = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    rng = random.Random(0)
    interrupted = 0
    try:
        for _ in range(500):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
                found = pipe(**CALL).images
                armed = False
                assert torch.equal(found, image)
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.is_grad_enabled()
            assert torch.equal(pipe(**NEXT).images, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 250


# ------------------------------------------------------------------------------------------------------- R16: forks

FORKS = """
import os, sys, time
import torch
import fastldm

folder = sys.argv[1]
torch.set_num_threads(4)
torch.randn(400, 400) @ torch.randn(400, 400)
torch.randn(1 << 22).exp_()  # starts the threads of OpenMP, which a fork does not have
pipe = fastldm.Pipeline(folder)
call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
image = pipe("a", **call).images
ids = torch.zeros(1, 77, dtype=torch.int64)
picture, latents, embeds = torch.rand(1, 3, 1024, 1024), torch.randn(1, 4, 512, 512), torch.randn(16, 1024, 24)
uses = {
    "call": lambda: pipe("a", **call),
    "call with an image": lambda: pipe("a", image=picture, **call),
    "call with latents": lambda: pipe("a", latents=latents, height=1024, width=1024, **call),
    "call with embeddings": lambda: pipe(prompt_embeds=embeds, guidance_scale=1, **call),
    "encode_prompt of embeddings": lambda: pipe.encode_prompt(prompt_embeds=embeds),
    "encode_prompt": lambda: pipe.encode_prompt("a"),
    "text encoder": lambda: pipe._engine.encode_text(ids),
    "decoder": lambda: pipe._engine.decode(torch.zeros(1, 4, 4, 4)),
    "encoder": lambda: pipe._engine.encode_image(torch.zeros(1, 3, 8, 8)),
}
for name in ("unet", "vae", "text_encoder"):
    if hasattr(pipe, name):
        views = {
            "unet": lambda: pipe.unet(torch.zeros(1, 4, 4, 4), 1, torch.zeros(1, 77, 24)),
            "vae": lambda: pipe.vae.decode(torch.zeros(1, 4, 4, 4)),
            "text_encoder": lambda: pipe.text_encoder(ids),
        }
        uses[f"the view {name}"] = views[name]


def in_fork(use):
    start = time.monotonic()
    try:
        use()
    except fastldm.Error as error:
        quick = time.monotonic() - start < 1
        return 0 if quick and type(error).__name__ == "ForkError" and str(os.getppid()) in str(error) else 2
    return 3


def made_in_fork():
    torch.set_num_threads(1)
    again = fastldm.Pipeline(folder)
    return 0 if torch.equal(again("a", **call).images, image) else 4


def ending(work):
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(5)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hang"


torch.set_num_threads(int(sys.argv[2]))
names = [*uses, *["call"] * (20 - len(uses))]
print({name: found for name in names if (found := ending(lambda: in_fork(uses[name])))}, len(names))
print(ending(made_in_fork))
print(torch.equal(pipe("a", **call).images, image))
"""


def test_r16_a_fork_of_the_process_is_told_so(folder: Path) -> None:
    """20 forks, of each use at least one; arguments are large enough for several threads.

    A pipeline that is made in a fork that computes on one thread works, and so does the parent's after.
    """
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, str(folder), "4"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.stdout.split("\n")[:3] == ["{} 20", "0", "True"], done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------- R20: seeds


class Begun(Exception):
    def __init__(self, job: Job) -> None:
        self.job = job


@pytest.fixture
def jobs(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """jobs(**call): what the call hands to its engine, before the first row."""

    def begin(self: Engine, job: Job) -> None:
        raise Begun(job)

    def get(**call: Any) -> Job:
        with pytest.raises(Begun) as begun:
            pipe(prompt_embeds=torch.zeros(1, 77, 24), guidance_scale=1.0, **call)
        return begun.value.job

    monkeypatch.setattr(Engine, "begin", begin)
    return get


def noises(job: Job) -> list[Tensor]:
    """The state that the run starts from, and what its rows draw."""
    drawn = (job.noise(row) for row in range(job.table.rows))
    return [job.x, *(t for t in drawn if t is not None)]


@pytest.mark.parametrize("task", ["text", "image", "inpaint", "inpaint from noise"])
def test_r20_image_k_of_n_has_the_noise_of_its_seed_alone(jobs: Callable[..., Job], task: str) -> None:
    """1,000 seeds, as a first one and as lists, each image's numbers bit for bit those of its seed in a call alone."""
    rng = random.Random(task)
    rest: dict[str, Any] = {"num_inference_steps": 2, "scheduler": "euler_a"} | pictures(task)
    checked = 0
    while checked < (1000 if task == "text" else 100):
        count = rng.randint(2, 8)
        first = rng.choice([rng.randrange(2**20), rng.randrange(2**63 - count)])
        seeds = (
            [rng.randrange(2**63) for _ in range(count)] if rng.random() < 0.5 else list(range(first, first + count))
        )
        given = first if seeds[0] == first else seeds
        together = noises(jobs(seed=given, num_images_per_prompt=count, **rest))
        for k, seed in enumerate(seeds):
            alone = noises(jobs(seed=seed, **rest))
            assert len(alone) == len(together) > 1
            assert all(torch.equal(a[0], t[k]) for a, t in zip(alone, together, strict=True))
        checked += count


def pictures(task: str) -> dict[str, Any]:
    image, mask = PIL.Image.new("RGB", (8, 8), (9, 90, 200)), PIL.Image.new("L", (8, 8), 255)
    inpaint = {"image": image, "mask_image": mask}
    return {
        "text": {},
        "image": {"image": image},
        "inpaint": {**inpaint, "strength": 0.5},
        "inpaint from noise": inpaint,
    }[task]


def test_r20_a_seed_is_the_generator_of_that_seed(jobs: Callable[..., Job]) -> None:
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1):
        mine, theirs = (noises(jobs(**given)) for given in ({"seed": seed}, {"generator": generators(seed)}))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_r20_different_seeds_give_different_noise(jobs: Callable[..., Job]) -> None:
    seeds = [0, 1, 2, 2**16, 2**31, 2**32 - 2, 2**32 - 1]  # torch's generator on the CPU reads 32 bits
    starts = {tuple(jobs(seed=seed).x.flatten().tolist()) for seed in seeds}
    assert len(starts) == len(seeds)


# ------------------------------------------------------------------------------------------------- R21: global state


def global_state() -> dict[str, object]:
    mt = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (mt[1].tolist(), *mt[2:]),
        "random": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "warnings": list(warnings.filters),
        "log": (logging.root.level, logging.getLogger("fastldm").level, logging.getLogger("transformers").level),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }


@pytest.mark.parametrize("given", [{}, {"seed": 1}, {"generator": True}], ids=["none", "seed", "generator"])
@pytest.mark.parametrize("task", ["text", "image", "inpaint"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_sde"])
def test_r21_a_call_leaves_the_process_as_it_was(
    pipe: fastldm.Pipeline, given: dict[str, Any], task: str, scheduler: str
) -> None:
    pipe(**NEXT)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = global_state()
    given = {"generator": generators(1)} if "generator" in given else given
    pipe("a", num_inference_steps=3, eta=1.0, scheduler=scheduler, **given, **pictures(task))
    assert global_state() == before


def test_r21_loading_and_what_fails_leave_the_process_as_it_was(folder: Path, tmp_path: Path) -> None:
    def nothing(*_: Any) -> None:
        return None

    def use() -> None:
        pipe = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)
        fastldm.Pipeline.from_pretrained(str(folder))
        pipe.encode_prompt("a")
        with pytest.raises(fastldm.Error):
            fastldm.Pipeline(tmp_path)
        with pytest.raises(fastldm.Error):
            pipe("a", height=-1)
        with pytest.raises(fastldm.Error):
            pipe("a", num_inference_steps=2, callback_on_step_end=nothing)

    use()
    before = global_state()
    use()
    assert global_state() == before


# ----------------------------------------------------------------------------------- R22, R23: what is kept of a call


def tensors() -> set[int]:
    """The tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules whose deprecated names answer isinstance
        return {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}


def raising(reason: BaseException) -> Callable[..., Tensors]:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        del timestep, tensors  # which are the caller's to keep
        if row == 1:
            raise reason
        return {}

    return after_row


def with_reason(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
    del timestep, tensors
    try:
        view("a", height=-1)
    except fastldm.Error as error:
        raise Stop("two errors") from error
    return {}


def cancelling(token: fastldm.CancelToken) -> Callable[..., Tensors]:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        token.cancel()
        return tensors

    return after_row


def infinite(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
    view._guidance_scale = 100.0
    return {"latents": torch.full_like(tensors["latents"], 3e38)}


def failing_calls() -> dict[str, dict[str, Any]]:
    token = fastldm.CancelToken()
    return {
        "callback": {"callback_on_step_end": raising(Stop("no"))},
        "KeyboardInterrupt": {"callback_on_step_end": raising(KeyboardInterrupt())},
        "from another": {"callback_on_step_end": with_reason},
        "cancelled": {"callback_on_step_end": cancelling(token), "cancel": token},
        "wrong answer": {"callback_on_step_end": lambda *_: None},
        "not finite": {"callback_on_step_end": infinite},
        "argument": {"height": -1},
        "argument with an image": {"strength": 2.0, "image": PIL.Image.new("RGB", (8, 8))},
    }


@pytest.mark.parametrize("name", failing_calls())
def test_r22_an_error_that_is_kept_keeps_no_tensor(pipe: fastldm.Pipeline, name: str) -> None:
    call = {"seed": 1, "num_inference_steps": 3, **failing_calls()[name]}
    before, kept = tensors(), []
    for _ in range(5):
        try:
            pipe("the red cat", **call)
        except BaseException as error:
            kept.append(error)
    assert len(kept) == 5
    assert all(error.__traceback__ is not None for error in kept)
    assert not tensors() - before


@pytest.mark.parametrize("method", ["encode_text", "decode", "encode_image"])
def test_r22_an_error_deep_inside_keeps_no_tensor(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As a Ctrl-C in the middle of a network would be."""
    from fastldm.ops import reference

    call = {"seed": 1, "num_inference_steps": 2, **pictures("image")}
    inside = getattr(Engine, method)

    def armed(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "linear", interrupted)
            patch.setattr(reference, "conv2d", interrupted)
            return inside(*args, **options)

    def interrupted(x: Tensor, *_: Any, **__: Any) -> Tensor:
        del x
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, method, armed)
    before = tensors()
    with pytest.raises(KeyboardInterrupt) as kept:
        pipe("the red cat", **call)
    found = tensors() - before
    mine = [t for f in frames(kept.value) if f.f_code is armed.__code__ for t in f.f_locals["args"][1:]]
    assert found <= {id(t) for t in mine} | {id(t._base) for t in mine}  # what this test's own function was handed


def frames(error: BaseException) -> Iterator[Any]:
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


@pytest.mark.usefixtures("quick")
def test_r23_200_images_leave_nothing_behind(pipe: fastldm.Pipeline) -> None:
    """Of all kinds, a fifth of them cancelled or failing."""

    def paint(k: int) -> None:
        token = fastldm.CancelToken()
        more: dict[str, Any] = [
            {},
            pictures("image"),
            pictures("inpaint"),
            {"callback_on_step_end": cancelling(token), "cancel": token},
            {"callback_on_step_end": raising(Stop()), "num_images_per_prompt": 2},
        ][k % 5]
        with suppress(fastldm.Cancelled, Stop):
            pipe("the red cat", num_inference_steps=2, seed=k, scheduler=["ddim", "euler_a"][k % 2], **more)

    def alive() -> tuple[int, int]:
        return len(tensors()), len(gc.get_objects())

    for k in range(20):
        paint(k)
    before = alive()
    for k in range(200):
        paint(k)
    after = alive()
    assert after[0] == before[0]
    assert after[1] - before[1] < 40  # one object for each failing call would be 80
