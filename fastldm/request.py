"""The validated call: every argument checked once, by name, before any work."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ArgumentError
from fastldm.image import OUTPUT_TYPES

MAX_PROMPT_BYTES = 64 << 10
MAX_SIDE = 4096
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = 16
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Geometry:
    """What a model prescribes: channels of its latents, pixels per latent pixel, its default side in pixels."""

    channels: int
    factor: int
    side: int


@dataclass(frozen=True)
class Request:
    """One call, checked. There are `batch` images: `images_per_prompt` for each prompt, one prompt after the other."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    images_per_prompt: int
    eta: float
    generator: Generators
    latents: Tensor | None
    output_type: str

    @property
    def batch(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is computed: arXiv 2207.12598 with s = 1 is the conditional one alone."""
        return self.guidance_scale > 1


def text_to_image(
    geometry: Geometry,
    *,
    prompt: object,
    negative_prompt: object,
    height: object,
    width: object,
    num_inference_steps: object,
    guidance_scale: object,
    guidance_rescale: object,
    num_images_per_prompt: object,
    eta: object,
    generator: object,
    latents: object,
    output_type: object,
) -> Request:
    """Raises `ArgumentError` naming the argument, its value and what it may be."""
    prompts = _prompts("prompt", prompt)
    images = _integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    batch = len(prompts) * images
    if batch > MAX_IMAGES:
        raise _wrong("num_images_per_prompt", images, f"{len(prompts)} prompts make {batch} images, over {MAX_IMAGES}")
    size = _size(geometry, height, width)
    if output_type not in OUTPUT_TYPES:
        raise _wrong("output_type", output_type, f"must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
    return Request(
        prompts=prompts,
        negative_prompts=_negative_prompts(negative_prompt, len(prompts)),
        height=size[0],
        width=size[1],
        steps=_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS),
        guidance_scale=_number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE),
        guidance_rescale=_number("guidance_rescale", guidance_rescale, 0, 1),
        images_per_prompt=images,
        eta=_number("eta", eta, 0, 1),
        generator=_generator(generator, batch),
        latents=_latents(latents, (batch, geometry.channels, *(side // geometry.factor for side in size))),
        output_type=str(output_type),
    )


# ------------------------------------------------------------------------------------------------- one kind of argument


def _wrong(name: str, value: object, reason: str) -> ArgumentError:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return ArgumentError(f"{name} = {text if len(text) <= 80 else text[:77] + '...'}: {reason}", field=name)


def _integer(name: str, value: object, low: int, high: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise _wrong(name, value, f"must be an integer from {low} to {high}")
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not low <= number <= high:
        raise _wrong(name, value, f"must be a number from {low:g} to {high:g}")
    return number


def _prompts(name: str, value: object) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list | tuple) or not prompts:
        raise _wrong(name, value, "must be a string or a list of strings")
    if len(prompts) > MAX_IMAGES:
        raise _wrong(name, value, f"has {len(prompts)} prompts, over {MAX_IMAGES}")
    return tuple(_prompt(name, p) for p in prompts)


def _prompt(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "must be a string or a list of strings")
    if len(value) > MAX_PROMPT_BYTES:
        raise _wrong(name, value[:80], f"has {len(value)} characters, over {MAX_PROMPT_BYTES}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise _wrong(name, value, f"has half of a surrogate pair at position {error.start}") from None
    if size > MAX_PROMPT_BYTES:
        raise _wrong(name, value[:80], f"has {size} bytes, over {MAX_PROMPT_BYTES}")
    return value


def _negative_prompts(value: object, count: int) -> tuple[str, ...]:
    if value is None:
        return ("",) * count
    prompts = _prompts("negative_prompt", value)
    if isinstance(value, str):
        return prompts * count
    if len(prompts) != count:
        raise _wrong("negative_prompt", value, f"has {len(prompts)} entries for {count} prompts")
    return prompts


def _size(geometry: Geometry, height: object, width: object) -> tuple[int, int]:
    sides = []
    for name, value in (("height", height), ("width", width)):
        side = geometry.side if value is None else _integer(name, value, geometry.factor, MAX_SIDE)
        if side % geometry.factor:
            raise _wrong(name, value, f"must be a multiple of {geometry.factor}")
        sides.append(side)
    if sides[0] * sides[1] > MAX_PIXELS:
        raise _wrong("height", height, f"{sides[0]}×{sides[1]} is over {MAX_PIXELS} pixels")
    return sides[0], sides[1]


def _generator(value: object, batch: int) -> Generators:
    if value is None or isinstance(value, torch.Generator):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(g, torch.Generator) for g in value):
        raise _wrong("generator", value, "must be a torch.Generator, a list of them, or None")
    if len(value) not in (1, batch):
        raise _wrong("generator", value, f"has {len(value)} entries for {batch} images")
    return list(value)


def _latents(value: object, shape: Sequence[int]) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind: Any = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"latents: must be a floating-point tensor, not {kind}", field="latents")
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"latents: have shape {tuple(value.shape)}, must have {tuple(shape)}", field="latents")
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError("latents: hold NaN or infinity", field="latents")
    return value.detach()
