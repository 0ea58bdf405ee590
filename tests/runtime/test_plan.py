"""The one loop: static buffers, tables that are refilled, history, noise, guidance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastldm.model.unet import UNet
from fastldm.runtime.plan import ROWS, SLOTS, Inpainting, Plan
from fastldm.sampling import SamplerTable
from tests.oracle import relative_error
from tests.runtime.tiny import SIZE, by_hand, guidance, modulations, plan_for, table, unet, with_history

TOLERANCE = 1e-4  # float32 over many rows; a wrong row, slot or noise is off by far more
ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    return unet(**ONE_LEVEL)


@torch.no_grad()
def run(
    plan: Plan, model: UNet, t: SamplerTable, weights: tuple[float, ...] = (1.0,), *, seed: int = 7, **start: Any
) -> tuple[list[int], dict[int, Tensor], Tensor, Tensor]:
    """-> the rows that ended a step, the noise of every row that drew, the first x, the context states."""
    g = torch.Generator().manual_seed(seed)
    shape = tuple(plan.noise.shape)
    x = torch.randn(shape, generator=g)
    states = torch.randn(len(weights) * plan.shape.batch, plan.shape.length, 24, generator=g)
    drawn: dict[int, Tensor] = {}

    def draw(row: int) -> Tensor | None:
        if not t.draws[row]:
            return None
        drawn[row] = torch.randn(shape, generator=g)
        return drawn[row]

    plan.start(x, states=states.to(model.conv_in.weight.dtype), **start)
    ended = list(plan.run(t, guidance(t.rows, *weights), modulations(model, t), draw))
    return ended, drawn, x, states


@pytest.mark.parametrize("steps", [1, ROWS, ROWS + 1, 2 * ROWS + 1])
def test_a_run_of_any_length_equals_the_table_by_hand(model: UNet, steps: int) -> None:
    """Tables on the device hold 128 rows: longer runs refill them, and lose neither history nor noise."""
    t = with_history(table(steps), slots=3)
    plan = plan_for(model)
    _, drawn, x, states = run(plan, model, t)
    expected = by_hand(model, t, guidance(t.rows), x, states, drawn)
    assert relative_error(plan.state[:3], expected) <= TOLERANCE
    assert not plan.state[3:].any(), "unused history stays zero"
    assert plan.row.item() == (steps - 1) % ROWS + 1


@pytest.mark.parametrize("slots", [1, 2, SLOTS])
def test_history(model: UNet, slots: int) -> None:
    t = with_history(table(9), slots, seed=slots)
    plan = plan_for(model, batch=2)
    _, drawn, x, states = run(plan, model, t)
    assert relative_error(plan.state[:slots], by_hand(model, t, guidance(9), x, states, drawn)) <= TOLERANCE


@pytest.mark.parametrize("weights", [(1.0,), (-6.5, 7.5), (-0.5, -6.0, 7.5)], ids=["one", "two", "three"])
def test_guidance_branches(model: UNet, weights: tuple[float, ...]) -> None:
    t = table(5)
    plan = plan_for(model, batch=2)
    _, drawn, x, states = run(plan, model, t, weights)
    expected = by_hand(model, t, guidance(5, *weights), x, states, drawn)
    assert relative_error(plan.state[:1], expected) <= TOLERANCE


@pytest.mark.parametrize("begin", [1, ROWS, ROWS + 1])
def test_a_run_continues_from_any_row(model: UNet, begin: int) -> None:
    """A second run from `begin` on, on the first one's state, is the rest of the whole; tables are refilled there."""
    t, whole, parts = table(ROWS + 3), plan_for(model), plan_for(model)
    x, states, mods = torch.randn(1, 4, *SIZE), torch.randn(1, 5, 24), modulations(model, t)
    for plan in (whole, parts):
        plan.start(x, states=states)
    assert list(whole.run(t, guidance(t.rows), mods, lambda r: x)) == list(range(t.rows))
    first = parts.run(t, guidance(t.rows), mods, lambda r: x)
    assert [next(first) for _ in range(begin)] == list(range(begin))
    assert list(parts.run(t, guidance(t.rows), mods, lambda r: x, begin=begin)) == list(range(begin, t.rows))
    assert torch.equal(whole.state, parts.state)


def test_noise_is_drawn_where_the_table_says_in_order(model: UNet) -> None:
    draws = np.array([1, 0, 0, 1, 1, 0], dtype=bool)
    _, drawn, *_ = run(plan_for(model), model, replace(table(6), draws=draws))
    assert list(drawn) == [0, 3, 4]
    assert not run(plan_for(model), model, table(6))[1]


