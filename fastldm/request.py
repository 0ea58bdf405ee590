"""The validated call: every argument checked once, by name, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import ArgumentError, brief
from fastldm.image import MAX_COUNT, MAX_SIDE, OUTPUT_TYPES
from fastldm.source import Source, read_source

MAX_PROMPT_BYTES = 64 << 10
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = MAX_COUNT
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Generators = torch.Generator | list[torch.Generator] | None
Task = Literal["text_to_image", "image_to_image", "inpaint", "instruct"]


@dataclass(frozen=True)
class Geometry:
    """What a model prescribes."""

    channels: int  # of its latents
    extra_channels: int  # that its U-Net reads behind them: a mask and an image, an image, or none
    factor: int  # pixels per latent pixel, along one side
    side: int  # pixels of an image where nobody says otherwise

    @property
    def task(self) -> Task | None:
        """The one task of a U-Net with extra channels; None where it has none and serves all others."""
        return {0: None, self.channels: "instruct"}.get(self.extra_channels, "inpaint")


@dataclass(frozen=True)
class Request:
    """One call, checked. There are `batch` images: `images_per_prompt` for each prompt, one prompt after the other."""

    task: Task
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int
    width: int
    steps: int
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    guidance_scale: float
    guidance_rescale: float
    image_guidance_scale: float
    images_per_prompt: int
    eta: float
    generator: Generators
    latents: Tensor | None
    source: Source | None
    masked_image_latents: Tensor | None
    output_type: str

    @property
    def batch(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether unconditional branches are computed: guidance of 1 is the conditional branch alone."""
        return self.guidance_scale > 1 and (self.task != "instruct" or self.image_guidance_scale >= 1)

    def begin(self, steps: int) -> int:
        """The first of `steps` steps that is run: with strength s, the last int(s · steps) are."""
        strength = 1.0 if self.source is None else self.source.strength
        if int(steps * strength) < 1:
            raise _wrong("strength", strength, f"leaves none of {steps} steps")
        return steps - int(steps * strength)


@dataclass(frozen=True)
class Defaults:
    steps: int
    strength: float


DEFAULTS: dict[Task, Defaults] = {
    "text_to_image": Defaults(steps=50, strength=1.0),
    "image_to_image": Defaults(steps=50, strength=0.8),
    "inpaint": Defaults(steps=50, strength=1.0),
    "instruct": Defaults(steps=100, strength=1.0),
}


