"""Weights changed in place under a warm plan, and brought back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import WeightsError
from fastldm.model.layers import Conv2d, derive
from fastldm.model.unet import UNet
from fastldm.runtime.merge import Merged
from tests.runtime.recorded import Recorded
from tests.runtime.test_plan import run
from tests.runtime.tiny import plan_for, table, unet

CHANGED = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "mid_block.resnets.0.time_emb_proj.weight",
    "up_blocks.0.upsamplers.0.conv.weight",
    "up_blocks.0.upsamplers.0.conv.bias",
    "conv_in.weight",
)


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    network = unet()
    derive(network)
    return network


def tensor(network: UNet, name: str) -> Tensor:
    merged = Merged(network)
    return merged._rows(merged._addresses[name])


def deltas(network: UNet, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(tensor(network, name).shape, generator=g) for name in CHANGED}


@torch.no_grad()
def rebuilt(network: UNet, changes: dict[str, Tensor]) -> UNet:
    """A network made with the changed weights."""
    new = copy.deepcopy(network)
    for name, delta in changes.items():
        rows = tensor(new, name)
        rows.copy_(rows + delta)
    for layer in new.modules():
        if isinstance(layer, Conv2d):
            layer.w_phases = None
    derive(new)
    return new


def latents(network: UNet, recorded: Recorded | None = None) -> tuple[Tensor, object]:
    plan = plan_for(network, batch=2, graphs=recorded)
    run(plan, network, table(2), (-1.0, 2.0))
    return plan.state.clone(), plan


def test_a_warm_plan_goes_on_as_one_that_is_built_anew(model: UNet) -> None:
    recorded, changes, merged = Recorded(), deltas(model), Merged(model)
    before, plan = latents(model, recorded)
    expected, _ = latents(rebuilt(model, changes))
    for name, delta in changes.items():
        merged.merge(name, delta)
    run(plan, model, table(2), (-1.0, 2.0))  # type: ignore[arg-type]
    assert torch.equal(plan.state, expected)  # type: ignore[attr-defined]
    assert not torch.equal(expected, before)
    merged.restore()
    run(plan, model, table(2), (-1.0, 2.0))  # type: ignore[arg-type]
    assert torch.equal(plan.state, before)  # type: ignore[attr-defined]
    assert recorded.count == 1


@pytest.mark.parametrize("name", CHANGED)
def test_each_change_alone_is_seen(model: UNet, name: str) -> None:
    before, plan = latents(model)
    Merged(model).merge(name, deltas(model)[name])
    run(plan, model, table(2), (-1.0, 2.0))  # type: ignore[arg-type]
    assert not torch.equal(plan.state, before)  # type: ignore[attr-defined]


def test_what_is_derived_follows_in_place(model: UNet) -> None:
    layer = model.up_blocks[0].upsamplers[0].conv  # type: ignore[union-attr, index]
    place, base = layer.w_phases.data_ptr(), layer.w_phases.clone()
    merged = Merged(model)
    merged.merge("up_blocks.0.upsamplers.0.conv.weight", torch.ones_like(layer.weight))
    assert torch.equal(layer.w_phases, ops.phase_weights(layer.weight))
    assert not torch.equal(layer.w_phases, base)
    merged.restore()
    assert torch.equal(layer.w_phases, base)
    assert layer.w_phases.data_ptr() == place


def test_engines_that_share_a_network_restore_the_same(model: UNet) -> None:
    name = CHANGED[0]
    base = tensor(model, name).clone()
    Merged(model).merge(name, deltas(model)[name])
    other = Merged(model)
    assert other.touched == (name,)
    other.restore()
    assert torch.equal(tensor(model, name), base)


def test_changes_are_stacked_each_on_the_one_before(model: UNet) -> None:
    name, first, second = CHANGED[0], deltas(model, 1)[CHANGED[0]], deltas(model, 2)[CHANGED[0]]
    base, merged = tensor(model, name).clone(), Merged(model)
    merged.merge(name, first)
    merged.merge(name, second)
    assert torch.equal(tensor(model, name), (base + first) + second)
    assert merged.touched == (name,)
    merged.restore()
    assert torch.equal(tensor(model, name), base)
    assert merged.touched == ()


def test_a_half_precision_weight_is_rounded_once() -> None:
    torch.manual_seed(0)
    model = unet(dtype=torch.bfloat16)
    name = CHANGED[0]
    base, delta = tensor(model, name).clone(), deltas(model)[name]
    Merged(model).merge(name, delta)
    assert torch.equal(tensor(model, name), (base.float() + delta).bfloat16())


@pytest.mark.parametrize(
    ("name", "delta", "said"),
    [
        ("no.such.weight", torch.zeros(1), "no such tensor"),
        (CHANGED[0], torch.zeros(3, 3), "the change has shape"),
        (CHANGED[0], None, "is not finite"),
    ],
    ids=["name", "shape", "nan"],
)
def test_a_wrong_change_changes_nothing(model: UNet, name: str, delta: Tensor | None, said: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = torch.full_like(tensor(model, name), torch.nan) if delta is None else delta
    merged = Merged(model)
    with pytest.raises(WeightsError, match=said) as caught:
        merged.merge(name, wrong)
    assert caught.value.field == name
    assert merged.touched == ()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
