from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastldm import ops
from tests.numerics import assert_within_twice, wider
from tests.ops import formulas
from tests.ops.formulas import DTYPES, check, image, random, untouched

EPS = 1e-5
# (N, C, C2, H, W, groups)
SHAPES = {
    (2, 8, 0, 5, 7, 4): "plain",
    (1, 6, 0, 3, 3, 1): "one group: a layer norm over all",
    (2, 6, 0, 3, 3, 6): "a group for each channel",
    (1, 4, 0, 1, 1, 2): "one pixel",
    (2, 8, 8, 4, 5, 4): "two inputs, groups end at the seam",
    (2, 8, 4, 4, 5, 3): "two inputs, still at the seam: 4 channels a group",
    (2, 6, 10, 4, 5, 2): "a group straddles the seam",
    (1, 10, 2, 3, 3, 3): "the last group holds two channels of x and all of x2",
    (2, 3, 9, 4, 4, 1): "everything is one group",
}


def norm_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n, c, c2, height, width, _ = shape
    x = image(n, c, height, width, dtype=dtype, scale=2.0, mean=0.2)
    x2 = image(n, c2, height, width, dtype=dtype, mean=-0.1) if c2 else None
    return x, random(c + c2, dtype=dtype, mean=1.0), random(c + c2, dtype=dtype), x2


@DTYPES
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_equals_the_formula(shape: tuple[int, ...], act: str | None, dtype: torch.dtype) -> None:
    x, w, b, x2 = norm_arguments(shape, dtype)
    out = check(ops.group_norm, formulas.group_norm, x, w, b, shape[-1], EPS, x2=x2, act=act)
    assert out.is_contiguous(memory_format=torch.channels_last)


@DTYPES
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("known", ["x", "x2", "both", "neither"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_from_statistics(shape: tuple[int, ...], known: str, act: str | None, dtype: torch.dtype) -> None:
    """They come from the producers, float32 (or float64), each channel's; what is unknown is computed."""
    x, w, b, x2 = norm_arguments(shape, dtype)
    wide = ops.compute_dtype(dtype)
    first = formulas.channel_stats(x.to(wide)) if known in ("x", "both") else None
    second = formulas.channel_stats(x2.to(wide)) if x2 is not None and known in ("x2", "both") else None
    stats = first if x2 is None else (first, second)
    with untouched(x, w, b, x2, first, second):
        out = ops.group_norm(x, w, b, shape[-1], EPS, x2=x2, act=act, stats=stats)
    up = wider(dtype)
    args = (x, w, b, shape[-1], EPS)
    truth = formulas.group_norm(*formulas.up(args, dtype), x2=formulas.up(x2, dtype), act=act)
    assert out.dtype == dtype
    assert truth.dtype == (torch.float64 if dtype == torch.float64 else up)
    assert_within_twice(out, truth, formulas.group_norm(*args, x2=x2, act=act))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_given_statistics_are_used() -> None:
    """Wrong ones give a wrong result, else the test above would prove nothing."""
    x, w, b, x2 = norm_arguments((1, 4, 4, 3, 3, 2), torch.float32)
    wrong = formulas.channel_stats(x) * 4
    right = ops.group_norm(x, w, b, 2, EPS, x2=x2)
    assert not torch.allclose(right, ops.group_norm(x, w, b, 2, EPS, x2=x2, stats=(wrong, None)), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [True, False], ids=["statistics given", "statistics computed"])
def test_group_norm_of_a_large_mean(given: bool, dtype: torch.dtype) -> None:
    """Mean and M2 merge without cancelling; E[x²] − E[x]² loses everything here."""
    x = image(1, 8, 16, 16, dtype=torch.float32, mean=1000.0).to(dtype)
    w, b = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    truth = formulas.group_norm(x.double(), w.double(), b.double(), 2, EPS)
    yardstick = formulas.group_norm(x.float(), w.float(), b.float(), 2, EPS).to(dtype)
    stats = formulas.channel_stats(x.float()) if given else None
    assert_within_twice(ops.group_norm(x, w, b, 2, EPS, stats=stats), truth, yardstick)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
def test_group_norm_eps_counts(eps: float) -> None:
    x, w, b, _ = norm_arguments((1, 8, 0, 3, 3, 2), torch.float32)
    check(ops.group_norm, formulas.group_norm, x * 0.01, w, b, 2, eps)


def test_group_norm_of_a_constant_is_the_bias() -> None:
    x, w, b = torch.full((1, 4, 3, 3), 7.0), random(4, dtype=torch.float32), random(4, dtype=torch.float32)
    expected = b[None, :, None, None].expand(1, 4, 3, 3)
    for stats in (None, formulas.channel_stats(x)):
        torch.testing.assert_close(ops.group_norm(x, w, b, 2, EPS, stats=stats), expected, atol=1e-4, rtol=0)


LAYERS = {(2, 5, 16): "tokens", (3, 1): "one channel", (7,): "a vector", (2, 3, 4, 33): "four dimensions, odd"}


@DTYPES
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_norm_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, scale=2.0, mean=0.5)
    w, b = random(shape[-1], dtype=dtype, mean=1.0), random(shape[-1], dtype=dtype)
    check(ops.layer_norm, formulas.layer_norm, x, w, b, EPS)


@DTYPES
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_norm_adds_first_and_returns_both(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, scale=3.0)
    w, b = random(shape[-1], dtype=dtype), random(shape[-1], dtype=dtype)
    with untouched(x, residual, w, b):
        out, total = ops.layer_norm(x, w, b, EPS, residual=residual)
    assert torch.equal(total, x + residual)

    def formula(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        return formulas.layer_norm(x + residual, w, b, EPS)

    tensors = (x, w, b, residual)
    assert_within_twice(out, formula(*formulas.up(tensors, dtype)), formula(*tensors))
