"""The bad arguments of `faults.py`, as data: a call, what would be right, and the words of a clear error.

A01 to A24 number the faults; the tests of the same numbers (`test_a06_...`) show each of them for fastldm alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 64  # pixels: the model's own size
LATENT = 16
WIDTH = 24  # of its embeddings
TEXT, IMAGE, INPAINT = TASKS = ("text_to_image", "image_to_image", "inpaint")


@dataclass(frozen=True)
class Call:
    """change: what the arguments have in place of, or beside, those of the task's good call.

    right: "refuse", "accept", or "either" where both can be defended. like: the arguments of a call whose image is the
    right one, where it is accepted; any finite image of the usual shape is, where there is none.
    called, says: an error is clear if it has one word of each, in any case of letters.
    """

    fault: str
    name: str
    task: str
    change: Mapping[str, Any]
    called: tuple[str, ...]
    says: tuple[str, ...]
    right: str = "refuse"
    like: Mapping[str, Any] | None = None


def _pixels() -> NDArray[np.uint8]:
    """A picture with all values."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


PICTURE = PIL.Image.fromarray(_pixels())
UNIT = np.asarray(PICTURE, np.float32) / 255
MASK = PIL.Image.new("L", (SIDE, SIDE))
MASK.paste(255, (8, 8, 40, 48))
GOOD: Mapping[str, Mapping[str, Any]] = {
    TEXT: {"prompt": "the red cat"},
    IMAGE: {"prompt": "the red cat", "image": PICTURE},
    INPAINT: {"prompt": "the red cat", "image": PICTURE, "mask_image": MASK},
}


def call(
    fault: str, change: Mapping[str, Any], says: str, *, task: str = TEXT, name: str = "", called: str = "", **rest: Any
) -> Call:
    """says, called: words with commas between; name, called: by default what is changed. Nothing makes an error clear
    where none is right.
    """
    shown = name or ", ".join(f"{key}={value!r}" for key, value in change.items())
    names = tuple((called or ", ".join(change)).split(", "))
    reasons = () if rest.get("right") == "accept" else tuple(says.split(", "))
    return Call(fault, shown if task == TEXT else f"{task}: {shown}", task, change, names, reasons, **rest)


def spoiled(array: NDArray[Any], value: float) -> NDArray[Any]:
    """With one other value."""
    out = array.copy()
    out.flat[-1] = value
    return out


def latents(*shape: int, value: float | None = None) -> Tensor:
    out = torch.randn(shape or (1, 4, LATENT, LATENT), generator=torch.Generator().manual_seed(2))
    if value is not None:
        out.view(-1)[-1] = value
    return out


def embeds(*shape: int, value: float | None = None) -> dict[str, Any]:
    """In place of the prompt."""
    return {"prompt": None, "prompt_embeds": latents(*(shape or (1, 77, WIDTH)), value=value)}


# What a message may say of the reason: any engine's, generously.
NUMBER = "integer, int, positive, number, must be, at least, range, divisible, negative, float"
RANGE = "must be, range, between, finite, from 0, should, nan, positive, number"
STEPS = "integer, int, positive, must be, at least, from 1, < 1"
TOO_LARGE = "too large, over, from, at most, exceed, must be, memory, limit"
STRING = "str, list, type, must be, empty, none, undefined"
COUNT = "entries, length, batch, same, match, number of, images for, expected"
SHAPE = "shape, size, dimension"
FINITE = "nan, finite, infinity, inf"
KIND = "type, must be, int, integer, float, number, str, list, expected, a number"
UNKNOWN = "unexpected, unknown, no such, unrecogni, belongs to, not supported, did you mean"


# Sizes: A01 to A04.
def sides(fault: str, height: object, width: object, says: str, *, name: str = "", **rest: Any) -> Call:
    """Both, as diffusers takes its own size where one is missing."""
    shown = name or f"height={height!r}, width={width!r}"
    return call(fault, {"height": height, "width": width}, says, name=shown, **rest)


SIZES = [
    *[sides("A01", *pair, NUMBER, task=t) for pair in ((0, SIDE), (SIDE, 0), (0, 0)) for t in (TEXT, INPAINT)],
    call("A01", {"height": 32}, NUMBER, name="height=32 alone", right="accept", like={"height": 32, "width": SIDE}),
    *[sides("A02", value, SIDE, NUMBER) for value in (-64, "64", True, 2.5, [SIDE], -(2**40))],
    *[sides("A02", SIDE, value, NUMBER, task=INPAINT) for value in (-64, "64", True)],
    sides("A02", 2**70, SIDE, NUMBER, name="height=2**70"),
    sides("A02", float(SIDE), SIDE, NUMBER, right="either", like={}),
    sides("A02", np.int64(SIDE), SIDE, NUMBER, right="accept", like={}),
    *[sides("A03", value, SIDE, "divisible, multiple", task=t) for value in (63, 65) for t in (TEXT, INPAINT)],
    sides("A03", SIDE, 7, "divisible, multiple, from"),
    *[sides("A04", 65536, 65536, TOO_LARGE, task=t) for t in (TEXT, INPAINT)],
    *[call("A04", {"num_images_per_prompt": value}, TOO_LARGE + ", from 1") for value in (10**6, 0, -1, 2.5)],
]

