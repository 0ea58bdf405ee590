"""Pixels to what people hold in their hands: PIL images, NumPy arrays, tensors."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Images = list[PIL.Image.Image] | NDArray[np.float32] | Tensor


def to_output(pixels: Tensor, output_type: str) -> Images:
    """pixels: (B, C, H, W), −1..1, clamped here.

    "pil": a list of images, rounded to 8 bits; "np": (B, H, W, C) float32 in 0..1; "pt": (B, C, H, W) in 0..1.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    array: NDArray[np.float32] = unit.permute(0, 2, 3, 1).to("cpu", torch.float32).contiguous().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: NDArray[np.float32]) -> list[PIL.Image.Image]:
    """(B, H, W, C) in 0..1, C = 1 or 3 -> 8-bit images, "L" or "RGB"."""
    eight_bit = (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in eight_bit]
