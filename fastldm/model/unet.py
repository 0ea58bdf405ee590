"""The conditional U-Net of Stable Diffusion 1.x, 2.x and SDXL.

    mods = unet.modulation(timesteps, added)      # all steps at once
    ctx  = unet.context(states)                   # once per prompt
    e    = unet(x, mods[row], ctx)                # what is left is the step

Rombach et al., arXiv 2112.10752; Podell et al., arXiv 2307.01952. Topology: `UNetConfig.down`, `.mid_depth`, `.up`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.config import Level, UNetConfig
from fastldm.model.layers import (
    Context,
    Conv2d,
    CrossAttention,
    Downsample,
    GroupNorm,
    Linear,
    Map,
    ResBlock,
    SpatialTransformer,
    Upsample,
)


class Added(NamedTuple):
    """SDXL's added conditions: a pooled text embedding (B, P) and numbers such as sizes and crop (B, n)."""

    text: Tensor
    numbers: Tensor


class Embedding(nn.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(c_in, c_out), Linear(c_out, c_out)


class UNet(nn.Module):
    hub_names = ((".to_out.", ".to_out.0."), (".ff.up.", ".ff.net.0.proj."), (".ff.down.", ".ff.net.2."))

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.down[0].channels, config.down[-1].channels
        self.conv_in = Conv2d(config.in_channels, first, 3)
        self.time_embedding = Embedding(first, config.time_dim)
        self.add_embedding = Embedding(config.added.total_dim, config.time_dim) if config.added else None
        self.down_blocks = _way_down(config)
        self.mid_block = _middle(config) if config.mid_depth is not None else None
        self.up_blocks = _way_up(config, skips=_skip_channels(config.down), channels=last)
        self.conv_norm_out = GroupNorm(config.up[-1].channels, config.groups, config.eps)
        self.conv_out = Conv2d(config.up[-1].channels, config.out_channels, 3, normed=False)
        self._pack_time_projections()
        self._pack_context_projections()

    def _pack_time_projections(self) -> None:
        parts, start = [], 0
        for name, block in self.named_modules():
            if isinstance(block, ResBlock):
                block.columns = slice(start, start + block.c_out)
                start += block.c_out
                parts.append((f"{name}.time_emb_proj", block.c_out))
        self.time_projections = Linear.packed(self.config.time_dim, parts, bias=True)

    def _pack_context_projections(self) -> None:
        self.cross_attentions: list[tuple[int, int]] = []  # channels and heads of each, in the context's order
        parts = []
        for name, layer in self.named_modules():
            if isinstance(layer, CrossAttention):
                layer.layer = len(self.cross_attentions)
                self.cross_attentions.append((layer.channels, layer.heads))
                parts += [(f"{name}.to_k", layer.channels), (f"{name}.to_v", layer.channels)]
        self.context_projections = Linear.packed(self.config.context_dim, parts, bias=False)

    def modulation(self, timesteps: Tensor, added: Added | None = None) -> Tensor:
        """Every block's shift for every step.

        timesteps: (S,) float32, in the units of training (0 to 999). added: for models with `config.added`.
        -> (S, B or 1, Σ) in the model's dtype; B where `added` differs per sample.
        """
        c, e = self.config, self.time_embedding
        hidden = ops.timestep_embedding(
            timesteps,
            c.down[0].channels,
            flip=c.flip_sin_to_cos,
            shift=c.freq_shift,
            w=e.linear_1.weight,
            b=e.linear_1.bias,
            act="silu",
        )
        embedding = e.linear_2(hidden)[:, None]
        if self.add_embedding is not None:
            if added is None:
                raise ValueError("this U-Net needs `added`: a pooled text embedding and the sizes")
            embedding = embedding + self._added_embedding(added)
        return self.time_projections(F.silu(embedding))

    def _added_embedding(self, added: Added) -> Tensor:
        c, e = self.config, self.add_embedding
        assert c.added is not None
        assert e is not None
        waves = ops.timestep_embedding(
            added.numbers.float(), c.added.number_dim, flip=c.flip_sin_to_cos, shift=c.freq_shift
        )
        condition = F.pad(added.text, (0, waves[0].numel())).clone()
        condition[:, added.text.shape[1] :] = waves.flatten(1)
        return e.linear_2(e.linear_1(condition, act="silu"))

    def context(self, states: Tensor) -> Context:
        """Keys and values of every cross-attention layer: states (B, L, context_dim) -> views of one projection."""
        return self.split_context(self.context_projections(states))

    def split_context(self, packed: Tensor) -> Context:
        """packed: (B, L, Σ), all layers' keys and values side by side -> per layer a list of (K, V, scale), views."""
        widths = [channels for channels, _ in self.cross_attentions for _ in ("k", "v")]
        halves = packed.split(widths, dim=-1)
        return [
            [(k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1)), None)]
            for (_, heads), k, v in zip(self.cross_attentions, halves[::2], halves[1::2], strict=True)
        ]

    def forward(
        self, x: Tensor, modulation: Tensor, context: Context, residuals: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The network's raw output for one step.

        x: (N, in_channels, H, W), channels_last. modulation: (N or 1, Σ), one row of `modulation()`.
        residuals: added to the skip connections, from the first to the last, and to the middle's output (ControlNet).
        -> (N, out_channels, H, W).
        """
        h = self.conv_in(Map(x))
        skips = [h]
        for block in self.down_blocks:
            h = block(h, modulation, context, skips)
        if self.mid_block is not None:
            h = self.mid_block(h, modulation, context)
        if residuals is not None:
            skips = [Map(skip.x + r) for skip, r in zip(skips, residuals[:-1], strict=True)]
            h = Map(h.x + residuals[-1])
        for block in self.up_blocks:
            h = block(h, modulation, context, skips)
        return self.conv_out(self.conv_norm_out(h, act="silu")).x


class DownBlock(nn.Module):
    def __init__(self, c_in: int, level: Level, config: UNetConfig, *, downsample: bool) -> None:
        super().__init__()
        ins = [c_in] + [level.channels] * (level.layers - 1)
        self.resnets = nn.ModuleList(ResBlock(c, level.channels, config.groups, config.eps) for c in ins)
        self.attentions = _transformers(level, config)
        self.downsamplers = nn.ModuleList([Downsample(level.channels, "same")] if downsample else [])

    def forward(self, h: Map, modulation: Tensor, context: Context, skips: list[Map]) -> Map:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, None, modulation)
            if self.attentions:
                h = self.attentions[i](h, context)
            skips.append(h)
        for downsample in self.downsamplers:
            h = downsample(h)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    def __init__(self, level: Level, config: UNetConfig) -> None:
        super().__init__()
        c = level.channels
        self.resnets = nn.ModuleList(ResBlock(c, c, config.groups, config.eps) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(c, level.heads, level.depth, config.groups)])

    def forward(self, h: Map, modulation: Tensor, context: Context) -> Map:
        h = self.attentions[0](self.resnets[0](h, None, modulation), context)
        return self.resnets[1](h, None, modulation)


class UpBlock(nn.Module):
    def __init__(self, c_in: int, skips: Sequence[int], level: Level, config: UNetConfig, *, upsample: bool) -> None:
        super().__init__()
        ins = [c + skip for c, skip in zip([c_in] + [level.channels] * (level.layers - 1), skips, strict=True)]
        self.resnets = nn.ModuleList(ResBlock(c, level.channels, config.groups, config.eps) for c in ins)
        self.attentions = _transformers(level, config)
        self.upsamplers = nn.ModuleList([Upsample(level.channels)] if upsample else [])

    def forward(self, h: Map, modulation: Tensor, context: Context, skips: list[Map]) -> Map:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, skips.pop(), modulation)
            if self.attentions:
                h = self.attentions[i](h, context)
        for upsample in self.upsamplers:
            h = upsample(h, size=skips[-1].x.shape[-2:])
        return h


def _transformers(level: Level, config: UNetConfig) -> nn.ModuleList:
    count = level.layers if level.depth else 0
    return nn.ModuleList(
        SpatialTransformer(level.channels, level.heads, level.depth, config.groups) for _ in range(count)
    )


def _way_down(config: UNetConfig) -> nn.ModuleList:
    ins = [config.down[0].channels] + [level.channels for level in config.down[:-1]]
    last = len(config.down) - 1
    return nn.ModuleList(
        DownBlock(c, level, config, downsample=i < last)
        for i, (c, level) in enumerate(zip(ins, config.down, strict=True))
    )


def _middle(config: UNetConfig) -> MidBlock:
    level = config.down[-1]
    assert config.mid_depth is not None
    return MidBlock(Level(level.channels, 2, config.mid_depth, level.heads), config)


def _way_up(config: UNetConfig, skips: list[int], channels: int) -> nn.ModuleList:
    blocks = []
    for i, level in enumerate(config.up):
        taken = [skips.pop() for _ in range(level.layers)]
        blocks.append(UpBlock(channels, taken, level, config, upsample=i < len(config.up) - 1))
        channels = level.channels
    return nn.ModuleList(blocks)


def _skip_channels(down: Sequence[Level]) -> list[int]:
    """The channels of every skip connection, in the order in which the way down leaves them."""
    channels = [down[0].channels]
    for level, following in pairwise([*down, None]):
        assert level is not None
        channels += [level.channels] * (level.layers + (following is not None))
    return channels