# Steps: A05 to A07.
EULER = "euler"
COUNTS = [
    *[call("A05", {"num_inference_steps": value}, STEPS) for value in (0, 2.5, "5", [2])],
    *[call("A05", {"num_inference_steps": value}, STEPS, task=IMAGE) for value in (0, 2.5)],
    *[call("A06", {"num_inference_steps": -1}, STEPS, task=task) for task in TASKS],
    call("A06", {"num_inference_steps": -20}, STEPS),
    *[call("A07", {"num_inference_steps": value}, TOO_LARGE + ", cannot be larger") for value in (1001, 10**9)],
    call("A07", {"num_inference_steps": 10**9, "scheduler": EULER}, TOO_LARGE, called="num_inference_steps"),
]

# Texts: A08 to A13.
PROMPT = "prompt, text input"
LONG = {"prompt": "the red cat " * 40}
WORDS = [
    call("A08", LONG, TOO_LARGE, name="a prompt of 120 words", right="accept", like={"prompt": "the red cat " * 30}),
    call("A08", {"prompt": "the red cat " * 8500}, TOO_LARGE, name="a prompt of 100 kB", right="either", like=LONG),
    call("A09", {"prompt": "the red cat " * 850_000}, TOO_LARGE, name="a prompt of 10 MB", right="either", like=LONG),
    call("A09", {"prompt": "x" * 10**7}, TOO_LARGE, name="a prompt of 10 MB without spaces", right="either"),
    call("A09", {"negative_prompt": "x" * 10**7}, TOO_LARGE, name="a negative prompt of 10 MB", right="either"),
    call("A10", {"prompt": "a\ud800b"}, "surrogate, unicode, utf, encod, character", name="half of a surrogate pair"),
    call(
        "A10",
        {"negative_prompt": "\udfff"},
        "surrogate, unicode, utf, encod, character",
        name="half of a surrogate pair, negative",
    ),
    *[
        call("A11", {"prompt": text}, STRING, name=name, right="accept")
        for name, text in {
            "emoji": "a \U0001f431 cat",
            "joined emoji": "\U0001f469\u200d\U0001f680 cat",
            "a NUL": "a\x00cat",
            "combining marks": "c\u0301a\u0308t\u0335",
            "an end of text in it": "a <|endoftext|> cat",
            "an empty prompt": "",
        }.items()
    ],
    call("A11", {"prompt": "a" + "\u0301" * 500_000}, TOO_LARGE, name="1 MB of combining marks", right="either"),
    *[
        call("A12", {"prompt": value}, STRING, called=PROMPT)
        for value in ([], [None], ["a", 1], b"a cat", None, 7, {"a": 1})
    ],
    *[call("A12", {"prompt": value}, STRING, called=PROMPT, task=IMAGE) for value in ([], [None], None)],
    *[call("A12", {"negative_prompt": value}, STRING) for value in ([None], 7, b"blue")],
    call("A13", {"prompt": ["a", "b"], "negative_prompt": ["c"]}, COUNT, called="negative_prompt"),
    call("A13", {"prompt": ["a", "b"], "negative_prompt": ["c"]}, COUNT, called="negative_prompt", task=INPAINT),
    call("A13", {"negative_prompt": ["c", "d", "e"]}, COUNT),
    call("A13", {"generator": [torch.Generator() for _ in range(3)]}, COUNT, name="3 generators for 1 image"),
    call("A13", {"generator": []}, COUNT + ", generator, none"),
    call(
        "A13", {"image": [PICTURE] * 2, "prompt": ["a"] * 3}, COUNT, task=IMAGE, called="image", name="2 for 3 prompts"
    ),
]

