"""Images, masks and what belongs to them: every bad one is an error that names it, before any work; edges pass."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import fastldm
from fastldm.config import SD15_UNET
from fastldm.sampling import scheduler_config
from tests.test_request import NO_FLAG, NO_INTEGER, NO_NUMBER, Awkward, checked, latents, nested, pipeline

SIDE = 64
PICTURE = PIL.Image.new("RGB", (SIDE, SIDE), (200, 100, 50))
MASK = PIL.Image.new("L", (SIDE, SIDE), 0)
MASK.paste(255, (8, 8, 40, 48))
UNIT = np.full((SIDE, SIDE, 3), 0.5, np.float32)

UNETS = {
    "text": SD15_UNET,
    "image": SD15_UNET,
    "inpaint": SD15_UNET,
    "inpaint_9": replace(SD15_UNET, in_channels=9),
    "instruct": replace(SD15_UNET, in_channels=8),
}
CALLS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a cat"},
    "image": {"prompt": "a cat", "image": PICTURE},
    "inpaint": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK},
    "inpaint_9": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK},
    "instruct": {"prompt": "a cat", "image": PICTURE},
}
WITH_IMAGE, WITH_MASK = ["image", "inpaint", "inpaint_9", "instruct"], ["inpaint", "inpaint_9"]


def spoiled(value: float, *, at: tuple[int, ...] = (-1, -1, -1)) -> np.ndarray:
    """One value of a picture replaced."""
    array = UNIT.copy()
    array[at] = value
    return array


def cut_off() -> PIL.Image.Image:
    """A PNG file without its second half."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
    return PIL.Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def integers(low: int, high: int) -> PIL.Image.Image:
    """In mode "I"."""
    array = np.full((SIDE, SIDE), low, np.int32)
    array[0, 0] = high
    return PIL.Image.fromarray(array)


NO_PICTURE: list[Any] = [
    1,
    0.5,
    True,
    "cat.png",
    b"\x89PNG",
    {},
    [],
    (),
    object(),
    PIL.Image,
    Awkward(),
    [PICTURE, None],
    [[PICTURE]],
    [PICTURE] * 100_000,
    np.zeros((1000, 8, 8, 3), np.float32),
    # values
    UNIT * 255,
    UNIT - 1,
    spoiled(math.nan),
    spoiled(math.inf),
    spoiled(-math.inf),
    spoiled(1.001),
    spoiled(-1e-6),
    torch.full((3, SIDE, SIDE), math.nan),
    torch.full((3, SIDE, SIDE), 255.0),
    torch.full((1, 3, SIDE, SIDE), -1.0),
    integers(-1, 0),
    integers(0, 65536),
    # kinds
    UNIT.astype(np.int64),
    UNIT.astype(np.complex64),
    UNIT.astype(object),
    np.array([["a"] * 8] * 8),
    np.zeros((SIDE, SIDE, 3), np.uint16),
    torch.zeros(3, SIDE, SIDE, dtype=torch.int64),
    torch.zeros(3, SIDE, SIDE, dtype=torch.complex64),
    torch.zeros(3, SIDE, SIDE, dtype=torch.complex64).conj(),
    torch.empty(3, SIDE, SIDE, device="meta"),
    torch.zeros(3, SIDE, SIDE).to_sparse(),
    PIL.Image.new("F", (SIDE, SIDE)),
    # shapes; four channels are never latents
    np.float32(0.5),
    np.zeros(SIDE, np.float32),
    np.zeros((SIDE, SIDE, 4), np.float32),
    np.zeros((SIDE, SIDE, 4), np.uint8),
    np.zeros((SIDE, SIDE, 2), np.float32),
    np.zeros((1, SIDE, SIDE, 4), np.float32),
    np.zeros((1, 4, 8, 8), np.float32),
    np.zeros((3, SIDE, SIDE), np.float32),
    np.zeros((0, SIDE, SIDE, 3), np.float32),
    np.zeros((0, SIDE, 3), np.float32),
    np.zeros((1, 1, SIDE, SIDE, 3), np.float32),
    torch.tensor(0.5),
    torch.zeros(SIDE),
    torch.zeros(4, SIDE, SIDE),
    torch.zeros(1, 4, SIDE, SIDE),
    torch.randn(1, 4, 8, 8).clamp(0, 1),
    torch.zeros(2, SIDE, SIDE),
    torch.zeros(1, SIDE, SIDE, 3),
    torch.zeros(0, 3, SIDE, SIDE),
    torch.zeros(1, 1, 3, SIDE, SIDE),
    torch.zeros(1, 1, 8192),
    nested(3, SIDE, SIDE),
    # sizes
    PIL.Image.new("RGB", (0, 0)),
    PIL.Image.new("RGB", (SIDE, 0)),
    np.zeros((8, 8192, 3), np.uint8),
    [PICTURE, PIL.Image.new("RGB", (32, 32))],
    [PICTURE, UNIT[:32]],
    cut_off(),
]
WRONG_SIZE: list[Any] = [
    PIL.Image.new("L", (8192, 8)),
    PIL.Image.new("RGB", (1, 1)),
    PIL.Image.new("RGB", (65, 67)),
    PIL.Image.new("RGB", (SIDE, 63)),
    UNIT[:63],
    UNIT[:7, :7],
    torch.zeros(3, SIDE, 65),
]