def test_latents_are_ready_when_a_step_is_yielded(model: UNet) -> None:
    """Neither before the row's update nor after the next one: a run of k steps equals k steps of a longer run."""
    t, plan = table(4), plan_for(model)
    x, states = torch.randn(1, 4, *SIZE), torch.randn(1, 5, 24)
    plan.start(x, states=states)
    seen: Iterator[int] = plan.run(t, guidance(4), modulations(model, t), lambda r: x)
    for r in seen:
        cut = {f.name: getattr(t, f.name)[: r + 1] for f in fields(t) if isinstance(getattr(t, f.name), np.ndarray)}
        expected = by_hand(model, replace(t, **cut), guidance(r + 1), x, states, {})
        assert relative_error(plan.state[0], expected[0]) <= TOLERANCE


def places(plan: Plan, branches: int) -> dict[str, int]:
    """Where every buffer of a row lies in memory."""
    row = plan.of(branches)
    tensors = dict(row.buffers(plan))
    tensors |= {
        f"context {i} {kind}": kv for i, layer in enumerate(row.context) for kind, kv in enumerate(layer[0][:2])
    }
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_buffers_stay_where_they_are(model: UNet) -> None:
    """Over runs of other samplers, lengths, guidance and prompts: what a captured graph would rely on."""
    plan = plan_for(model, batch=2)
    before = places(plan, 2)
    assert len(before) > 20
    for t, weights in (
        (table(3), (0.0, 1.0)),
        (with_history(table(ROWS + 1), 4), (-6.5, 7.5)),
        (table(2), (-1.0, 2.0)),
    ):
        run(plan, model, t, weights)
        assert places(plan, 2) == before


def test_nothing_is_left_of_the_run_before(model: UNet) -> None:
    used, fresh = plan_for(model), plan_for(model)
    run(used, model, with_history(table(11), SLOTS), seed=1)
    for plan in (used, fresh):
        run(plan, model, table(5))
    assert torch.equal(used.state, fresh.state)


def test_nan_of_the_run_before_does_not_come_back(model: UNet) -> None:
    """0 · NaN is NaN: history and noise that the table multiplies by 0 must be cleared."""
    used, fresh = plan_for(model), plan_for(model)
    for name, buffer in used.of(1).buffers(used).items():
        if name != "row":
            buffer.fill_(torch.nan)
    for plan in (used, fresh):
        run(plan, model, table(5))
    assert torch.equal(used.state, fresh.state)


def test_inpainting_keeps_the_image_where_the_mask_is_black(model: UNet) -> None:
    mask = torch.ones(2, 1, *SIZE)
    mask[0, :, :4] = 0
    z0, n0 = torch.randn(2, 4, *SIZE), torch.randn(2, 4, *SIZE)
    plan, plain = plan_for(model, batch=2), plan_for(model, batch=2)
    run(plan, model, table(4), inpainting=Inpainting(mask, z0, n0))
    torch.testing.assert_close(plan.state[0][0, :, :4], z0[0, :, :4])
    run(plain, model, table(4))
    assert torch.equal(plan.state[0][1], plain.state[0][1]), "a white mask changes nothing"
    run(plan, model, table(4))
    assert torch.equal(plan.state, plain.state), "and the next run has none"


def test_extra_channels_stay_behind_the_latents() -> None:
    model = unet(**ONE_LEVEL, in_channels=9)
    extra = torch.randn(4, 5, *SIZE)
    plan = plan_for(model, batch=2)
    run(plan, model, table(3), (-1.0, 2.0), extra_channels=extra)
    assert torch.equal(plan.of(2).model_input[:, 4:], extra)
    first = plan.state.clone()
    run(plan, model, table(3), (-1.0, 2.0), extra_channels=extra + 1)
    assert not torch.equal(plan.state, first), "the network reads them"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_is_at_least_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = unet(**ONE_LEVEL, dtype=dtype)
    plan = plan_for(model)
    row = plan.of(1)
    assert plan.state.dtype == plan.noise.dtype == row.tables.a.dtype == max(dtype, torch.float32, key=_bits)
    assert row.model_input.dtype == row.mods.dtype == dtype
    run(plan, model, table(3))
    assert torch.isfinite(plan.state).all()


def _bits(dtype: torch.dtype) -> int:
    return dtype.itemsize
