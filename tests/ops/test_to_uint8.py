"""Pixels to bytes on whatever device, against NumPy on the host, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastldm import ops
from tests.ops import formulas
from tests.ops.formulas import DTYPES, image, untouched


@DTYPES
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 40, 56), (3, 1, 9, 7), (2, 4, 1, 1)], ids=str)
def test_bytes_are_those_of_the_host(
    dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, int, int, int]
) -> None:
    pixels = image(*shape, dtype=dtype).contiguous(memory_format=layout)
    with untouched(pixels):
        found = ops.to_uint8(pixels)
    batch, channels, height, width = shape
    assert (found.dtype, found.shape) == (torch.uint8, (batch, height, width, channels))
    assert found.is_contiguous()
    assert torch.equal(found, formulas.to_uint8(pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    pixels = numbers[numbers.isfinite()].view(1, 1, 1, -1)
    assert torch.equal(ops.to_uint8(pixels), formulas.to_uint8(pixels))


@DTYPES
def test_halves_go_to_the_even_byte_and_what_is_beyond_to_the_nearest(dtype: torch.dtype) -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0, -0.6, 0.6, -30000.0, 30000.0, 1.125], dtype=dtype)
    found = ops.to_uint8(pixels.view(1, 1, 1, -1)).flatten().tolist()
    assert found == [0, 128, 255, 51, 204, 0, 255, 255]
