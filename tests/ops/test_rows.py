"""begin_row and end_row against loops over branches, slots and samples, for random tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from tests.numerics import assert_within_twice
from tests.ops.formulas import untouched

R, K, B, C, H, W = 5, 3, 2, 4, 3, 5


def tables(branches: int, *, rescale: float = 0.0, limit: float = torch.inf, dtype: torch.dtype = torch.float32) -> Any:
    shapes = {"a": (R, K, K), "guidance": (R, branches)}
    shapes |= dict.fromkeys(("b", "c", "d"), (R, K))
    names = [f.name for f in dataclasses.fields(ops.RowTables)]
    made = {name: torch.randn(shapes.get(name, (R,)), dtype=dtype) for name in names}
    made["rescale"] = torch.full((R,), rescale, dtype=dtype)
    made["limit"] = torch.full((R,), limit, dtype=dtype)
    return ops.RowTables(**made)


def latents(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, B, C, H, W, dtype=dtype)


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return ops.RowTables(**{f.name: getattr(value, f.name).double() for f in dataclasses.fields(value)})


def slots() -> dict[str, Tensor]:
    mask = (torch.rand(B, 1, H, W) > 0.5).float()
    mask[0, 0, 0] = 0.25  # a soft edge
    return {"noise": latents(), "mask": mask, "z0": latents(), "n0": latents()}


def formula(state: Tensor, e: Tensor, t: Any, r: int, *, noise: Tensor, mask: Tensor, z0: Tensor, n0: Tensor) -> Tensor:
    """The docstring of `end_row`, line by line."""
    branches = [e[g * B : (g + 1) * B] for g in range(len(e) // B)]
    g = sum(t.guidance[r, i] * branch for i, branch in enumerate(branches))
    phi = t.rescale[r]
    if len(branches) > 1 and phi != 0:
        for n in range(B):
            last, guided = branches[-1][n], g[n].clone()
            ratio = ((last - last.mean()).square().sum() / (guided - guided.mean()).square().sum()).sqrt()
            g[n] = phi * guided * ratio + (1 - phi) * guided
    x0 = t.p[r] * state[0] + t.q[r] * g
    x0 = torch.minimum(torch.maximum(x0, -t.limit[r]), t.limit[r])
    new = []
    for i in range(len(state)):
        value = t.b[r, i] * g + t.c[r, i] * noise + t.d[r, i] * x0
        for j in range(len(state)):
            value = value + t.a[r, i, j] * state[j]
        new.append(value)
    new[0] = mask * new[0] + (1 - mask) * (t.u[r] * z0 + t.v[r] * n0)
    return torch.stack(new)


def check_end_row(state: Tensor, e: Tensor, t: Any, r: int, **others: Tensor) -> Tensor:
    row, before = torch.tensor([r]), state.clone()
    with untouched(e, dataclasses.astuple(t), others):
        ops.end_row(state, e, t, row, **others)
    assert row.tolist() == [r + 1]
    wide = {k: v.double() for k, v in others.items()}
    truth = formula(before.double(), e.double(), widened(t), r, **wide)
    assert_within_twice(state, truth, formula(before, e.to(state.dtype), t, r, **others))
    return state


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("r", [0, 2, R - 1])
def test_end_row(branches: int, rescale: float, r: int) -> None:
    check_end_row(latents(K), latents(branches).flatten(0, 1), tables(branches, rescale=rescale), r, **slots())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_end_row_of_a_half_precision_model(dtype: torch.dtype) -> None:
    """The network's output is brought to the state's precision before anything else."""
    e = latents(2).flatten(0, 1).to(dtype)
    check_end_row(latents(K), e, tables(2, rescale=0.5), 1, **slots())


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_end_row_clamps_x0(limit: float) -> None:
    t = tables(2, limit=limit)
    state, e = latents(K), latents(2).flatten(0, 1)
    others = slots()
    clamped = check_end_row(state.clone(), e, t, 3, **others)
    free = check_end_row(state.clone(), e, dataclasses.replace(t, limit=torch.full((R,), torch.inf)), 3, **others)
    assert not torch.allclose(clamped, free)


def test_end_row_leaves_what_the_mask_keeps() -> None:
    others = slots() | {"mask": torch.zeros(B, 1, H, W)}
    t = tables(1)
    state = check_end_row(latents(K), latents(1).flatten(0, 1), t, 0, **others)
    torch.testing.assert_close(state[0], t.u[0] * others["z0"] + t.v[0] * others["n0"])


def test_end_row_counts_through_all_rows() -> None:
    """One row after the other, on one counter: each row is applied once, in order."""
    t, row, state = tables(2), torch.zeros(1, dtype=torch.int64), latents(K)
    others, expected = slots(), state.double()
    wide = {k: v.double() for k, v in others.items()}
    for r in range(R):
        e = latents(2).flatten(0, 1)
        expected = formula(expected, e.double(), widened(t), r, **wide)
        ops.end_row(state, e, t, row, **others)
    assert row.item() == R
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_constant_output_is_no_nan_where_nothing_is_rescaled(branches: int) -> None:
    """Its standard deviation is 0, and 0 · (0 / 0) is NaN."""
    e = torch.full((branches * B, C, H, W), 0.5)
    check_end_row(latents(K), e, tables(branches), 1, **slots())
    check_end_row(latents(K), torch.zeros_like(e), tables(branches), 1, **slots())


def test_rescale_is_each_samples_own() -> None:
    """A sample with a large output does not change its neighbour."""
    t, others = tables(2, rescale=1.0), slots()
    state, e = latents(K), latents(2).flatten(0, 1)
    louder = e.clone()
    louder[1::2] *= 50
    quiet = check_end_row(state.clone(), e, t, 0, **others)
    assert torch.equal(quiet[:, 0], check_end_row(state.clone(), louder, t, 0, **others)[:, 0])


# ------------------------------------------------------------------------------------------------------- begin_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [C, C + 4, C + 5], ids=["text to image", "instruction", "inpainting"])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_begin_row(branches: int, channels: int, dtype: torch.dtype) -> None:
    """Every branch sees the same x; the channels behind it stay; what was there before is overwritten."""
    t, row, state = tables(branches), torch.tensor([2]), latents(K)
    samples = branches * B
    model_input = torch.randn(samples, channels, H, W).to(dtype).contiguous(memory_format=torch.channels_last)
    model_input[:, :C] = torch.nan
    behind = model_input[:, C:].clone()
    mods, modulation = torch.randn(R, 1, 7).to(dtype), torch.full((1, 7), torch.nan, dtype=dtype)
    with untouched(state, mods, dataclasses.astuple(t), row):
        ops.begin_row(state, mods, t, row, model_input=model_input, modulation=modulation)
    expected = (t.in_scale[2].double() * state[0].double()).repeat(branches, 1, 1, 1)
    assert_within_twice(model_input[:, :C], expected, (t.in_scale[2] * state[0]).repeat(branches, 1, 1, 1).to(dtype))
    assert torch.equal(model_input[:, C:], behind)
    assert torch.equal(modulation, mods[2])
    assert model_input.is_contiguous(memory_format=torch.channels_last)


def test_begin_row_with_a_modulation_for_each_sample() -> None:
    t, mods = tables(2), torch.randn(R, 2 * B, 7)
    modulation = torch.full((2 * B, 7), torch.nan)
    model_input = torch.zeros(2 * B, C, H, W)
    ops.begin_row(latents(K), mods, t, torch.tensor([4]), model_input=model_input, modulation=modulation)
    assert torch.equal(modulation, mods[4])
