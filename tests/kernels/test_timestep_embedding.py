from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastldm.kernels import timestep_embedding as kernel
from fastldm.kernels.launch import DTYPES, Unsupported
from tests.kernels.holding import exact_products, held
from tests.ops import formulas
from tests.ops.formulas import random

TIMES = [0.0, 1.0, 0.25, 37.0, 500.0, 999.0]


@dataclass(frozen=True)
class Case:
    """outputs: of the first linear layer; None: the waves alone."""

    dim: int
    times: int | tuple[int, ...] = 6
    outputs: int | None = None
    flip: bool = True
    shift: float = 0.0
    bias: bool = True
    act: str | None = "silu"


CASES: dict[str, Case] = {
    "one wave": Case(2, times=1),
    "sines first, shifted": Case(16, flip=False, shift=1.0),
    "an odd width ends in a zero": Case(33, shift=0.5),
    "SD 1.5": Case(320, times=20),
    "six numbers for each sample, SDXL": Case(256, times=(2, 6)),
    "no axis": Case(8, times=()),
    "SD 1.5, a part of the layer": Case(320, times=20, outputs=40),
    "no multiple of any tile": Case(70, times=19, outputs=37, flip=False, shift=1.0),
    "no bias, no activation": Case(16, outputs=8, bias=False, act=None),
    "an odd width and a layer": Case(33, outputs=16),
    "one wave and a layer": Case(2, times=1, outputs=1),
}


def times(of: int | tuple[int, ...]) -> Tensor:
    shape = (of,) if isinstance(of, int) else of
    count = math.prod(shape)
    return torch.tensor(TIMES[-count:] + [float(t) for t in range(7, 7 * max(0, count - 5), 7)])[-count:].view(shape)


def waves(t: Tensor, dim: int, *, flip: bool, shift: float) -> Tensor:
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=t.dtype) / (half - shift))
    angles = t[..., None] * frequencies
    halves = (angles.cos(), angles.sin()) if flip else (angles.sin(), angles.cos())
    return torch.cat((*halves, *(torch.zeros_like(t)[..., None],) * (dim % 2)), dim=-1)


def layer(t: Tensor, dim: int, *, w: Tensor, b: Tensor | None, act: str | None, flip: bool, shift: float) -> Tensor:
    """In float64 where t is; else the waves are float32 and brought to w's dtype, as the layer's input is."""
    dtype = t.dtype if t.dtype == torch.float64 else w.dtype
    x = waves(t, dim, flip=flip, shift=shift).to(dtype)
    return formulas.linear(x, w.to(dtype), None if b is None else b.to(dtype), act=act)


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    row = CASES[case]
    t = times(row.times)
    options = {"flip": row.flip, "shift": row.shift}
    if row.outputs is None:
        held(module, "timestep_embedding", waves, t, row.dim, **options)
        return
    w = random(row.outputs, row.dim, dtype=dtype)
    b = random(row.outputs, dtype=dtype) if row.bias else None
    with exact_products():
        held(module, "timestep_embedding", layer, t, row.dim, w=w, b=b, act=row.act, **options)


@pytest.mark.parametrize("case", [case for case, row in CASES.items() if row.outputs is None])
def test_the_waves(case: str) -> None:
    check(kernel, case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case, row in CASES.items() if row.outputs is not None])
def test_the_first_layer(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


def test_what_no_kernel_takes() -> None:
    t, w = torch.ones(4), torch.ones(3, 8)
    for arguments, options, reason in (
        ((t.double(), 8), {}, "t is float64, not float32"),
        ((torch.ones(4, 2)[:, 0], 8), {}, "t is not contiguous"),
        ((t, 2), {"shift": 1.0}, "shift=1.0 of 1 frequencies"),
        ((t, 1), {}, "shift=0.0 of 0 frequencies"),
        ((t, 8), {"act": "silu"}, "a bias or an activation without w"),
        ((t, 8), {"w": w, "act": "gelu"}, "act='gelu', not None or 'silu'"),
        ((t, 8), {"w": w.double()}, "w is float64, not float16, bfloat16, float32"),
        ((t, 8), {"w": w, "b": torch.ones(3).half()}, "b is float16 beside float32"),
        ((t, 8), {"w": torch.ones(8, 3).T}, "w or b is not contiguous"),
        ((t, 6), {"w": w}, "w is not for 6 columns"),
        ((t, 8), {"w": w, "b": torch.ones(4)}, "b is not for 3 outputs"),
    ):
        with pytest.raises(Unsupported, match=reason):
            kernel.timestep_embedding(*arguments, **{"flip": True, "shift": 0.0, **options})