Case = tuple[str, dict[str, Any], str]  # a task, what changes in its good call, the argument that the error names
ALL = list(CALLS)
CASES: list[Case] = []


def bad(tasks: list[str], field: str, values: list[Any], **others: Any) -> None:
    CASES.extend((task, {**others, field: value}, field) for task in tasks for value in values)


def at_odds(tasks: list[str], field: str, *changes: dict[str, Any]) -> None:
    CASES.extend((task, change, field) for task in tasks for change in changes)


bad(WITH_IMAGE, "image", NO_PICTURE)
bad(["image", "instruct"], "image", WRONG_SIZE)
at_odds(["image"], "image", *({"image": value, "height": 64, "width": 64} for value in NO_PICTURE))
at_odds(
    WITH_IMAGE,
    "image",
    {"image": [PICTURE] * 2},
    {"image": [PICTURE] * 3, "prompt": ["a", "b"]},
    {"image": np.stack([UNIT] * 2)},
    {"image": UNIT, "height": 128, "width": 128},
    {"image": torch.zeros(3, SIDE, SIDE), "width": 128},
)
at_odds(["inpaint", "inpaint_9", "instruct"], "image", {"image": None})

bad(WITH_MASK, "mask_image", [value for value in NO_PICTURE if not (isinstance(value, np.ndarray) and value.ndim == 3)])
bad(WITH_MASK, "mask_image", [spoiled(v) for v in (math.nan, math.inf, 1.001, -1e-6)])
at_odds(
    WITH_MASK,
    "mask_image",
    {"image": UNIT, "mask_image": np.zeros((32, SIDE), np.float32), "height": SIDE, "width": SIDE},
    {"image": UNIT, "mask_image": np.zeros((SIDE, 72), np.float32), "height": SIDE, "width": SIDE},
    {"mask_image": [MASK] * 2},
    {"mask_image": [MASK] * 3, "prompt": ["a", "b"], "image": [PICTURE] * 2},
    {"mask_image": torch.zeros(2, 1, SIDE, SIDE), "height": SIDE, "width": SIDE},
    {"mask_image": MASK.resize((32, 64)), "padding_mask_crop": 4},
)
at_odds(["text"], "image", {"mask_image": MASK}, {"mask_image": "no"})
at_odds(["inpaint_9"], "mask_image", {"mask_image": None})
at_odds(["instruct"], "mask_image", {"mask_image": MASK})

NO_STRENGTH = [x for x in NO_NUMBER if x is not None] + [
    math.nan,
    math.inf,
    -math.inf,
    -0.1,
    1.5,
    1.0001,
    0,
    1e-9,
    1e30,
]
bad(["image", "inpaint", "inpaint_9"], "strength", NO_STRENGTH)
bad(["image", "inpaint"], "strength", [0.01, 0.0999], num_inference_steps=10)
bad(["text", "instruct"], "strength", [0.5, 1.0, 0, math.nan, "x", np.array([0.1, 0.2])])

NO_NUMBERS = [1, 0.5, "999", b"9", {}, {999}, [], (), ["999"], [None], [True], [[999]], [math.nan], [math.inf], [-1]]
NO_NUMBERS += [[1.0] * 1002, np.zeros((2, 2)), np.array([]), np.array(["a"]), torch.zeros(2, 2), object(), Awkward()]
for name in ("timesteps", "sigmas"):
    bad(["text", "image", "inpaint_9", "instruct"], name, NO_NUMBERS)
