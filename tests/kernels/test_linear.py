from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import linear as kernel
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, Unsupported, recording
from fastldm.kernels.tuning import Product
from tests.kernels.holding import exact_products, held
from tests.ops import formulas
from tests.ops.formulas import random

FAR = "offsets past 2³¹"  # 8 GB that are reserved, not used, in half precision
SMALL = Product(16, 32, 16, 16, 4, 1, group=2)  # a second accumulator, and several tiles of few numbers
PARTS = Product(16, 16, 0, 16, 4, 1, splits=4)


@dataclass(frozen=True)
class Case:
    """x: makes it. n: rows of w, `scale` times as large as usual. tile: None for that of `tuning.py`.

    tma: read by it where it can.
    """

    x: Callable[[torch.dtype], Tensor]
    n: int
    scale: float = 1.0
    act: str | None = None
    bias: bool = True
    residual: Callable[[torch.dtype], Tensor] | None = None
    tile: Product | None = None
    tma: bool = False


def plain(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: random(*shape, dtype=dtype, scale=scale, mean=mean)


def strided(dtype: torch.dtype) -> Tensor:
    """Rows of a packed projection: every third part."""
    return random(2, 5, 96, dtype=dtype)[..., 32:64]


def far(dtype: torch.dtype) -> Tensor:
    """Three rows 2³⁰ apart, in memory that is never touched between them; where 32 bits would lead, there are zeros."""
    rows = torch.empty(2**32 + 64, dtype=dtype).as_strided((3, 40), (2**30, 1), 2**31)
    return rows.copy_(random(3, 40, dtype=dtype))


CASES: dict[str, Case] = {
    "one number": Case(plain(1, 1), 1),
    "one row, as a pooled text": Case(plain(1, 48), 40, bias=False),
    "no multiple of any tile": Case(plain(3, 7, 77), 70, residual=plain(3, 7, 70)),
    "silu": Case(plain(2, 48, scale=3.0), 33, act="silu"),
    "gelu": Case(plain(2, 48, scale=3.0), 33, act="gelu"),
    "quick_gelu": Case(plain(2, 48, scale=3.0), 33, act="quick_gelu"),
    "an activation before the residual": Case(plain(2, 48), 33, act="gelu", residual=plain(2, 33)),
    "batch 3, the tile of 160 columns": Case(
        plain(3, 50, 64), 320, residual=plain(3, 50, 320), tile=tuning.LINEAR_160[0]
    ),
    "several tiles of rows and columns, in groups": Case(plain(5, 20, 32), 144, tile=SMALL),
    "several tiles, tails everywhere": Case(plain(5, 15, 24), 130, residual=plain(5, 15, 130), tile=SMALL),
    "K in parts": Case(plain(33, 128), 40, act="silu", residual=plain(33, 40), tile=PARTS),
    "K in parts with a tail": Case(plain(5, 90), 19, bias=False, tile=PARTS),
    "K in parts of which one is empty": Case(plain(5, 33), 19, tile=PARTS),
    "K in parts, as tuned": Case(plain(2, 11, 520), 64, residual=plain(2, 11, 64)),
    "rows of a packed projection": Case(strided, 24, residual=lambda dtype: random(2, 5, 72, dtype=dtype)[..., 24:48]),
    "a mean of 1000 with unit variance": Case(plain(4, 64, mean=1000.0), 16),
    "all equal": Case(lambda dtype: torch.full((3, 48), 7.5, dtype=dtype), 16),
    "near the largest half": Case(
        lambda dtype: torch.tensor([[65504.0, -65504.0] * 20]).to(dtype), 8, scale=0.1, act="silu"
    ),
    FAR: Case(far, 24, residual=lambda dtype: far(dtype)[:, :24]),
}
CASES |= {f"{name}, by TMA": replace(case, tma=True) for name, case in CASES.items()}
OF_EACH_DTYPE = [
    (case, dtype) for case in CASES for dtype in DTYPES if not (case.startswith(FAR) and dtype == torch.float32)
]


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    one = CASES[case]
    x = one.x(dtype)
    w = random(one.n, x.shape[-1], dtype=dtype, scale=one.scale * x.shape[-1] ** -0.5)
    options = {"act": one.act, "residual": one.residual and one.residual(dtype)}
    bias = random(one.n, dtype=dtype) if one.bias else None
    chosen = tuning.linear if one.tile is None else lambda m, n, k, dtype: one.tile
    with patch.object(tuning, "linear", chosen), tuning.tma(one.tma), exact_products():
        held(module, "linear", formulas.linear, x, w, bias, **options)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("case", "dtype"), OF_EACH_DTYPE, ids=str)
