from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import geglu as kernel
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, Unsupported, recording
from fastldm.kernels.tuning import Product
from tests.kernels.holding import exact_products, held
from tests.kernels.test_linear import FAR, WHAT_TMA_CAN_ADDRESS, bare, far, plain, strided
from tests.ops import formulas
from tests.ops.formulas import random

SMALL = Product(16, 32, 16, 16, 4, 1, group=2)  # a second accumulator, and several tiles of few numbers


@dataclass(frozen=True)
class Case:
    """x: makes it. f: columns of the output. tile: None for that of `tuning.py`. tma: read by it where it can."""

    x: Callable[[torch.dtype], Tensor]
    f: int
    scale: float = 1.0  # of w
    tile: Product | None = None
    tma: bool = False


CASES: dict[str, Case] = {
    "one number": Case(plain(1, 1), 1),
    "one row": Case(plain(1, 48), 40),
    "no multiple of any tile": Case(plain(3, 7, 77), 35),
    "batch 3, the tile of 256 columns": Case(plain(3, 30, 64), 192, tile=tuning.GEGLU[0]),
    "the tile of 160 columns": Case(plain(2, 33, 64), 160, tile=tuning.GEGLU[1]),
    "several tiles of rows and columns, in groups": Case(plain(5, 20, 32), 72, tile=SMALL),
    "several tiles, tails everywhere": Case(plain(5, 15, 24), 65, tile=SMALL),
    "rows of a packed projection": Case(strided, 24),
    "a mean of 1000 with unit variance": Case(plain(4, 64, mean=1000.0), 16, scale=0.01),
    "all equal": Case(lambda dtype: torch.full((3, 48), 7.5, dtype=dtype), 16),
    "gates where the error function ends": Case(plain(4, 48, scale=6.0), 16),
    "near the largest half": Case(lambda dtype: torch.tensor([[65504.0, -65504.0] * 20]).to(dtype), 8, scale=1e-4),
    FAR: Case(far, 24),
}
CASES |= {f"{name}, by TMA": replace(case, tma=True) for name, case in CASES.items()}
OF_EACH_DTYPE = [
    (case, dtype) for case in CASES for dtype in DTYPES if not (case.startswith(FAR) and dtype == torch.float32)
]


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    one = CASES[case]
    x = one.x(dtype)
    w = random(2 * one.f, x.shape[-1], dtype=dtype, scale=one.scale * x.shape[-1] ** -0.5)
    chosen = tuning.geglu if one.tile is None else lambda m, n, dtype: one.tile
    with patch.object(tuning, "geglu", chosen), tuning.tma(one.tma), exact_products():
        held(module, "geglu", formulas.geglu, x, w, random(2 * one.f, dtype=dtype))


@pytest.mark.parametrize(("case", "dtype"), OF_EACH_DTYPE, ids=str)
def test_geglu(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize(
    ("m", "f", "tile"), [(2048, 5120, 256), (8192, 2560, 256), (2048, 2560, 160), (512, 5120, 160), (128, 5120, 128)]
)
def test_there_are_programs_enough(m: int, f: int, tile: int) -> None:
    chosen = tuning.geglu(m, 2 * f, torch.float16)
    assert chosen.columns + chosen.side == tile


@pytest.mark.parametrize(("x", "tma"), WHAT_TMA_CAN_ADDRESS)
def test_what_tma_can_address(x: Tensor, tma: bool) -> None:
    with recording() as launches, tuning.tma(True):
        kernel.geglu(x, bare(160, x.shape[1]), bare(1, 160)[0])
    assert launches[0].arguments["TMA"] is tma


def test_what_no_kernel_takes() -> None:
    x, w, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)
    for arguments, reason in (
        ((x.double(), w.double(), b.double()), "x is float64, not float16, bfloat16, float32"),
        ((x, w, b.half()), "b is float16 beside float32"),
        ((x, torch.ones(3, 8), torch.ones(3)), "w has 3 rows, which cannot be halved"),
        ((torch.ones(2, 7), w, b), "x has 7 columns, w has 8"),
        ((x, torch.ones(8, 4).T, b), "w or b is not contiguous"),
        ((x, w, torch.ones(8)[::2]), "w or b is not contiguous"),
        ((torch.ones(4, 3, 8)[:, ::2], w, b), "the rows of x are not evenly spaced"),
        ((torch.ones(8, 2).T, w, b), "the last dimension of x is not contiguous"),
    ):
        with pytest.raises(Unsupported, match=reason), patch.object(kernel, "empty", side_effect=AssertionError):
            kernel.geglu(*arguments)