at_odds(ALL, "timesteps", {"timesteps": [900, 500], "sigmas": [9.0, 5.0]})

NO_SCALE = [x for x in NO_NUMBER if x is not None] + [math.nan, math.inf, -math.inf, -1, -1e-9, 101, 1e30]
bad(["instruct"], "image_guidance_scale", NO_SCALE)
bad(["text", "image", "inpaint", "inpaint_9"], "image_guidance_scale", [1.5, 0, math.nan, "x"])

NO_LATENTS: list[Any] = [
    1,
    "x",
    [[0.0]],
    PICTURE,
    np.zeros((1, 4, 8, 8), np.float32),
    Awkward(),
    torch.tensor(1.0),
    latents(1, 4, 8, 7),
    latents(1, 4, 16, 16),
    latents(4, 8, 8),
    latents(2, 4, 8, 8),
    latents(0, 4, 8, 8),
    latents(1, 3, SIDE, SIDE),
    latents(1, 9, 8, 8),
    latents(1, 4, 8, 8, value=math.nan),
    latents(1, 4, 8, 8, value=math.inf),
    latents(1, 4, 8, 8, value=1e300, dtype=torch.float64),
    torch.zeros(1, 4, 8, 8, dtype=torch.int64),
    torch.zeros(1, 4, 8, 8, dtype=torch.complex64),
    torch.empty(1, 4, 8, 8, device="meta"),
    torch.zeros(1, 4, 8, 8).to_sparse(),
    nested(4, 8, 8),
]
bad(["inpaint_9"], "masked_image_latents", NO_LATENTS, height=SIDE, width=SIDE)
at_odds(["inpaint_9"], "masked_image_latents", {"masked_image_latents": latents(3, 4, 8, 8), "prompt": ["a", "b"]})
bad(["text", "image", "inpaint", "instruct"], "masked_image_latents", [latents(1, 4, 8, 8), 0, "x"])
bad(["image"], "latents", [latents(1, 4, 8, 8)])
at_odds(["inpaint", "inpaint_9"], "latents", {"latents": latents(1, 4, 8, 8), "strength": 0.5})

NO_PADDING = [x for x in NO_INTEGER if x is not None] + [-1, 4097, 2**70, -(2**70), 10**5000]
bad(WITH_MASK, "padding_mask_crop", NO_PADDING)
bad(["text", "image", "instruct"], "padding_mask_crop", [0, 4, "x"])
for kind in ("np", "pt", "latent"):
    at_odds(WITH_MASK, "output_type", {"padding_mask_crop": 4, "output_type": kind})
for value in (UNIT, [PICTURE], torch.zeros(3, SIDE, SIDE), PIL.Image.new("RGB", (0, 0)), PIL.Image.new("F", (64, 64))):
    at_odds(WITH_MASK, "image", {"image": value, "padding_mask_crop": 4})
    same = PICTURE.resize(value.size) if isinstance(value, PIL.Image.Image) and value.width else PICTURE
    image = value if isinstance(value, PIL.Image.Image) and not value.width else same
    if image is not value:
        at_odds(WITH_MASK, "mask_image", {"image": image, "mask_image": value, "padding_mask_crop": 4})

bad(ALL, "overlay", NO_FLAG)
bad(["text", "image", "instruct"], "overlay", [True, np.True_])
at_odds(WITH_MASK, "overlay", {"overlay": True, "output_type": "latent"})

NAMES = "callback_on_step_end_tensor_inputs"
bad(["text", "image"], NAMES, [["mask"], ["masked_image_latents"], ["image_latents"]])
bad(["inpaint"], NAMES, [["masked_image_latents"], ["image_latents"], ["latents", "masks"]])
bad(["inpaint_9"], NAMES, [["image_latents"], "mask", ["image"]])
bad(["instruct"], NAMES, [["negative_prompt_embeds"], ["mask"], "image_latents"])
bad(ALL, "seed", [-1, 2.5, "7", [1, 2]])
bad(ALL, "clip_skip", [-1, 12, "1"])
bad(ALL, "cancel", [True, "no"])
bad(ALL, "scheduler", ["eular", 7])
bad(ALL, "prompt_embeds", [latents(1, 77, 768, value=math.nan), latents(1, 70, 24), "x"], prompt=None)
bad(ALL, "negative_prompt_embeds", [latents(1, 77, 768, value=math.inf), latents(1, 70, 768), latents(2, 77, 768)])


