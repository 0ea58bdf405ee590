"""The U-Net equals diffusers' UNet2DConditionModel, in float32; each configuration is one thing that may go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastldm.model.unet import Added
from tests.model.loading import TOLERANCE, assert_close, unet_pair
from tests.oracle import SD1, SD2, UNEVEN, relative_error

X, D = "CrossAttnDownBlock2D", "DownBlock2D"
XU, U = "CrossAttnUpBlock2D", "UpBlock2D"
TWO = {
    "block_out_channels": (16, 32),
    "down_block_types": (X, D),
    "up_block_types": (U, XU),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1: convolutions around the transformers": SD1,
    "SD 2: linear, heads for each level": SD2,
    "uneven layers, heads, depths; one group": UNEVEN,
    "attention at every level": TWO | {"down_block_types": (X, X), "up_block_types": (XU, XU)},
    "attention in the middle alone": TWO | {"down_block_types": (D, D), "up_block_types": (U, U)},
    "attention on the way up alone": TWO | {"down_block_types": (D, D), "up_block_types": (XU, XU)},
    "one level": TWO | {"block_out_channels": (16,), "down_block_types": (X,), "up_block_types": (XU,)},
    "four levels, channels that shrink": {
        "block_out_channels": (32, 16, 24, 8),
        "down_block_types": (X, D, X, D),
        "up_block_types": (U, XU, U, XU),
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "layers_per_block": (1, 2, 1, 3),
    },
    "groups of one channel, across the skip's edge": TWO | {"norm_num_groups": 16},
    "groups that straddle the skip's edge": TWO | {"block_out_channels": (12, 36), "norm_num_groups": 12},
    "head dim 1": TWO | {"attention_head_dim": 16},
    "one head": TWO | {"attention_head_dim": 1},
    "9 input channels": TWO | {"in_channels": 9},
    "8 input, 3 output channels": TWO | {"in_channels": 8, "out_channels": 3},
    "sines first, frequencies shifted": TWO | {"flip_sin_to_cos": False, "freq_shift": 1},
    "another epsilon": TWO | {"norm_eps": 0.1},
    "no middle block": TWO | {"mid_block_type": None},
    "deeper in the middle": TWO | {"transformer_layers_per_block": (1, 3), "use_linear_projection": True},
}
SIZES = [(16, 16), (13, 9), (8, 22)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_equals_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = unet_pair(cross_attention_dim=24, **config)
    for (height, width), t in zip(SIZES, (999, 500, 0), strict=True):
        x = torch.randn(2, theirs.config.in_channels, height, width)
        states = torch.randn(2, 7, 24)
        expected = theirs(x, torch.tensor(t), states).sample
        mods = ours.modulation(torch.tensor([float(t)]))
        assert mods.shape[:2] == (1, 1)
        assert_close(ours(channels_last(x), mods[0], ours.context(states)), expected)


@torch.no_grad()
def test_context_and_time_reach_the_output() -> None:
    """Else the comparison above would not see them exchanged between samples or layers."""
    ours, _ = unet_pair(cross_attention_dim=24, **SD2)
    x, states = channels_last(torch.randn(1, 4, 16, 16)), torch.randn(2, 7, 24)
    mods = ours.modulation(torch.tensor([10.0, 900.0]))
    out = ours(x, mods[0], ours.context(states[:1]))
    assert relative_error(ours(x, mods[0], ours.context(states[1:])), out) > 100 * TOLERANCE
    assert relative_error(ours(x, mods[1], ours.context(states[:1])), out) > 100 * TOLERANCE


SDXL = {
    "block_out_channels": (16, 32),
    "down_block_types": (D, X),
    "up_block_types": (XU, U),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 3),
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@torch.no_grad()
def test_added_text_and_sizes() -> None:
    """SDXL: six numbers for each sample, so the modulation has a row for each."""
    ours, theirs = unet_pair(**SDXL)
    added = Added(torch.randn(2, 32), torch.tensor([[1024.0, 768, 0, 0, 1024, 768], [512, 640, 32, 16, 1024, 1024]]))
    mods = ours.modulation(torch.tensor([37.0, 801.0]), added)
    assert mods.shape[:2] == (2, 2)
    x, states = torch.randn(2, 4, 13, 17), torch.randn(2, 7, 24)
    for row, t in zip(mods, (37, 801), strict=True):
        expected = theirs(
            x, torch.tensor(t), states, added_cond_kwargs={"text_embeds": added.text, "time_ids": added.numbers}
        ).sample
        assert_close(ours(channels_last(x), row, ours.context(states)), expected)


def test_added_conditions_are_asked_for() -> None:
    ours, _ = unet_pair(**SDXL)
    with pytest.raises(ValueError, match="added"):
        ours.modulation(torch.tensor([1.0]))


@pytest.mark.parametrize("name", [*CONFIGS][:3:2])
@torch.no_grad()
def test_modulation_of_all_steps_at_once_is_that_of_each(name: str) -> None:
    ours, _ = unet_pair(cross_attention_dim=24, **CONFIGS[name])
    timesteps = torch.tensor([999.0, 800.5, 333.0, 1.0, 0.0])
    together = ours.modulation(timesteps)
    for row, t in zip(together, timesteps, strict=True):
        torch.testing.assert_close(row, ours.modulation(t[None])[0], atol=1e-6, rtol=1e-6)
    assert relative_error(together[0], together[1]) > 1e-3


@pytest.mark.parametrize("name", [*CONFIGS][:3:2])
@torch.no_grad()
def test_residuals_of_a_control_network(name: str) -> None:
    ours, theirs = unet_pair(cross_attention_dim=24, **CONFIGS[name])
    x, states, t = torch.randn(2, 4, 13, 10), torch.randn(2, 7, 24), 321
    down, middle = control_shapes(theirs, x)
    residuals = [torch.randn(shape) for shape in (*down, middle)]
    kept = [r.clone() for r in residuals]
    expected = theirs(
        x,
        torch.tensor(t),
        states,
        down_block_additional_residuals=tuple(residuals[:-1]),
        mid_block_additional_residual=residuals[-1],
    ).sample
    mods, context = ours.modulation(torch.tensor([float(t)]))[0], ours.context(states)
    out = ours(channels_last(x), mods, context, [channels_last(r) for r in residuals])
    assert_close(out, expected)
    assert relative_error(ours(channels_last(x), mods, context), expected) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(residuals, kept, strict=True))
    with pytest.raises(ValueError, match="zip"):
        ours(channels_last(x), mods, context, [*residuals, residuals[-1]])


def control_shapes(theirs: Any, x: torch.Tensor) -> tuple[list[torch.Size], torch.Size]:
    """The shapes that a ControlNet's outputs have: of every skip connection, and of the middle's output."""
    down, middle = [], []
    hooks = [
        theirs.conv_in.register_forward_hook(lambda m, i, out: down.append(out.shape)),
        theirs.mid_block.register_forward_hook(lambda m, i, out: middle.append(out.shape)),
        *(
            block.register_forward_hook(lambda m, i, out: down.extend(o.shape for o in out[1]))
            for block in theirs.down_blocks
        ),
    ]
    theirs(x, torch.tensor(0), torch.randn(2, 7, 24))
    for hook in hooks:
        hook.remove()
    return down, middle[0]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)