# Numbers: A14 to A16.
SCALES = [
    *[
        call("A14", {"generator": value}, KIND + ", generator", name=f"generator={value!r}")
        for value in (42, "42", 2.5)
    ],
    *[call("A14", {"seed": value}, KIND + ", from 0, long", name=f"seed {value!r}") for value in (2.5, "7")],
    call("A14", {"seed": 2**64}, KIND + ", range, overflow", name="seed 2**64"),
    call("A14", {"seed": -1}, KIND + ", range", name="seed -1", right="either"),
    call("A14", {"seed": 2**63}, KIND + ", range", name="seed 2**63", right="either"),
    *[call("A15", {"guidance_scale": math.nan}, RANGE, task=task) for task in TASKS],
    call("A15", {"guidance_rescale": math.nan}, RANGE),
    *[call("A16", {"guidance_scale": value}, RANGE) for value in (math.inf, -math.inf, 1e30)],
    call("A16", {"guidance_scale": math.inf}, RANGE, task=INPAINT),
    call("A16", {"guidance_scale": "7.5"}, KIND),
    call("A16", {"guidance_scale": 150.0}, RANGE, right="either"),
    call("A16", {"guidance_scale": -1.0}, RANGE, right="either", like={"guidance_scale": 1.0}),
    call("A16", {"guidance_scale": np.float32(7.5)}, RANGE, right="accept", like={}),
    *[call("A16", {"eta": value}, RANGE) for value in (-5.0, 5.0, math.nan)],
    call("A16", {"eta": 5.0}, RANGE, task=IMAGE),
]

# Tensors: A17 and A18.
TENSORS = [
    call("A17", {"latents": latents(1, 4, 14, 18)}, SHAPE, name="latents of another size"),
    call(
        "A17", {"latents": latents(1, 4, 14, 18), "height": SIDE}, SHAPE, called="latents", name="likewise, with height"
    ),
    call("A17", {"latents": latents(1, 3, LATENT, LATENT)}, SHAPE + ", channels", name="latents of 3 channels"),
    call("A17", {"latents": latents(4, LATENT, LATENT)}, SHAPE, name="latents without a batch"),
    call("A17", {"latents": latents(2, 4, LATENT, LATENT)}, SHAPE + ", batch", name="latents for 2 images"),
    call("A17", {"latents": latents(1, 4, SIDE, SIDE)}, SHAPE, name="latents as large as the image"),
    *[call("A18", {"latents": latents(value=v)}, FINITE, name=f"latents with {v}") for v in (math.nan, math.inf)],
    call("A18", {"latents": latents(value=1e30)}, f"{FINITE}, {RANGE}", name="latents with 1e30"),
    call(
        "A18",
        {"latents": latents().round().to(torch.int64)},
        "dtype, float, int",
        name="latents of integers",
        right="either",
        like={"latents": latents().round()},
    ),
    call(
        "A18",
        {"latents": latents().half()},
        "dtype, float, half",
        name="latents in float16",
        right="either",
        like={"latents": latents().half().float()},
    ),
    call("A18", {"latents": latents().numpy()}, "tensor, type, ndarray", name="latents in NumPy"),
    call("A18", embeds(value=math.nan), FINITE, called="prompt_embeds", name="embeddings with NaN"),
    call("A18", embeds(value=math.inf), FINITE, called="prompt_embeds", name="embeddings with infinity"),
    call("A18", embeds(1, 77, WIDTH + 1), SHAPE, called="prompt_embeds", name="embeddings of another width"),
    call("A18", embeds(77, WIDTH), SHAPE, called="prompt_embeds", name="embeddings without a batch"),
    call("A18", {**embeds(), "prompt": "a cat"}, "both, one of, only, not", called="prompt_embeds", name="both"),
    call(
        "A18",
        {**embeds(), "negative_prompt_embeds": latents(1, 70, WIDTH)},
        SHAPE,
        called="negative_prompt_embeds",
        name="negative embeddings of another length",
    ),
]

# Names: A19 and A20.
NAMES = [
    *[
        call("A19", {name: value}, UNKNOWN)
        for name, value in {
            "hieght": 64,
            "negativ_prompt": "blue",
            "num_inference_step": 5,
            "guidance": 3.0,
            "strength": 0.5,
            "padding_mask_crop": 4,
        }.items()
    ],
    call("A19", {"strenght": 0.5}, UNKNOWN, task=IMAGE),
    call("A19", {"mask_img": 1}, UNKNOWN, task=INPAINT),
    *[
        call("A20", {"output_type": value}, "one of, must be, not supported, choose", task=TEXT)
        for value in ("jpeg", 7)
    ],
    call("A20", {"output_type": "jpeg"}, "one of, must be, not supported, choose", task=IMAGE),
    call("A20", {"output_type": "PIL"}, "one of, must be, not supported, choose", task=INPAINT),
]

# Images: A21 to A24.
SIXTEEN = PIL.Image.fromarray(_pixels()[:, :, 0].astype(np.uint16) * 257)
EIGHT = PIL.Image.fromarray(_pixels()[:, :, 0])
IMAGES_SAY = "pixel, size, resolution, multiple, small, large, zero, must be, shape, divisible, width, height"
NO_STEP = "step, must be, should, between, range, nan"


def as_image(
    fault: str, name: str, image: object, says: str, *, task: str = IMAGE, like: object = None, right: str = "refuse"
) -> Call:
    good = None if like is None else {"image": like}
    names = "image, height and width"
    return call(fault, {"image": image}, says, task=task, name=name, called=names, right=right, like=good)