def test_there_are_enough_of_them() -> None:
    counts = {task: sum(t == task for t, *_ in CASES) for task in CALLS}
    assert min(counts.values()) >= 60
    assert len(CASES) >= 500


@pytest.mark.parametrize(("task", "change", "field"), CASES, ids=[f"{t}-{f}-{i}" for i, (t, _, f) in enumerate(CASES)])
def test_a_bad_argument_is_named_at_once(task: str, change: dict[str, Any], field: str) -> None:
    """`pipeline()` explodes when anything of the model is used."""
    pipe, call, seconds = pipeline(UNETS[task]), {**CALLS[task], **change}, []
    for _ in range(3):  # the best of three, of this thread: the machine is busy, the collector may run in one
        start = time.thread_time()
        with pytest.raises(fastldm.Error) as caught:
            pipe(**call)
        seconds.append(time.thread_time() - start)
    assert caught.value.field == field
    assert field in str(caught.value)
    assert len(str(caught.value)) < 500
    assert isinstance(caught.value, ValueError)
    assert min(seconds) < 0.01


OWN_SCHEDULES: list[tuple[str, dict[str, Any], str]] = [
    ("DDPMScheduler", {"timesteps": [500, 900]}, "timesteps"),
    ("DDPMScheduler", {"timesteps": [500, 500]}, "timesteps"),
    ("DDPMScheduler", {"timesteps": [1000, 500]}, "timesteps"),
    ("DDPMScheduler", {"timesteps": [900.5, 500]}, "timesteps"),
    ("DDPMScheduler", {"sigmas": [9.0, 1.0]}, "sigmas"),
    ("EulerDiscreteScheduler", {"sigmas": [1.0, 9.0, 0.0]}, "sigmas"),
    ("EulerDiscreteScheduler", {"timesteps": [500, 900]}, "timesteps"),
    ("DDIMScheduler", {"timesteps": [900, 500]}, "timesteps"),
    ("DDIMScheduler", {"sigmas": [9.0, 1.0]}, "sigmas"),
]


@pytest.mark.parametrize(("sampler", "change", "field"), OWN_SCHEDULES)
@pytest.mark.parametrize("task", ["text", "image", "inpaint", "inpaint_9"])
def test_a_schedule_that_the_sampler_cannot_run_is_named(
    task: str, sampler: str, change: dict[str, Any], field: str
) -> None:
    pipe = pipeline(UNETS[task])
    pipe._scheduler = scheduler_config({"_class_name": sampler})
    with pytest.raises(fastldm.Error) as caught:
        pipe(**CALLS[task], height=SIDE, width=SIDE, **change)
    assert caught.value.field == field


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 50), (0.0999, 10), (0.3, 3), (0.999, 1)])
def test_a_strength_that_leaves_no_step_is_named(strength: float, steps: int) -> None:
    with pytest.raises(fastldm.Error, match="strength") as caught:
        pipeline()(**CALLS["image"], strength=strength, num_inference_steps=steps)
    assert caught.value.field == "strength"


# ---------------------------------------------------------------------------------------------------- what is good

Check = Callable[[Any], bool]
SIXTEEN = PIL.Image.fromarray(np.full((SIDE, SIDE), 32768, np.uint16))


def is_first_size(request: Any) -> bool:
    return bool(request.source.size == (SIDE, SIDE) == (request.height, request.width))