def test_linear(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


def test_sums_in_parts_are_the_same_every_time() -> None:
    x, w = random(5, 96, dtype=torch.float16), random(10, 96, dtype=torch.float16)
    with patch.object(tuning, "linear", lambda m, n, k, dtype: PARTS):
        assert torch.equal(kernel.linear(x, w), kernel.linear(x, w))


@pytest.mark.parametrize(
    ("m", "n", "k", "tile", "splits"),
    [
        (8192, 320, 320, 160, 1),
        (2048, 1280, 5120, 160, 1),
        (512, 1280, 5120, 160, 4),
        (128, 1280, 5120, 160, 8),
        (154, 768, 768, 64, 2),  # 12 steps of K: more parts would be too short
        (2, 1280, 1280, 64, 4),
        (4096, 512, 512, 128, 1),
    ],
)
def test_there_are_programs_enough(m: int, n: int, k: int, tile: int, splits: int) -> None:
    chosen = tuning.linear(m, n, k, torch.float16)
    assert (chosen.columns + chosen.side, chosen.splits) == (tile, splits)


def bare(rows: int, columns: int, first: int = 0, stride: int | None = None) -> Tensor:
    """A matrix without memory: where it begins, and how far its rows are apart, in elements."""
    memory = torch.empty(2**20, device="meta", dtype=torch.float16)
    return memory.as_strided((rows, columns), (stride or columns, 1), first)


WHAT_TMA_CAN_ADDRESS = [
    (bare(40, 64), True),
    (bare(40, 64, first=8), True),
    (bare(40, 64, first=4), False),
    (bare(40, 64, stride=72), True),
    (bare(40, 64, stride=68), False),
    (bare(40, 60, stride=64), False),  # x could be read, but not w
    (bare(1, 64).expand(40, 64), False),
]


@pytest.mark.parametrize(("x", "tma"), WHAT_TMA_CAN_ADDRESS)
def test_what_tma_can_address(x: Tensor, tma: bool) -> None:
    with recording() as launches, tuning.tma(True):
        kernel.linear(x, bare(160, x.shape[1]))
    assert launches[0].arguments["TMA"] is tma


@pytest.mark.parametrize(("capability", "tma"), [(89, False), (90, True), (100, True), (120, False)])
def test_chips_that_have_tma(capability: int, tma: bool) -> None:
    with patch.object(tuning, "capability", lambda: capability), tuning.tma(True):
        assert tuning.by_tma(SMALL) is tma
        assert tuning.by_tma(replace(SMALL, tma=True)) is tma
    with patch.object(tuning, "capability", lambda: capability):
        assert not tuning.by_tma(SMALL)
        assert tuning.by_tma(replace(SMALL, tma=True)) is tma
    with patch.object(tuning, "capability", lambda: capability), tuning.tma(False):
        assert not tuning.by_tma(replace(SMALL, tma=True))


def test_what_no_kernel_takes() -> None:
    x, w, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)
    for arguments, options, reason in (
        ((x.double(), w.double()), {}, "x is float64, not float16, bfloat16, float32"),
        ((x, w.half()), {}, "w is float16 beside float32"),
        ((x, w, b), {"act": "relu"}, "act is 'relu', not None, 'silu', 'gelu', 'quick_gelu'"),
        ((torch.ones(2, 7), w), {}, "x has 7 columns, w has 8"),
        ((x, torch.ones(8, 4).T), {}, "w or b is not contiguous"),
        ((x, w, torch.ones(8)[::2]), {}, "w or b is not contiguous"),
        ((x, w, b), {"residual": torch.ones(1, 4)}, "the residual has another shape than the output"),
        ((x, w, b), {"residual": torch.ones(4, 2).T}, "the last dimension of the residual is not contiguous"),
        ((torch.ones(4, 3, 8)[:, ::2], w), {}, "the rows of x are not evenly spaced"),
        ((torch.ones(8, 2).T, w), {}, "the last dimension of x is not contiguous"),
    ):
        with pytest.raises(Unsupported, match=reason), patch.object(kernel, "empty", side_effect=AssertionError):
            kernel.linear(*arguments, **options)
