from __future__ import annotations

import pytest
import torch

from fastldm import ops
from tests.ops import formulas
from tests.ops.formulas import DTYPES, check, random

ACTS = [None, "silu", "gelu", "quick_gelu"]
# (batch dimensions, K, N)
SHAPES = {
    ((2, 5), 16, 24): "tokens",
    ((3,), 7, 5): "odd",
    ((), 4, 3): "a vector",
    ((1, 1), 1, 1): "one of everything",
    ((2, 3, 2), 33, 8): "three batch dimensions",
}


@DTYPES
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(
    shape: tuple[tuple[int, ...], int, int], residual: bool, bias: bool, act: str | None, dtype: torch.dtype
) -> None:
    batch, k, n = shape
    x, w = random(*batch, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5)
    b = random(n, dtype=dtype) if bias else None
    r = random(*batch, n, dtype=dtype, scale=2.0) if residual else None
    check(ops.linear, formulas.linear, x, w, b, act=act, residual=r)


@DTYPES
def test_the_residual_may_be_the_input(dtype: torch.dtype) -> None:
    """As in a transformer's block: neither the input nor the residual is overwritten."""
    x, w = random(3, 8, dtype=dtype), random(8, 8, dtype=dtype)
    check(ops.linear, formulas.linear, x, w, residual=x)


def test_a_weight_that_returns_its_input_leaves_it_alone() -> None:
    """An activation in place would write into x where the product is a view of it."""
    x = random(2, 1, dtype=torch.float32)
    check(ops.linear, formulas.linear, x, torch.ones(1, 1), act="silu", residual=x)


@DTYPES
def test_strided_input_and_weight(dtype: torch.dtype) -> None:
    x, w = random(6, 10, dtype=dtype)[::2, 1:9], random(20, 8, dtype=dtype)[3:9]
    check(ops.linear, formulas.linear, x, w, random(6, dtype=dtype), act="gelu")


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "quick_gelu"])
def test_activations_far_from_zero(act: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-60.0, -10, -3, -1, -1e-3, 0, 1e-3, 1, 3, 10, 60]], dtype=dtype).T
    check(ops.linear, formulas.linear, x, torch.ones(1, 1, dtype=dtype), act=act)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="tanh"):
        ops.linear(torch.ones(1, 1), torch.ones(1, 1), act="tanh")  # type: ignore[arg-type]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype) -> None:
    batch, k, n = shape
    x, w = random(*batch, k, dtype=dtype), random(2 * n, k, dtype=dtype, scale=k**-0.5)
    out = check(ops.geglu, formulas.geglu, x, w, random(2 * n, dtype=dtype))
    assert out.shape == (*batch, n)


def test_geglu_takes_the_values_rows_first() -> None:
    w, b = torch.zeros(2, 1), torch.tensor([2.0, 100.0])
    torch.testing.assert_close(ops.geglu(torch.zeros(1, 1), w, b), torch.tensor([[200.0]]))
