"""Images in and out: PIL, NumPy, tensors; masks; crops; canvases."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastldm.errors import ArgumentError, brief

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SIDE = 4096
MAX_COUNT = 16  # images of one argument: one for each prompt
Images = list[PIL.Image.Image] | NDArray[np.float32] | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")

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
    return uint8_to_pil((array * 255).round().astype(np.uint8))


def uint8_to_pil(array: NDArray[np.uint8]) -> list[PIL.Image.Image]:
    """(B, H, W, C), C = 1 or 3 -> 8-bit images, "L" or "RGB"."""
    return [PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in array]


def numpy_to_pil(images: NDArray[Any]) -> list[PIL.Image.Image]:
    """(H, W, C) or (B, H, W, C), C = 1 or 3, floats in 0..1 or uint8 -> 8-bit images, "L" or "RGB".

    Raises `ArgumentError` naming `images`.
    """
    if not isinstance(images, np.ndarray):
        raise ArgumentError(f"images: must be an array, not {type(images).__name__!r}", field="images")
    stack = images[None] if images.ndim == 3 else images
    if stack.ndim != 4 or stack.shape[-1] not in (1, 3) or 0 in stack.shape:
        reason = f"has shape {images.shape}, must have (H, W, C) or (B, H, W, C), C = 1 or 3"
        raise ArgumentError(f"images: {reason}", field="images")
    if stack.dtype == np.uint8:
        return uint8_to_pil(stack)
    if not np.issubdtype(stack.dtype, np.floating):
        raise ArgumentError(f"images: has dtype {stack.dtype}, must be uint8 or floating-point", field="images")
    if not (stack.min() >= 0 and stack.max() <= 1):  # NaN is not
        raise ArgumentError(f"images: holds {stack.min():g} to {stack.max():g}, must be in 0..1", field="images")
    return to_pil(stack)


# ------------------------------------------------------------------------------------------------------------------- in


def read_images(value: object, name: str, *, channels: int) -> list[Tensor]:
    """What people hand over as images, each as (channels, H, W) float32 in 0..1.

    value: a PIL image of any mode (alpha is dropped, 16 bits keep their precision), an array (H, W), (H, W, C) or
    (B, H, W, C), a tensor (H, W), (C, H, W) or (B, C, H, W), or a list of them. Floats are in 0..1, uint8 in 0..255.
    channels: 3 for images; 1 for masks, to which colours are converted. Four channels are never taken for latents.
    Raises `ArgumentError` naming the argument.
    """
    values = value if isinstance(value, list | tuple) else [value]
    _check_count(len(values), name)
    images = [image for v in values for image in _read(v, name, channels)]
    _check_count(len(images), name)
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}×{h}" for h, w in sorted(shapes))
        raise ArgumentError(f"{name}: the images have different sizes: {sizes}", field=name)
    return images


def _check_count(count: int, name: str) -> None:
    if not 1 <= count <= MAX_COUNT:
        raise ArgumentError(f"{name}: holds {count} images, must hold 1 to {MAX_COUNT}", field=name)


def _read(value: object, name: str, channels: int) -> list[Tensor]:
    if isinstance(value, PIL.Image.Image):
        _check_sides(value.width, value.height, name)
        return [_from_array(_pil_array(value, name, channels), name, channels)]
    if not isinstance(value, np.ndarray | Tensor):
        kind = type(value).__name__
        raise ArgumentError(f"{name}: must be a PIL image, an array or a tensor, not {kind}", field=name)
    array = _tensor_array(value, name) if isinstance(value, Tensor) else value
    stack = array if array.ndim == 4 else array[:, :, None][None] if array.ndim == 2 else array[None]
    if stack.ndim != 4 or stack.shape[-1] not in (1, 3) or 0 in stack.shape:
        order = "(B, C, H, W)" if isinstance(value, Tensor) else "(B, H, W, C)"
        raise ArgumentError(
            f"{name}: has shape {tuple(value.shape)}, must be images of 1 or 3 channels, {order}", field=name
        )
    _check_sides(stack.shape[2], stack.shape[1], name)
    _check_count(len(stack), name)
    return [_from_array(image, name, channels) for image in stack]


def _check_sides(width: int, height: int, name: str) -> None:
    if max(width, height) > MAX_SIDE:
        raise ArgumentError(f"{name}: {width}×{height} is over {MAX_SIDE} pixels a side", field=name)


def _tensor_array(value: Tensor, name: str) -> NDArray[Any]:
    """(H, W), (H, W, C) or (B, H, W, C), as arrays have it."""
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout)
        raise ArgumentError(f"{name}: must be a dense tensor that holds data, not a {kind} one", field=name)
    if not value.is_floating_point() and value.dtype not in (torch.uint8, torch.bool):
        raise ArgumentError(f"{name}: has dtype {value.dtype}, must be uint8 or floating-point", field=name)
    tensor = value.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor.movedim(-3, -1) if tensor.ndim in (3, 4) else tensor).numpy()


def _pil_array(image: PIL.Image.Image, name: str, channels: int) -> NDArray[Any]:
    """(H, W) or (H, W, C): uint8, or 16 bits as float32 in 0..1."""
    load(image, name)
    if image.mode not in SIXTEEN_BIT:
        return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 65535):
        raise ArgumentError(
            f"{name}: has mode {image.mode!r} with values from {values.min()} to {values.max()}, must be in 0..65535",
            field=name,
        )
    return values.astype(np.float32) / 65535


def load(image: PIL.Image.Image, name: str) -> None:
    """Reads the file behind an image. Refuses what holds no pixels, or pixels of an unknown range."""
    if 0 in image.size:
        raise ArgumentError(f"{name}: is {image.width}×{image.height}, holds no pixels", field=name)
    if image.mode == "F":
        raise ArgumentError(f"{name}: has mode 'F', whose range is not known; pass an array in 0..1", field=name)
    if image.mode not in EIGHT_BIT + SIXTEEN_BIT:
        raise ArgumentError(f"{name}: has mode {image.mode!r}, must be one of {', '.join(EIGHT_BIT)}", field=name)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:  # a file that is cut off, closed, or damaged
        raise ArgumentError(f"{name}: cannot be read: {brief(str(error))}", field=name) from error


def _from_array(array: NDArray[Any], name: str, channels: int) -> Tensor:
    """(H, W) or (H, W, C) -> (channels, H, W) in 0..1."""
    array = array[:, :, None] if array.ndim == 2 else array
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


def as_rgb8(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """In mode "RGB": alpha is dropped, 16 bits are rounded to 8 (PIL's `convert` clips them at 255)."""
    return _eight_bit(image, name).convert("RGB")


def as_mask8(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """In mode "L", likewise."""
    return _eight_bit(image, name).convert("L")


def resized(image: PIL.Image.Image, width: int, height: int, name: str) -> PIL.Image.Image:
    """By Lanczos' filter, or by the nearest pixel in mode "1". -> mode "1", "L" or "RGB".

    Images of 16 bits are rounded to 8 first; what is not resized keeps them.
    """
    return _eight_bit(image, name).resize((width, height), PIL.Image.Resampling.LANCZOS)


def _eight_bit(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """In mode "1", "L" or "RGB"."""
    load(image, name)
    if image.mode in SIXTEEN_BIT:
        return PIL.Image.fromarray((_pil_array(image, name, 1) * 255).round().astype(np.uint8))
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


# --------------------------------------------------------------------------------------------------- crops and overlays


def crop_box(mask: PIL.Image.Image, width: int, height: int, padding: int) -> Box:
    """The box around the painted part of a mask, `padding` pixels wider, in the shape of width × height.

    It is moved into the image where it reaches out of it, and cut where it is larger than the image.
    """
    painted = as_mask8(mask, "mask_image").getbbox() or (0, 0, mask.width, mask.height)
    left, top = max(painted[0] - padding, 0), max(painted[1] - padding, 0)
    right, bottom = min(painted[2] + padding, mask.width), min(painted[3] + padding, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _grown(left, right, (bottom - top) * ratio, mask.width)
    return left, top, right, bottom


def _grown(start: int, stop: int, length: float, limit: int) -> tuple[int, int]:
    """The interval start..stop grown around its middle to `length`, within 0..limit."""
    more = int(length - (stop - start))
    start, whole = start - more // 2, stop - start + more
    start = max(min(start, limit - whole), 0)
    return start, min(start + whole, limit)


def filled(image: PIL.Image.Image, width: int, height: int, name: str) -> PIL.Image.Image:
    """Resized to fit into width × height, the rest filled with the colours at the image's edge. -> mode "RGB".

    The bars are what diffusers makes them: the cubic filter, read at a box without thickness on the edge.
    """
    if width / height < image.width / image.height:
        inner = (width, max(image.height * width // image.width, 1))
    else:
        inner = (max(image.width * height // image.height, 1), height)
    small = resized(image, *inner, name)
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    whole = PIL.Image.new("RGB", (width, height))
    whole.paste(small, (left, top))
    cubic = PIL.Image.Resampling.BICUBIC
    for edge in (0, inner[1]) if top > 0 else ():
        whole.paste(small.resize((width, top), cubic, box=(0, edge, width, edge)), (0, edge and top + edge))
    for edge in (0, inner[0]) if left > 0 else ():
        whole.paste(small.resize((left, height), cubic, box=(edge, 0, edge, height)), (edge and left + edge, 0))
    return whole


def overlaid(original: PIL.Image.Image, painted: PIL.Image.Image, mask: PIL.Image.Image, box: Box) -> PIL.Image.Image:
    """`painted` (into `box` of the original) where the mask is white, the original's own bits where it is black.

    -> mode "RGB"; an original of 16 bits is rounded to 8.
    """
    base = as_rgb8(original, "image")
    layer = base.copy()
    left, top, right, bottom = box
    layer.paste(_covering(painted, right - left, bottom - top), (left, top))
    return PIL.Image.composite(layer, base, as_mask8(mask, "mask_image"))


def _covering(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Resized to cover width × height, what sticks out cut on both sides: takes back what `filled` did."""
    if width / height > image.width / image.height:
        outer = (width, image.height * width // image.width)
    else:
        outer = (image.width * height // image.height, height)
    left, top = outer[0] // 2 - width // 2, outer[1] // 2 - height // 2
    return resized(image, *outer, "image").crop((left, top, left + width, top + height))


def outpaint_canvas(
    image: PIL.Image.Image | NDArray[Any] | Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """A larger canvas around `image`, and the mask of what is to be painted, for inpainting.

    image: one picture, as the pipeline takes it; 16 bits and floats are rounded to 8 bits.
    left, top, right, bottom: pixels to add on each side, 0 to 4096. The border repeats the image's edge: colours
    for the model to start from. -> (canvas "RGB", mask "L": 255 on the new border, 0 on the image).
    Raises `ArgumentError` naming the side or `image`.
    """
    if isinstance(image, PIL.Image.Image):
        pixels = np.asarray(as_rgb8(image, "image"))
    else:
        found = read_images(image, "image", channels=3)
        if len(found) != 1:
            raise ArgumentError(f"image: holds {len(found)} images, must be one", field="image")
        pixels = np.asarray(to_pil(torch.stack(found).permute(0, 2, 3, 1).numpy())[0])
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    left, top, right, bottom = (_side(name, value) for name, value in sides.items())
    height, width = pixels.shape[0] + top + bottom, pixels.shape[1] + left + right
    _check_sides(width, height, "image")
    canvas = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), ((top, bottom), (left, right)), constant_values=255)
    return PIL.Image.fromarray(canvas), PIL.Image.fromarray(mask)


def _side(name: str, value: object) -> int:
    side = value.item() if isinstance(value, np.integer) else value
    if isinstance(side, bool) or not isinstance(side, int) or not 0 <= side <= MAX_SIDE:
        raise ArgumentError(f"{name} = {brief(value)}: must be an integer from 0 to {MAX_SIDE}", field=name)
    return side
