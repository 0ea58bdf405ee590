from __future__ import annotations

import pytest
import torch

from fastldm import ops
from tests.ops.formulas import DTYPES, attention, check, random, untouched

# (B, Lq, Lk, H, D)
SHAPES = {
    (2, 16, 16, 4, 8): "self-attention",
    (2, 9, 77, 2, 40): "text: the window of 77, the head dim of SD 1",
    (1, 1, 1, 1, 1): "one of everything",
    (1, 33, 5, 3, 7): "odd sizes, more queries than keys",
    (1, 4, 70, 1, 64): "one head: the autoencoder",
    (2, 3, 16, 16, 1): "head dim 1",
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, lq, lk, heads, dim = shape
    q = random(batch, lq, heads, dim, dtype=dtype)
    k, v = (random(batch, lk, heads, dim, dtype=dtype) for _ in range(2))
    assert check(ops.attention, attention, q, k, v).is_contiguous()


@DTYPES
@pytest.mark.parametrize("scale", [0.0, 0.7, 2.0])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    q, k, v = (random(1, 6, 2, 8, dtype=dtype) for _ in range(3))
    check(ops.attention, attention, q, k, v, scale=scale)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 6), (1, 1, 5, 6), (2, 3, 5, 6), (2, 1, 1, 6), (1, 3, 5, 1)], ids=str)
def test_mask_is_added_and_broadcast(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = random(2, 5, 3, 8, dtype=dtype)
    k, v = (random(2, 6, 3, 8, dtype=dtype) for _ in range(2))
    check(ops.attention, attention, q, k, v, mask=random(*shape, dtype=dtype, scale=2.0))


@DTYPES
def test_minus_infinity_hides_a_key(dtype: torch.dtype) -> None:
    """Even one that holds NaN's neighbours: huge values."""
    q, k, v = (random(1, 6, 2, 8, dtype=dtype) for _ in range(3))
    mask = torch.full((6, 6), -torch.inf, dtype=dtype).triu(1)
    out = check(ops.attention, attention, q, k, v, mask=mask)
    k[:, 3:], v[:, 3:] = 100.0, 1e4
    torch.testing.assert_close(ops.attention(q, k, v, mask=mask)[:, :3], out[:, :3])


@DTYPES
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = (random(1, 5, 2, 8, dtype=dtype, scale=s) for s in (30.0, 30.0, 1.0))
    check(ops.attention, attention, q, k, v)


@DTYPES
def test_views_of_a_packed_projection(dtype: torch.dtype) -> None:
    """q, k and v as the model has them: strided, side by side, one head's rows far apart."""
    packed = random(2, 10, 3 * 4 * 8, dtype=dtype)
    q, k, v = packed.unflatten(-1, (3, 4, 8)).unbind(-3)
    assert not q.is_contiguous()
    out = check(ops.attention, attention, q, k, v)
    assert torch.equal(out, ops.attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_views_of_all_layers_keys() -> None:
    """The context holds every layer's keys and values in one tensor."""
    packed, q = random(2, 7, 48, dtype=torch.float32), random(2, 5, 2, 8, dtype=torch.float32)
    k, v = (part.unflatten(-1, (2, 8)) for part in packed[:, :, 5:37].split(16, dim=-1))
    with untouched(packed, q):
        check(ops.attention, attention, q, k, v)


@pytest.mark.parametrize("dim", [8, 40, 72])
def test_long_sequences_of_half_precision(dim: int) -> None:
    """Where the CPU's path pads the head dim to its tiles."""
    q, k, v = (random(1, 600, 1, dim, dtype=torch.bfloat16) for _ in range(3))
    check(ops.attention, attention, q, k, v)


def test_zero_columns_for_wide_registers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding that CPUs with AMX get, taken here as if this were one: head dim 40, 512 keys."""
    from fastldm.ops import reference

    q, k, v = (torch.randn(1, 512, 2, 40, dtype=torch.bfloat16) for _ in range(3))
    plain = reference.attention(q, k, v)
    monkeypatch.setattr(reference, "_native_cpu_dtypes", lambda: frozenset({torch.bfloat16}))
    assert reference._padded_head_dim(q, k) == 64
    padded = reference.attention(q, k, v)
    assert padded.shape == plain.shape
    assert padded.is_contiguous()
    truth = reference.attention(q.float(), k.float(), v.float())
    assert (padded - truth).abs().max() <= 2 * (plain - truth).abs().max()
