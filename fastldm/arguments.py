"""The arguments of a call: as they were passed, and one check for each kind. What holds between them: request.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastldm.errors import ArgumentError, brief
from fastldm.image import MAX_COUNT

MAX_PROMPT_BYTES = 64 << 10
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = MAX_COUNT
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_TOKENS = 1024  # of given embeddings
MAX_NOISE = 1e4  # of given latents, whose variance is 1; what a run makes of far more is not finite
MAX_SEED = 2**63 - 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Arguments:
    """What a caller passed, unchecked: `Pipeline.__call__` has their meaning and their defaults."""

    prompt: object = None
    negative_prompt: object = None
    image: object = None
    mask_image: object = None
    strength: object = None
    height: object = None
    width: object = None
    num_inference_steps: object = None
    timesteps: object = None
    sigmas: object = None
    guidance_scale: object = None
    guidance_rescale: object = 0.0
    guidance_interval: object = None
    image_guidance_scale: object = None
    num_images_per_prompt: object = 1
    eta: object = 0.0
    generator: object = None
    seed: object = None
    latents: object = None
    prompt_embeds: object = None
    negative_prompt_embeds: object = None
    clip_skip: object = None
    masked_image_latents: object = None
    padding_mask_crop: object = None
    overlay: object = False
    output_type: object = "pil"
    return_dict: object = True
    callback_on_step_end: object = None
    callback_on_step_end_tensor_inputs: object = ("latents",)
    cancel: object = None


def wrong(name: str, value: object, reason: str) -> ArgumentError:
    return ArgumentError(f"{name} = {brief(value)}: {reason}", field=name)


def scalar(value: object) -> int | float | None:
    """A number, also NumPy's or a tensor's without dimensions; None for what is none, bools and strings among them."""
    if isinstance(value, Tensor) and not is_plain(value):
        return None
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's values can be read: not on meta, not sparse, not nested."""
    return not t.is_meta and not t.is_nested and t.layout == torch.strided


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, value, "must be True or False")
    return bool(value)


def integer(name: str, value: object, low: int, high: int) -> int:
    found = scalar(value)
    if not isinstance(found, int) or not low <= found <= high:
        raise wrong(name, value, f"must be an integer from {low} to {high}")
    return found


def number(name: str, value: object, low: float, high: float) -> float:
    found = scalar(value)
    if found is None or not low <= found <= high:  # NaN is not
        raise wrong(name, value, f"must be a number from {low:g} to {high:g}")
    return float(found)


def numbers(name: str, value: object) -> tuple[float, ...] | None:
    """Timesteps or sigmas of the caller's own."""
    if value is None:
        return None
    if isinstance(value, Tensor) and is_plain(value):
        value = value.tolist()
    values = value.tolist() if isinstance(value, np.ndarray) else value
    most = MAX_STEPS + (name == "sigmas")  # some samplers take the one behind the last step, too
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= most:
        raise wrong(name, value, f"must be a list of 1 to {most} numbers")
    return tuple(number(name, v, 0, 1e6) for v in values)


def texts(name: str, value: object, most: int = MAX_IMAGES) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found:
        raise wrong(name, value, "must be a string or a list of strings")
    if len(found) > most:
        raise wrong(name, value, f"has {len(found)} texts, over {most}")
    return tuple(_text(name, text) for text in found)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "must be a string or a list of strings")
    if len(value) > MAX_PROMPT_BYTES:
        raise wrong(name, value[:80], f"has {len(value)} characters, over {MAX_PROMPT_BYTES}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise wrong(name, value, f"has half of a surrogate pair at position {error.start}") from None
    if size > MAX_PROMPT_BYTES:
        raise wrong(name, value[:80], f"has {size} bytes, over {MAX_PROMPT_BYTES}")
    return value


def generators(value: object, batch: int, device: torch.device) -> Generators:
    """One, or one for each image; on the CPU or on the pipeline's device."""
    if value is None:
        return None
    found = [value] if isinstance(value, torch.Generator) else value
    if not isinstance(found, list | tuple) or not all(isinstance(g, torch.Generator) for g in found):
        raise wrong("generator", value, "must be a torch.Generator, a list of them, or None; a number is seed=")
    if len(found) not in (1, batch):
        raise wrong("generator", value, f"has {len(found)} entries for {batch} images")
    strange = next((g.device for g in found if g.device.type not in ("cpu", device.type)), None)
    if strange is not None:
        raise wrong("generator", value, f"is on {strange}, the pipeline on {device}: use one on the CPU or there")
    return value if isinstance(value, torch.Generator) else list(found)


def seeded(value: object, batch: int) -> Generators:
    """A generator for each image, seeded with value + k for image k, or with a list's own seeds."""
    if isinstance(value, list | tuple):
        if len(value) != batch:
            raise wrong("seed", value, f"has {len(value)} entries for {batch} images")
        seeds = [integer("seed", seed, 0, MAX_SEED) for seed in value]
    else:
        first = integer("seed", value, 0, MAX_SEED + 1 - batch)
        seeds = list(range(first, first + batch))
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tensor(name: str, value: object, shape: Sequence[int]) -> Tensor | None:
    """A dense, finite tensor of floats of that shape."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in FLOATS or not is_plain(value):
        raise ArgumentError(f"{name}: must be a dense floating-point tensor, not {_form(value)}", field=name)
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{name}: has shape {tuple(value.shape)}, must have {tuple(shape)}", field=name)
    if not bool(torch.isfinite(value.float()).all()):
        raise ArgumentError(f"{name}: holds NaN, infinity or what float32 cannot hold", field=name)
    return value.detach()


def _form(value: object) -> str:
    """What keeps it from being a dense tensor of floats."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.dtype not in FLOATS:
        return str(value.dtype)
    return "one on meta" if value.is_meta else "a nested one" if value.is_nested else str(value.layout)
