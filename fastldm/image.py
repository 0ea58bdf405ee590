"""Images in and out: PIL, NumPy, tensors; masks; crops; canvases."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastldm.errors import ArgumentError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SIDE = 4096
Images = list[PIL.Image.Image] | NDArray[np.float32] | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")

# ------------------------------------------------------------------------------------------------------------------ out


def to_unit(pixels: Tensor) -> Tensor:
    """From the decoder's range, about −1..1, to 0..1."""
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def to_output(unit: Tensor, output_type: str) -> Images:
    """unit: (B, C, H, W) in 0..1.

    "pil": a list of images, rounded to 8 bits; "np": (B, H, W, C) float32; "pt": as it is.
    """
    if output_type == "pt":
        return unit
    array: NDArray[np.float32] = unit.permute(0, 2, 3, 1).to("cpu", torch.float32).contiguous().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: NDArray[np.float32]) -> list[PIL.Image.Image]:
    """(B, H, W, C) in 0..1, C = 1 or 3 -> 8-bit images, "L" or "RGB"."""
    eight_bit = (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in eight_bit]


# ------------------------------------------------------------------------------------------------------------------- in


def read_images(value: object, name: str, *, channels: int) -> list[Tensor]:
    """What people hand over as images, each as (channels, H, W) float32 in 0..1.

    value: a PIL image of any mode (alpha is dropped, 16 bits keep their precision), an array (H, W), (H, W, C) or
    (B, H, W, C), a tensor (H, W), (C, H, W) or (B, C, H, W), or a list of them. Floats are in 0..1, uint8 in 0..255.
    channels: 3 for images; 1 for masks, to which colours are converted. Four channels are never taken for latents.
    Raises `ArgumentError` naming the argument.
    """
    values = value if isinstance(value, list | tuple) else [value]
    images = [image for v in values for image in _read(v, name, channels)]
    if not images:
        raise ArgumentError(f"{name}: holds no image", field=name)
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}×{h}" for h, w in sorted(shapes))
        raise ArgumentError(f"{name}: the images have different sizes: {sizes}", field=name)
    return images


def _read(value: object, name: str, channels: int) -> list[Tensor]:
    if isinstance(value, PIL.Image.Image):
        return [_from_array(_pil_array(value, name, channels), name, channels)]
    if isinstance(value, np.ndarray):
        stack = value if value.ndim == 4 else value[None]
        return [_from_array(image, name, channels) for image in stack]
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        batch = tensor if tensor.ndim == 4 else tensor[None]
        batch = batch.movedim(1, -1) if batch.ndim == 4 else batch
        return [_from_array(image.numpy(), name, channels) for image in batch]
    raise ArgumentError(f"{name}: must be a PIL image, an array or a tensor, not {type(value).__name__}", field=name)


def _pil_array(image: PIL.Image.Image, name: str, channels: int) -> NDArray[Any]:
    if image.mode == "F":
        raise ArgumentError(f"{name}: has mode 'F', whose range is not known; pass an array in 0..1", field=name)
    if image.mode in SIXTEEN_BIT:
        return np.asarray(image).astype(np.float32).clip(0, 65535) / 65535
    return np.asarray(image.convert("L" if channels == 1 else "RGB"))


def _from_array(array: NDArray[Any], name: str, channels: int) -> Tensor:
    """(H, W) or (H, W, C) -> (channels, H, W) in 0..1."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ArgumentError(f"{name}: has shape {array.shape}, must be an image of 1 or 3 channels", field=name)
    if max(array.shape[:2]) > MAX_SIDE:
        raise ArgumentError(f"{name}: {array.shape[1]}×{array.shape[0]} is over {MAX_SIDE} pixels a side", field=name)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    elif array.dtype == np.bool_:
        array = array.astype(np.float32)
    elif not np.issubdtype(array.dtype, np.floating):
        raise ArgumentError(f"{name}: has dtype {array.dtype}, must be uint8 or floating-point", field=name)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise ArgumentError(f"{name}: has values from {low:g} to {high:g}, must be in 0..1", field=name)
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).permute(2, 0, 1)
    if channels == 1 and len(image) == 3:  # ITU-R BT.601 luma, as PIL's "L"
        image = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
    return image.expand(channels, -1, -1)


def resized(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """By Lanczos' filter. 16-bit images, which it does not know, come back as 8-bit ones."""
    if image.mode in SIXTEEN_BIT:
        image = PIL.Image.fromarray((_pil_array(image, "image", 1) * 255).round().astype(np.uint8))
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------- crops and overlays


def crop_box(mask: PIL.Image.Image, width: int, height: int, padding: int) -> Box:
    """The box around the painted part of a mask, `padding` pixels wider, in the shape of width × height.

    It is moved into the image where it reaches out of it, and cut where it is larger than the image.
    """
    painted = mask.convert("L").getbbox() or (0, 0, mask.width, mask.height)
    left, top = max(painted[0] - padding, 0), max(painted[1] - padding, 0)
    right, bottom = min(painted[2] + padding, mask.width), min(painted[3] + padding, mask.height)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _grown(top, bottom, int((right - left) * height / width), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * width / height), mask.width)
    return left, top, right, bottom


def _grown(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """The interval start..stop grown around its middle to `length`, within 0..limit."""
    start -= (length - (stop - start)) // 2
    start = max(min(start, limit - length), 0)
    return start, min(start + length, limit)


def filled(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Resized to fit into width × height, the rest filled with the image's border pixels."""
    if width / height < image.width / image.height:
        inner = (width, image.height * width // image.width)
    else:
        inner = (image.width * height // image.height, height)
    small = np.asarray(resized(image, *inner))
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    pads = [(top, height - inner[1] - top), (left, width - inner[0] - left)] + [(0, 0)] * (small.ndim - 2)
    return PIL.Image.fromarray(np.pad(small, pads, mode="edge"))


def overlaid(original: PIL.Image.Image, painted: PIL.Image.Image, mask: PIL.Image.Image, box: Box) -> PIL.Image.Image:
    """`painted` (into `box` of the original) where the mask is white, the original's own bits where it is black."""
    base = original.convert("RGB")
    layer = base.copy()
    left, top, right, bottom = box
    layer.paste(_covering(painted, right - left, bottom - top), (left, top))
    return PIL.Image.composite(layer, base, mask.convert("L"))


def _covering(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Resized to cover width × height, what sticks out cut on both sides: takes back what `filled` did."""
    if width / height > image.width / image.height:
        outer = (width, image.height * width // image.width)
    else:
        outer = (image.width * height // image.height, height)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return resized(image, *outer).crop((left, top, left + width, top + height))


def outpaint_canvas(
    image: PIL.Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """A larger canvas around `image`, and the mask of what is to be painted, for inpainting.

    left, top, right, bottom: pixels to add on each side, 0 to 4096. The border repeats the image's edge: colours
    for the model to start from. -> (canvas "RGB", mask "L": 255 on the new border, 0 on the image).
    Raises `ArgumentError` naming the side.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, value in sides.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIDE:
            raise ArgumentError(f"{name} = {value!r}: must be an integer from 0 to {MAX_SIDE}", field=name)
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[0] + top + bottom, pixels.shape[1] + left + right
    if max(height, width) > MAX_SIDE:
        raise ArgumentError(f"image: the canvas of {width}×{height} is over {MAX_SIDE} pixels a side", field="image")
    canvas = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return PIL.Image.fromarray(canvas), PIL.Image.fromarray(mask)