def checked(
    geometry: Geometry,
    *,
    prompt: object,
    negative_prompt: object,
    image: object,
    mask_image: object,
    strength: object,
    height: object,
    width: object,
    num_inference_steps: object,
    timesteps: object,
    sigmas: object,
    guidance_scale: object,
    guidance_rescale: object,
    image_guidance_scale: object,
    num_images_per_prompt: object,
    eta: object,
    generator: object,
    latents: object,
    masked_image_latents: object,
    padding_mask_crop: object,
    overlay: object,
    output_type: object,
) -> Request:
    """Raises `ArgumentError` naming the argument, its value and what it may be."""
    prompts = _prompts("prompt", prompt)
    images = _integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    batch = len(prompts) * images
    if batch > MAX_IMAGES:
        raise _wrong("num_images_per_prompt", images, f"{len(prompts)} prompts make {batch} images, over {MAX_IMAGES}")
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise _wrong("output_type", output_type, f"must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
    task = _task(geometry, image, mask_image)
    steps, given_timesteps, given_sigmas = _schedule(task, num_inference_steps, timesteps, sigmas)
    _only_with(task, ("inpaint",), padding_mask_crop=padding_mask_crop, masked_image_latents=masked_image_latents)
    kept = _flag("overlay", overlay)
    _only_with(task, ("inpaint",), overlay=kept or None)
    _only_with(task, ("image_to_image", "inpaint"), strength=strength)
    _only_with(task, ("instruct",), image_guidance_scale=image_guidance_scale)
    size = _size(geometry, height, width)
    source = None
    if task != "text_to_image":
        own_size = height is None and width is None and padding_mask_crop is None
        source = read_source(
            geometry,
            image=image,
            mask_image=mask_image,
            strength=_strength(task, strength),
            size=None if own_size else size,
            padding_mask_crop=_padding(padding_mask_crop, output_type),
            overlay=_overlay(kept, output_type),
        )
        _check_counts(source, len(prompts))
        size = source.size
    shape = (geometry.channels, *(side // geometry.factor for side in size))
    asked = Request(
        task=task,
        prompts=prompts,
        negative_prompts=_negative_prompts(negative_prompt, len(prompts)),
        height=size[0],
        width=size[1],
        steps=steps,
        timesteps=given_timesteps,
        sigmas=given_sigmas,
        guidance_scale=_number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE),
        guidance_rescale=_number("guidance_rescale", guidance_rescale, 0, 1),
        image_guidance_scale=_number(
            "image_guidance_scale", 1.5 if image_guidance_scale is None else image_guidance_scale, 0, MAX_GUIDANCE
        ),
        images_per_prompt=images,
        eta=_number("eta", eta, 0, 1),
        generator=_generator(generator, batch),
        latents=_first_latents(latents, (batch, *shape), task, source),
        source=source,
        masked_image_latents=_masked_latents(masked_image_latents, geometry, shape, len(prompts)),
        output_type=str(output_type),
    )
    if timesteps is None and sigmas is None:
        asked.begin(steps)
    return asked


def _task(geometry: Geometry, image: object, mask_image: object) -> Task:
    """What is asked for, by which images are given and what the model's input channels are for."""
    if image is None and mask_image is not None:
        raise _wrong("image", None, "a mask needs the image that it is laid on")
    if geometry.task == "inpaint" and mask_image is None:
        raise _wrong("mask_image", None, "this model's U-Net was trained for inpainting: it needs image and mask_image")
    if geometry.task == "instruct" and image is None:
        raise _wrong("image", None, "this model's U-Net was trained to edit images: it needs one")
    if geometry.task == "instruct" and mask_image is not None:
        raise ArgumentError("mask_image: this model edits whole images and takes no mask", field="mask_image")
    if geometry.task is not None:
        return geometry.task
    if mask_image is not None:
        return "inpaint"
    return "text_to_image" if image is None else "image_to_image"


def _only_with(task: Task, tasks: tuple[Task, ...], **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and task not in tasks:
            raise ArgumentError(f"{name}: belongs to {' and '.join(tasks)}, this call is {task}", field=name)


def _schedule(
    task: Task, steps: object, timesteps: object, sigmas: object
) -> tuple[int, tuple[float, ...] | None, tuple[float, ...] | None]:
    """The number of steps, and the caller's own schedule where one is given."""
    if timesteps is not None and sigmas is not None:
        raise ArgumentError("timesteps: give timesteps or sigmas, not both", field="timesteps")
    number = _integer("num_inference_steps", DEFAULTS[task].steps if steps is None else steps, 1, MAX_STEPS)
    own = {"timesteps": _numbers("timesteps", timesteps), "sigmas": _numbers("sigmas", sigmas)}
    count = next((min(len(values), MAX_STEPS) for values in own.values() if values is not None), number)
    return count, own["timesteps"], own["sigmas"]


def _numbers(name: str, value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, Tensor) and _is_plain(value):
        value = value.tolist()
    values = value.tolist() if isinstance(value, np.ndarray) else value
    most = MAX_STEPS + (name == "sigmas")  # some samplers take the one behind the last step, too
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= most:
        raise _wrong(name, value, f"must be a list of 1 to {most} numbers")
    return tuple(_number(name, v, 0, 1e6) for v in values)


def _strength(task: Task, value: object) -> float:
    return _number("strength", DEFAULTS[task].strength if value is None else value, 0, 1)


def _overlay(value: bool, output_type: str) -> bool:
    if value and output_type == "latent":
        raise _wrong("overlay", value, "needs pixels, output_type is 'latent'")
    return value


def _padding(value: object, output_type: str) -> int | None:
    if value is None:
        return None
    if output_type != "pil":
        raise _wrong("output_type", output_type, "must be 'pil' with padding_mask_crop")
    return _integer("padding_mask_crop", value, 0, MAX_SIDE)


def _check_counts(source: Source, prompts: int) -> None:
    if len(source.pixels) not in (1, prompts):
        raise ArgumentError(f"image: {len(source.pixels)} images for {prompts} prompts", field="image")


def _first_latents(value: object, shape: Sequence[int], task: Task, source: Source | None) -> Tensor | None:
    if value is not None and source is not None and (task == "image_to_image" or source.strength < 1):
        raise ArgumentError("latents: the run starts from the image, with noise from `generator`", field="latents")
    return _latents("latents", value, shape)


def _masked_latents(value: object, geometry: Geometry, shape: Sequence[int], prompts: int) -> Tensor | None:
    if value is None:
        return None
    if geometry.task != "inpaint":
        raise ArgumentError("masked_image_latents: this model's U-Net does not read them", field="masked_image_latents")
    count = len(value) if isinstance(value, Tensor) and value.ndim and len(value) in (1, prompts) else 1
    return _latents("masked_image_latents", value, (count, *shape))


# ------------------------------------------------------------------------------------------------- one kind of argument


def _wrong(name: str, value: object, reason: str) -> ArgumentError:
    return ArgumentError(f"{name} = {brief(value)}: {reason}", field=name)


def _scalar(value: object) -> int | float | None:
    """A number, also NumPy's or a tensor's without dimensions; None for what is none, bools and strings among them."""
    if isinstance(value, Tensor) and not _is_plain(value):
        return None
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, "must be True or False")
    return bool(value)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor's values can be read: not on meta, not sparse."""
    return not t.is_meta and t.layout == torch.strided


def _integer(name: str, value: object, low: int, high: int) -> int:
    number = _scalar(value)
    if not isinstance(number, int) or not low <= number <= high:
        raise _wrong(name, value, f"must be an integer from {low} to {high}")
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    number = _scalar(value)
    if number is None or not low <= number <= high:  # NaN is not
        raise _wrong(name, value, f"must be a number from {low:g} to {high:g}")
    return float(number)


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


def _latents(name: str, value: object, shape: Sequence[int]) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.layout != torch.strided or value.is_meta:
        kind: Any = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{name}: must be a dense floating-point tensor, not {kind}", field=name)
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{name}: have shape {tuple(value.shape)}, must have {tuple(shape)}", field=name)
    if not bool(torch.isfinite(value.float()).all()):
        raise ArgumentError(f"{name}: hold NaN, infinity or what float32 cannot hold", field=name)
    return value.detach()
