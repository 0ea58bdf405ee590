"""The image side of a call: the picture to start from, its mask, how much of it to keep. Checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from fastldm.errors import ArgumentError
from fastldm.image import Box, crop_box, filled, overlaid, read_images, resized

PAINTED = 0.5  # a mask's pixel at or above is painted
MAX_PADDING = 4096


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
    padding_mask_crop: object,
    overlay: bool,
) -> Source:
    """size: (height, width) that the caller asked for: PIL images are resized to it, others must have it.

    Raises `ArgumentError` naming the argument.
    """
    if padding_mask_crop is not None:
        return _cropped(image, mask_image, strength, size, padding_mask_crop)
    if size is not None:
        image, mask_image = _resized(image, size), _resized(mask_image, size)
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


def _resized(value: object, size: tuple[int, int]) -> object:
    if isinstance(value, PIL.Image.Image):
        return value if value.size == size[::-1] else resized(value, size[1], size[0])
    return [_resized(v, size) for v in value] if isinstance(value, list | tuple) else value


def _cropped(image: object, mask: object, strength: float, size: tuple[int, int] | None, padding: object) -> Source:
    if isinstance(padding, bool) or not isinstance(padding, int) or not 0 <= padding <= MAX_PADDING:
        raise ArgumentError(
            f"padding_mask_crop = {padding!r}: must be an integer from 0 to {MAX_PADDING}", field="padding_mask_crop"
        )
    for name, value in (("image", image), ("mask_image", mask)):
        if not isinstance(value, PIL.Image.Image):
            raise ArgumentError(
                f"{name}: must be one PIL image with padding_mask_crop, not {type(value).__name__}", field=name
            )
    assert isinstance(image, PIL.Image.Image)
    assert isinstance(mask, PIL.Image.Image)
    assert size is not None
    if image.size != mask.size:
        raise ArgumentError(f"mask_image: is {mask.size}, the image is {image.size}", field="mask_image")
    box = crop_box(mask, size[1], size[0], padding)
    pieces = [filled(piece.crop(box), size[1], size[0]) for piece in (image, mask)]
    pixels = torch.stack(read_images(pieces[0], "image", channels=3))
    soft = torch.stack(read_images(pieces[1], "mask_image", channels=1))
    return Source(pixels, strength, soft, crop=Crop(image, mask, box))
