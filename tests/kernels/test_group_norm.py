from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import group_norm as kernel
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, Unsupported, recording
from tests.kernels.holding import held
from tests.ops import formulas
from tests.ops.formulas import image, random, up

EPS = 1e-5
FAR = "offsets past 2³¹"  # 8 GB that are reserved, not used, in half precision
Maker = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """known: whose statistics are given, "x", "x2" or both. overflows: the formula does, in half precision.

    tiles: so small that a small map has several.
    """

    x: Maker
    groups: int
    x2: Maker | None = None
    act: str | None = None
    known: str = ""
    overflows: bool = False
    tiles: bool = False


def plain(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Maker:
    return lambda dtype: image(*shape, dtype=dtype, scale=scale, mean=mean)


def half_of_a_map(dtype: torch.dtype) -> Tensor:
    """The second half of the channels of a wider one."""
    return image(2, 24, 3, 5, dtype=dtype)[:, 12:]


def far(dtype: torch.dtype) -> Tensor:
    """Three pixels 2³⁰ apart, in memory that is never touched between; where 32 bits would lead, there are zeros."""
    memory = torch.empty(2**32 + 64, dtype=dtype)
    pixels = memory.as_strided((1, 8, 1, 3), (3 * 2**30, 1, 3 * 2**30, 2**30), 2**31)
    return pixels.copy_(random(1, 8, 1, 3, dtype=dtype))


def outlier(dtype: torch.dtype) -> Tensor:
    """The very first value is far from the others."""
    x = image(1, 8, 9, 11, dtype=dtype)
    x[0, 0, 0, 0] = 3e4
    return x


CASES: dict[str, Case] = {
    "one pixel, one channel to a group": Case(plain(1, 4, 1, 1), 4),
    "one group": Case(plain(1, 6, 3, 3), 1),
    "no multiple of any tile": Case(plain(3, 70, 5, 7), 7),
    "groups of 10, those of 320 channels": Case(plain(1, 40, 9, 8), 4, act="silu"),
    "more pixels than a tile and than a stretch": Case(plain(2, 70, 16, 21), 7, act="silu", tiles=True),
    "half of a map": Case(half_of_a_map, 3),
    "a mean of 1000 with unit variance": Case(plain(2, 16, 10, 13, mean=1000.0), 4),
    "all equal": Case(lambda dtype: torch.full((1, 8, 4, 4), 7.5).to(dtype).to(memory_format=torch.channels_last), 2),
    "near the largest half": Case(
        lambda dtype: image(1, 8, 4, 4, dtype=dtype).sign() * 65504, 2, act="silu", overflows=True
    ),
    "an outlier before all others": Case(outlier, 2, overflows=True, tiles=True),
    "two inputs": Case(plain(2, 64, 3, 5), 4, x2=plain(2, 128, 3, 5), act="silu"),
    "a group that holds channels of both": Case(plain(2, 9, 4, 5), 5, x2=plain(2, 6, 4, 5, mean=3.0)),
    "known statistics": Case(plain(2, 70, 5, 7), 7, act="silu", known="x"),
    "known statistics, a mean of 1000": Case(plain(1, 16, 10, 13, mean=1000.0), 4, known="x"),
    "known of both inputs": Case(plain(2, 9, 4, 5), 5, x2=plain(2, 6, 4, 5), known="x, x2"),
    "known of the first": Case(plain(2, 9, 12, 16), 5, x2=plain(2, 6, 12, 16, mean=2.0), known="x", tiles=True),
    "known of the second": Case(plain(2, 9, 9, 8), 5, x2=plain(2, 6, 9, 8, mean=2.0), known="x2"),
    FAR: Case(far, 2),
}


def statistics(x: Tensor) -> Tensor:
    return formulas.channel_stats(x.double()).float()


def check(module: ModuleType, case: str, dtype: torch.dtype, *, whole: bool = False) -> None:
    """whole: in one launch; otherwise in three, or in two where all statistics are known."""
    row = CASES[case]
    x, x2 = row.x(dtype), None if row.x2 is None else row.x2(dtype)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    w, b = random(channels, dtype=dtype, mean=1.0), random(channels, dtype=dtype)
    named = row.known.split(", ")
    pair = (statistics(x) if "x" in named else None, None if x2 is None or "x2" not in named else statistics(x2))
    options: dict[str, Any] = {"x2": x2, "act": row.act}

    def formula(*arguments: Any, stats: Any, **options: Any) -> Tensor:
        if row.overflows and arguments[0].dtype == torch.float16:
            return formulas.group_norm(*up(arguments, torch.float16), **up(options, torch.float16)).half()
        return formulas.group_norm(*arguments, **options)

    small = {"GROUP_NORM_TILE": 1024, "GROUP_NORM_PROGRAMS": 4} if row.tiles else {}
    with patch.multiple(tuning, GROUP_NORM_WHOLE=1 << 30 if whole else 0, **small):
        out = held(
            module, "group_norm", formula, x, w, b, row.groups, EPS, stats=pair[0] if x2 is None else pair, **options
        )
    assert out.is_contiguous(memory_format=torch.channels_last)


PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES if not (case == FAR and dtype == torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_group_norm_in_three_launches(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c, d in PAIRS if not CASES[c].known], ids=str)
def test_group_norm_in_one_launch(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype, whole=True)


@pytest.mark.parametrize(
    ("side", "known", "expected"),
    [(8, False, 1), (64, False, 3), (64, True, 2), (8, True, 1)],
    ids=["small", "large", "large with statistics", "small with statistics"],
)
def test_how_many_launches(side: int, known: bool, expected: int) -> None:
    x, w = torch.empty(2, side, side, 320, device="meta").permute(0, 3, 1, 2), torch.empty(320, device="meta")
    with recording() as launches:
        kernel.group_norm(x, w, w, 32, EPS, stats=torch.empty(2, 320, 2, device="meta") if known else None)
    assert len(launches) == expected


def test_a_sample_is_normalised_alike_in_any_batch() -> None:
    x, w, b = image(3, 8, 20, 20, dtype=torch.float32), random(8, dtype=torch.float32), random(8, dtype=torch.float32)
    with patch.object(tuning, "GROUP_NORM_WHOLE", 0):
        alone, together = (kernel.group_norm(of, w, b, 2, EPS) for of in (x[1:2], x))
    assert torch.equal(alone[0], together[1])


def test_what_no_kernel_takes() -> None:
    x, w, stats = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.ones(4), torch.ones(2, 4, 2)
    eight = torch.ones(8)
    for arguments, options, reason in (
        ((x.double(), w.double(), w.double(), 2), {}, "x is float64, not float16, bfloat16, float32"),
        ((x, w.half(), w, 2), {}, "w is float16 beside float32"),
        ((x, w, w, 2), {"act": "gelu"}, "act='gelu', not None or 'silu'"),
        ((x.contiguous(), w, w, 2), {}, "the last dimension of x is not contiguous"),
        ((x[:, :, ::2], w, w, 2), {}, "the rows of x are not evenly spaced"),
        ((x, torch.ones(8)[::2], w, 2), {}, "w or b is not contiguous"),
        ((x, w, w, 3), {}, "4 channels are not 3 groups"),
        ((x, w, w, 2), {"x2": x}, "w or b is not for 8 channels"),
        ((x, eight, eight, 2), {"x2": x[:1]}, "x2 has another size than x"),
        ((x, eight, eight, 2), {"x2": x, "stats": stats}, "with x2 the statistics are a pair"),
        ((x, w, w, 2), {"stats": stats.half()}, "the statistics are not contiguous float32"),
        ((x, w, w, 2), {"stats": stats[:1]}, "the statistics have another shape"),
    ):
        with pytest.raises(Unsupported, match=reason):
            kernel.group_norm(*arguments, EPS, **options)
    wide = torch.empty(1, 1, 1, 16384).permute(0, 3, 1, 2)
    with pytest.raises(Unsupported, match="groups of 16384 channels do not fit"):
        kernel.group_norm(wide, torch.empty(16384), torch.empty(16384), 1, EPS)
