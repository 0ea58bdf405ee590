from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastldm.kernels import layer_norm as kernel
from fastldm.kernels.launch import DTYPES, Unsupported
from tests.kernels.holding import held
from tests.ops import formulas
from tests.ops.formulas import random

EPS = 1e-5
FAR = "offsets past 2³¹"  # 8 GB that are reserved, not used, in half precision


def plain(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: random(*shape, dtype=dtype, scale=scale, mean=mean)


def strided(dtype: torch.dtype) -> Tensor:
    """Rows of a packed projection: every third part."""
    return random(2, 5, 96, dtype=dtype)[..., 32:64]


def far(dtype: torch.dtype) -> Tensor:
    """Three rows 2³⁰ apart, in memory that is never touched between them; where 32 bits would lead, there are zeros."""
    rows = torch.empty(2**32 + 64, dtype=dtype).as_strided((3, 40), (2**30, 1), 2**31)
    return rows.copy_(random(3, 40, dtype=dtype))


CASES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one number": plain(1, 1),
    "one row": plain(1, 64),
    "no multiple of any tile": plain(3, 7, 77),
    "the width of SD 1.5, rows beyond a block": plain(2, 11, 320),
    "wider than half a block": plain(1, 3, 1280),
    "batch 3": plain(3, 2, 768),
    "rows of a packed projection": strided,
    "a mean of 1000 with unit variance": plain(4, 320, mean=1000.0),
    "all equal": lambda dtype: torch.full((3, 48), 7.5, dtype=dtype),
    "near the largest half": lambda dtype: torch.tensor([[65504.0, -65504.0] * 20]).to(dtype),
    FAR: far,
}


def added(x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]:
    return formulas.layer_norm(x + residual, w, b, eps), x + residual


def check(module: ModuleType, case: str, dtype: torch.dtype, *, residual: bool = False) -> None:
    x = CASES[case](dtype)
    w, b = random(x.shape[-1], dtype=dtype, mean=1.0), random(x.shape[-1], dtype=dtype)
    if residual:
        more = random(*x.shape, dtype=dtype)
        held(module, "layer_norm", added, x, w, b, EPS, residual=more)
    else:
        held(module, "layer_norm", formulas.layer_norm, x, w, b, EPS)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in DTYPES if not (case == FAR and dtype == torch.float32)],
    ids=str,
)
def test_layer_norm(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["one row", "no multiple of any tile", "rows of a packed projection"])
def test_with_a_residual(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype, residual=True)


def test_what_no_kernel_takes() -> None:
    x, w = torch.ones(2, 8), torch.ones(8)
    for arguments, reason in {
        (x.double(), w.double(), w.double()): "x is float64, not float16, bfloat16, float32",
        (x.half(), w, w): "w is float32 beside float16",
        (torch.ones(1, 8200), torch.ones(8200), torch.ones(8200)): "8200 columns do not fit",
        (torch.ones(4, 3, 8)[:, ::2], w, w): "the rows of x are not evenly spaced",
        (torch.ones(8, 2).T, w, w): "the last dimension of x is not contiguous",
        (x, torch.ones(16)[::2], w): "w or b is not contiguous",
    }.items():
        with pytest.raises(Unsupported, match=reason):
            kernel.layer_norm(*arguments, EPS)
