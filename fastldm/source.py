"""The image side of a call: the picture to start from, its mask, how much of it to keep. Checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from fastldm.errors import ArgumentError
from fastldm.image import MAX_COUNT, Box, crop_box, filled, load, overlaid, read_images, resized

PAINTED = 0.5  # a mask's pixel at or above is painted


class Factor(Protocol):
    @property
    def factor(self) -> int: ...


@dataclass(frozen=True)
class Crop:
    """The whole picture, its mask, and the box that is painted in the model's own size."""

    picture: PIL.Image.Image
    mask: PIL.Image.Image
    box: Box

    def filled_in(self, painted: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
        return [overlaid(self.picture, image, self.mask, self.box) for image in painted]


@dataclass(frozen=True)
class Source:
    """pixels: (n, 3, H, W) in 0..1; n divides the batch. soft_mask: (1 or n, 1, H, W) in 0..1, or None."""

    pixels: Tensor
    strength: float
    soft_mask: Tensor | None = None
    overlay: bool = False
    crop: Crop | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def mask(self) -> Tensor:
        """1 where the model paints, 0 elsewhere: (1 or n, 1, H, W) float32."""
        assert self.soft_mask is not None
        return (self.soft_mask >= PAINTED).float()

    def laid_over(self, unit: Tensor) -> Tensor:
        """The result (B, 3, H, W) in 0..1 with the source's own pixels where the mask is 0, bit for bit."""
        assert self.soft_mask is not None
        pixels, mask = (repeated(t, len(unit)).to(unit) for t in (self.pixels, self.soft_mask))
        return mask * unit + (1 - mask) * pixels


def repeated(t: Tensor, batch: int) -> Tensor:
    """(n, ...) -> (batch, ...): entry k for the images of prompt k."""
    return t.repeat_interleave(batch // len(t), dim=0)


def read_source(
    geometry: Factor,
    *,
    image: object,
    mask_image: object,
    strength: float,
    size: tuple[int, int] | None,
    padding_mask_crop: int | None,
    overlay: bool,
) -> Source:
    """size: (height, width) that the caller asked for: PIL images are resized to it, others must have it.

    Raises `ArgumentError` naming the argument.
    """
    if padding_mask_crop is not None:
        return _cropped(image, mask_image, strength, size, padding_mask_crop)
    if size is not None:
        image, mask_image = _resized(image, "image", size), _resized(mask_image, "mask_image", size)
    pixels = torch.stack(read_images(image, "image", channels=3))
    found = pixels.shape[2], pixels.shape[3]
    if size is not None and found != size:
        raise ArgumentError(f"image: is {found[1]}×{found[0]}, height and width say {size[1]}×{size[0]}", field="image")
    multiple = geometry.factor
    if found[0] % multiple or found[1] % multiple:
        fit = [max(side // multiple, 1) * multiple for side in found]
        raise ArgumentError(
            f"image: is {found[1]}×{found[0]}, must be a multiple of {multiple}; "
            f"resize it or pass height={fit[0]}, width={fit[1]}",
            field="image",
        )
    mask = None if mask_image is None else _read_mask(mask_image, pixels)
    return Source(pixels, strength, mask, overlay)


def _read_mask(value: object, pixels: Tensor) -> Tensor:
    mask = torch.stack(read_images(value, "mask_image", channels=1))
    if mask.shape[2:] != pixels.shape[2:]:
        raise ArgumentError(
            f"mask_image: is {mask.shape[3]}×{mask.shape[2]}, the image is {pixels.shape[3]}×{pixels.shape[2]}",
            field="mask_image",
        )
    if len(mask) not in (1, len(pixels)):
        raise ArgumentError(f"mask_image: has {len(mask)} masks for {len(pixels)} images", field="mask_image")
    return mask


def _resized(value: object, name: str, size: tuple[int, int]) -> object:
    if isinstance(value, list | tuple) and len(value) <= MAX_COUNT:
        return [_resized_one(v, name, size) for v in value]
    return _resized_one(value, name, size)


def _resized_one(value: object, name: str, size: tuple[int, int]) -> object:
    if not isinstance(value, PIL.Image.Image) or value.size == size[::-1]:
        return value
    return resized(value, size[1], size[0], name)


def _cropped(image: object, mask: object, strength: float, size: tuple[int, int] | None, padding: int) -> Source:
    for name, value in (("image", image), ("mask_image", mask)):
        if not isinstance(value, PIL.Image.Image):
            raise ArgumentError(
                f"{name}: must be one PIL image with padding_mask_crop, not {type(value).__name__}", field=name
            )
        load(value, name)
    assert isinstance(image, PIL.Image.Image)
    assert isinstance(mask, PIL.Image.Image)
    assert size is not None
    if image.size != mask.size:
        raise ArgumentError(f"mask_image: is {mask.size}, the image is {image.size}", field="mask_image")
    box = crop_box(mask, size[1], size[0], padding)
    pixels, soft = (
        torch.stack(read_images(filled(piece.crop(box), size[1], size[0], name), name, channels=channels))
        for piece, name, channels in ((image, "image", 3), (mask, "mask_image", 1))
    )
    return Source(pixels, strength, soft, crop=Crop(image, mask, box))
