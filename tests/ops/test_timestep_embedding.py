from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastldm import ops
from tests.numerics import assert_within_twice
from tests.ops import formulas
from tests.ops.formulas import random, up

TIMES = [0.0, 1.0, 0.25, 37.0, 500.0, 999.0]


def waves(t: Tensor, dim: int, *, flip: bool, shift: float) -> Tensor:
    rows = []
    for value in t.flatten().tolist():
        angles = [value * 10000 ** (-i / (dim // 2 - shift)) for i in range(dim // 2)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        rows.append((cosines + sines if flip else sines + cosines) + [0.0] * (dim % 2))
    return torch.tensor(rows, dtype=torch.float64).view(*t.shape, dim)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dim", [4, 5, 16, 33, 320])
def test_equals_the_formula(dim: int, shift: float, flip: bool, dtype: torch.dtype) -> None:
    t = torch.tensor(TIMES, dtype=dtype)
    out = ops.timestep_embedding(t, dim, flip=flip, shift=shift)
    truth = waves(t, dim, flip=flip, shift=shift)
    assert out.dtype == dtype
    # the angle, up to 999, is rounded to the working dtype before its sine: that error is the input's
    angle = 1000 * torch.finfo(dtype).eps
    assert float((out.double() - truth).abs().max()) <= 4 * angle
    if dim % 2:
        assert not out[..., -1].any()


def test_it_equals_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor(TIMES)
    for dim, flip, shift in ((320, True, 0), (33, False, 1), (2, True, 0)):
        expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        torch.testing.assert_close(ops.timestep_embedding(t, dim, flip=flip, shift=shift), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_smallest_dimensions(dim: int) -> None:
    t = torch.tensor([0.5, 2.0])
    out = ops.timestep_embedding(t, dim, flip=True, shift=0.0)
    torch.testing.assert_close(out.double(), waves(t, dim, flip=True, shift=0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 6)], ids=str)
def test_any_shape_of_t(shape: tuple[int, ...]) -> None:
    """SDXL embeds six numbers for each sample."""
    t = torch.rand(shape) * 1000
    out = ops.timestep_embedding(t, 8, flip=True, shift=0.0)
    assert out.shape == (*shape, 8)
    torch.testing.assert_close(out.double(), waves(t, 8, flip=True, shift=0.0), atol=5e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("act", [None, "silu"])
def test_the_first_linear_with_its_activation(act: str | None, bias: bool, dtype: torch.dtype) -> None:
    """In the weights' dtype, the sinusoids before it in t's."""
    t = torch.tensor(TIMES)
    w, b = random(12, 8, dtype=dtype), random(12, dtype=dtype) if bias else None
    out = ops.timestep_embedding(t, 8, flip=False, shift=1.0, w=w, b=b, act=act)
    x = ops.timestep_embedding(t, 8, flip=False, shift=1.0).to(dtype)
    args = (x, w, b)
    assert_within_twice(out, formulas.linear(*up(args, dtype), act=act), formulas.linear(*args, act=act))