def as_mask(name: str, mask: object, says: str, *, like: object = None, right: str = "refuse") -> Call:
    good = None if like is None else {"mask_image": like}
    return call("A24", {"mask_image": mask}, says, task=INPAINT, name=name, called="mask", right=right, like=good)


def converted(mode: str, fault: str = "A22", right: str = "accept") -> Call:
    image = PICTURE.convert(mode)
    return as_image(fault, f"an image in mode {mode}", image, "mode, channel", like=image.convert("RGB"), right=right)


def transparent() -> PIL.Image.Image:
    image = PICTURE.copy()
    image.putalpha(EIGHT)
    return image


PICTURES = [
    *[call("A21", {"strength": value}, NO_STEP, task=IMAGE) for value in (0.0, 0.01, math.nan, 1.5, -0.5, "0.5")],
    *[call("A21", {"strength": value}, NO_STEP, task=INPAINT) for value in (0.0, math.nan, 1.5)],
    as_image("A22", "an image of 1×1", PIL.Image.new("RGB", (1, 1)), IMAGES_SAY),
    as_image("A22", "an image of 0×0", PIL.Image.new("RGB", (0, 0)), IMAGES_SAY),
    as_image("A22", "an image of 0×0", PIL.Image.new("RGB", (0, 0)), IMAGES_SAY, task=INPAINT),
    *[converted(mode) for mode in ("L", "P", "1", "LA", "YCbCr")],
    as_image("A22", "an image in mode I;16", SIXTEEN, "mode", like=EIGHT.convert("RGB"), right="accept"),
    as_image("A22", "an image in mode F", EIGHT.convert("F"), "mode, range", like=EIGHT.convert("RGB"), right="either"),
    as_image("A22", "no image", None, "must, none, needs, support", right="either"),
    as_image("A22", "a path", "cat.png", "type, must be, support"),
    as_image("A23", "RGBA", transparent(), "mode, channel, rgba", like=PICTURE, right="either"),
    as_image("A23", "RGBA", transparent(), "mode, channel, rgba", task=INPAINT, like=PICTURE, right="either"),
    converted("CMYK", "A23", right="either"),
    as_image("A23", "4 channels in NumPy", np.dstack((UNIT, UNIT[:, :, :1])), "channel, shape"),
    as_image("A23", "2 channels in NumPy", UNIT[:, :, :2], "channel, shape"),
    as_image("A24", "float array in 0..255", np.asarray(PICTURE, np.float32), "range, 0..1, [0, 1], between"),
    as_image(
        "A24",
        "float array in 0..255",
        np.asarray(PICTURE, np.float32),
        "range, 0..1, [0, 1], between",
        task=INPAINT,
    ),
    as_image("A24", "uint8 array", _pixels(), "range, 0..1, [0, 1], dtype, uint8", like=PICTURE, right="either"),
    as_image("A24", "an image with NaN", spoiled(UNIT, math.nan), FINITE + ", 0..1"),
    as_image("A24", "an image with infinity", spoiled(UNIT, math.inf), FINITE + ", 0..1"),
    as_image("A24", "an image with NaN", spoiled(UNIT, math.nan), FINITE + ", 0..1", task=INPAINT),
    as_image("A24", "a tensor with NaN", torch.full((1, 3, SIDE, SIDE), math.nan), FINITE + ", 0..1"),
    as_image("A24", "3 images for 1 prompt", [PICTURE] * 3, COUNT),
    as_image("A24", "images of two sizes", [PICTURE, PICTURE.resize((32, 32))], SHAPE),
    as_image(
        "A24",
        "an image of 65×67",
        PICTURE.resize((65, 67)),
        "multiple, divisible, resize",
        like=PICTURE.resize((65, 67)).resize((64, 64), PIL.Image.Resampling.LANCZOS),
        right="either",
    ),
    as_mask("a mask of half the size", MASK.resize((32, 32)), SHAPE + ", 32", like=MASK, right="either"),
    as_mask("2 masks for 1 image", [MASK] * 2, COUNT + ", masks for"),
    as_mask("a mask with NaN", np.full((SIDE, SIDE), math.nan, np.float32), FINITE + ", 0..1"),
    as_mask("a mask in 0..255", np.asarray(MASK, np.float32), "0..1, [0, 1], range", like=MASK, right="either"),
    as_mask("a mask of 3 prompts' images", torch.zeros(3, 1, SIDE, SIDE), COUNT + ", masks for"),
    as_mask("no mask", None, "must, none, needs, support", right="either"),
]

ARGUMENTS: Sequence[Call] = sorted(
    [*SIZES, *COUNTS, *WORDS, *SCALES, *TENSORS, *NAMES, *PICTURES], key=lambda case: case.fault
)
