"""Bit for bit what the host makes of the pixels: a picture must not depend on who rounded it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import launch
from fastldm.kernels import to_uint8 as kernel
from fastldm.kernels.launch import DTYPES, HALF, Unsupported
from tests.ops import formulas
from tests.ops.formulas import random

FAR = ("samples past 2³¹", "channels past 2³¹")  # 8 GB that are reserved, not used, in half precision


def decoded(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: formulas.image(*shape, dtype=dtype)


def finite(dtype: torch.dtype) -> Tensor:
    """Every number of 16 bits; of float32 those with 16 zeros behind, which are the numbers of bfloat16."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.bfloat16 if dtype == torch.float32 else dtype)
    return values[values.isfinite()].to(dtype).view(1, 1, 1, -1)


def ties(dtype: torch.dtype) -> Tensor:
    """Where 255 · (x/2 + 1/2) is k + 1/2, and the nearest numbers around: some products only round to a half."""
    exact = (torch.arange(255, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    nearest = exact.to(dtype)
    below = above = nearest
    around = [nearest]
    for _ in range(4):
        below, above = (torch.nextafter(t, torch.full_like(t, to)) for t, to in ((below, -9.0), (above, 9.0)))
        around += [below, above]
    return torch.stack(around).view(1, 1, 9, 255)


def beyond(dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    values = [-largest, -65504.0, -1.5, -1.0, -0.0, 0.0, 1.0, 1.0 + 2 * torch.finfo(dtype).eps, 1.5, 65504.0, largest]
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)


def cut(dtype: torch.dtype) -> Tensor:
    """A part of a larger picture: no dimension of it is dense."""
    return random(3, 8, 14, 18, dtype=dtype)[:, 1:7:2, 3:12, 1:16:2]


def far(samples: int, channels: int, *strides: int) -> Callable[[torch.dtype], Tensor]:
    """Three of something 2³⁰ apart; where 32 bits would lead, there are zeros."""

    def made(dtype: torch.dtype) -> Tensor:
        shape, memory = (samples, channels, 2, 5), torch.empty(2**32 + 64, dtype=dtype)
        return memory.as_strided(shape, (*strides, 5, 1), 2**31).copy_(random(*shape, dtype=dtype))

    return made


CASES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one number": decoded(1, 1, 1, 1),
    "one pixel": decoded(1, 3, 1, 1),
    "batch 3, more than a block, no multiple of one": decoded(3, 3, 17, 31),
    "one channel": decoded(2, 1, 5, 7),
    "four channels": decoded(2, 4, 3, 6),
    "every finite number": finite,
    "halves and their neighbours": ties,
    "values beyond the range": beyond,
    "channels apart, as tiles are joined": lambda dtype: random(2, 3, 9, 43, dtype=dtype),
    "rows and columns exchanged": lambda dtype: decoded(2, 3, 7, 6)(dtype).mT,
    "a part of a larger picture": cut,
    "one sample again and again": lambda dtype: decoded(1, 3, 4, 5)(dtype).expand(3, -1, -1, -1),
    FAR[0]: far(3, 2, 2**30, 10),
    FAR[1]: far(2, 3, 10, 2**30),
}


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    pixels = CASES[case](dtype)
    expected = formulas.to_uint8(pixels)

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        """What is left out is wrong."""
        return launch.empty(*arguments, **options).copy_(~expected)

    before = pixels.clone()
    with patch.object(module, "empty", poisoned):
        out = module.to_uint8(pixels)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_to_uint8(case: str, dtype: torch.dtype) -> None:
    if not (case in FAR and dtype == torch.float32):
        check(kernel, case, dtype)


def test_the_cases_hold_what_they_say() -> None:
    assert {dtype: finite(dtype).numel() for dtype in HALF} == {torch.float16: 63488, torch.bfloat16: 65280}
    unit = (ties(torch.float32) * 0.5 + 0.5).flatten()
    product, exact = unit * 255, unit.double() * 255
    rounded_to_a_half = (product % 1 == 0.5) & (product.double() != exact)
    assert (exact.round() != product.round())[rounded_to_a_half].any(), "rounding once would be seen"


def test_what_no_kernel_takes() -> None:
    with pytest.raises(Unsupported, match="pixels is float64, not float16, bfloat16, float32"):
        kernel.to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(Unsupported, match="a sample has 2³¹ elements"):
        kernel.to_uint8(torch.zeros(1).expand(1, 2, 2**15, 2**15))