PICTURES: list[Any] = [
    *(PICTURE.convert(mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV")),
    SIXTEEN,
    integers(0, 65535),
    UNIT,
    UNIT.astype(np.float64),
    UNIT.astype(np.float16),
    UNIT[None],
    UNIT[:, :, 0],
    np.zeros((SIDE, SIDE), bool),
    np.zeros((SIDE, SIDE, 3), np.uint8),
    np.asfortranarray(UNIT)[::-1],
    torch.zeros(3, SIDE, SIDE, dtype=torch.bfloat16),
    torch.ones(1, 1, SIDE, SIDE, dtype=torch.uint8) * 255,
    torch.ones(SIDE, SIDE),
    torch.zeros(3, SIDE, SIDE).requires_grad_(),
    [PICTURE],
    (PICTURE,),
]


@pytest.mark.parametrize("value", PICTURES, ids=range(len(PICTURES)))
def test_pictures_and_masks_that_are_good(value: Any) -> None:
    call = {"height": SIDE, "width": SIDE}
    assert is_first_size(checked(pipeline(), **{**CALLS["image"], **call, "image": value}))
    assert is_first_size(checked(pipeline(UNETS["instruct"]), **{**CALLS["instruct"], **call, "image": value}))
    for task in WITH_MASK:
        assert is_first_size(checked(pipeline(UNETS[task]), **{**CALLS[task], **call, "mask_image": value}))


EDGES: list[tuple[str, dict[str, Any], Check]] = [
    ("image", {"image": [PICTURE] * 2, "prompt": ["a", "b"]}, lambda r: len(r.source.pixels) == 2),
    ("image", {"image": PIL.Image.new("RGB", (65, 67)), "height": 64, "width": 64}, is_first_size),
    ("image", {"image": PIL.Image.new("RGB", (1, 1)), "height": 64, "width": 64}, is_first_size),
    (
        "image",
        {"image": [PICTURE, PICTURE.resize((32, 9))], "prompt": ["a"] * 2, "height": 64, "width": 64},
        is_first_size,
    ),
    (
        "image",
        {"image": SIXTEEN, "height": 64, "width": 64},
        lambda r: float(r.source.pixels[0, 0, 0, 0]) == np.float32(32768 / 65535),
    ),
    (
        "image",
        {"image": SIXTEEN, "height": 32, "width": 32},
        lambda r: float(r.source.pixels[0, 0, 0, 0]) == np.float32(128 / 255),
    ),
    ("image", {"strength": 0.02, "num_inference_steps": 50}, lambda r: r.source.strength == 0.02),
    ("image", {"strength": 1}, lambda r: r.source.strength == 1.0),
    ("image", {"strength": np.float32(0.5)}, lambda r: r.source.strength == 0.5),
    ("image", {"strength": torch.tensor(0.5)}, lambda r: r.source.strength == 0.5),
    ("inpaint", {"overlay": np.True_, "height": 64, "width": 64}, lambda r: r.source.overlay is True),
    ("inpaint", {"overlay": True, "height": 64, "width": 64}, lambda r: r.source.overlay is True),
    ("text", {"overlay": False}, lambda r: r.source is None),
    ("instruct", {"overlay": np.False_}, lambda r: r.source.overlay is False),
    *(
        ("inpaint", {"padding_mask_crop": padding, "height": 64, "width": 64}, lambda r: r.source.crop is not None)
        for padding in (0, 4096, np.int64(4), np.uint8(4), torch.tensor(4))
    ),
    (
        "inpaint",
        {"image": SIXTEEN, "mask_image": SIXTEEN, "padding_mask_crop": 4, "height": 64, "width": 64},
        lambda r: bool((r.source.mask == 1).all()),
    ),
    (
        "inpaint",
        {"mask_image": [MASK] * 2, "image": [PICTURE] * 2, "prompt": ["a", "b"], "height": 64, "width": 64},
        lambda r: r.source.mask.shape == (2, 1, 64, 64),
    ),
    (
        "inpaint_9",
        {"masked_image_latents": latents(2, 4, 8, 8), "prompt": ["a", "b"], "height": 64, "width": 64},
        lambda r: len(r.masked_image_latents) == 2,
    ),
    (
        "inpaint_9",
        {"masked_image_latents": latents(1, 4, 8, 8, dtype=torch.float16), "height": 64, "width": 64},
        lambda r: r.masked_image_latents is not None,
    ),
    ("inpaint", {"latents": latents(1, 4, 8, 8), "height": 64, "width": 64}, lambda r: r.latents is not None),
    ("instruct", {"image_guidance_scale": 0}, lambda r: r.scales.image == 0 and r.scales.branches == 1),
    ("instruct", {"image_guidance_scale": 100}, lambda r: r.scales.image == 100),
    ("instruct", {"image_guidance_scale": None}, lambda r: r.scales.image == 1.5),
    ("text", {"timesteps": np.array([900, 500, 1])}, lambda r: r.timesteps == (900, 500, 1)),
    ("text", {"timesteps": torch.tensor([900])}, lambda r: r.steps == 1),
    ("text", {"sigmas": (14.0, 0.5)}, lambda r: r.sigmas == (14.0, 0.5)),
]


@pytest.mark.parametrize(("task", "change", "check"), EDGES, ids=range(len(EDGES)))
def test_edges_that_are_good(task: str, change: dict[str, Any], check: Check) -> None:
    assert check(checked(pipeline(UNETS[task]), **{**CALLS[task], **change}))
