"""The blocks that the U-Net, the autoencoder and the text encoder are made of.

A module is declared in its fast layout. One whose weight holds several tensors of a checkpoint side by side says so in
`parts`: (the tensor's module path, relative to the parent of this module; its rows), in the order of the rows.
`fastldm.weights.keymap` reads nothing else. Weights are never initialised here: they come from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastldm import ops

Parts = tuple[tuple[str, int], ...]
KeyValue = tuple[Tensor, Tensor, Tensor | None]  # K, V: (B, L, H, D); a scale for the attention's output, or None for 1
Context = list[list[KeyValue]]  # per cross-attention layer


class Map(NamedTuple):
    """A feature map (N, C, H, W), channels_last, and its channels' statistics where its producer knew them."""

    x: Tensor
    stats: ops.Stats | None = None


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


# ----------------------------------------------------------------------------------------------------- parameters


class Linear(nn.Module):
    """weight (c_out, c_in), bias (c_out,)."""

    def __init__(self, c_in: int, c_out: int, *, bias: bool = True, parts: Parts | None = None) -> None:
        super().__init__()
        self.weight = empty(c_out, c_in)
        self.bias = empty(c_out) if bias else None
        self.parts = parts

    @classmethod
    def packed(cls, c_in: int, parts: Sequence[tuple[str, int]], *, bias: bool) -> Linear:
        return cls(c_in, sum(rows for _, rows in parts), bias=bias, parts=tuple(parts))

    def forward(self, x: Tensor, *, act: ops.Activation | None = None, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, act=act, residual=residual)


class Conv2d(nn.Module):
    """weight (c_out, c_in, k, k), channels_last; bias (c_out,). normed: a group norm may read what it writes.

    enlarges: called with `upsample`, so that `w_phases` serves it, once it is derived.
    """

    w_phases: Tensor | None

    def __init__(self, c_in: int, c_out: int, kernel: int, *, normed: bool = True, enlarges: bool = False) -> None:
        super().__init__()
        self.normed, self.enlarges = normed, enlarges
        self.weight = empty(c_out, c_in, kernel, kernel)
        self.bias = empty(c_out)
        self.register_buffer("w_phases", None, persistent=False)

    def derive(self) -> None:
        """What is computed from the parameters, anew, in place where it is there."""
        phases = ops.phase_weights(self.weight)
        self.w_phases = phases if self.w_phases is None else self.w_phases.copy_(phases)

    def forward(
        self,
        h: Map,
        skip: Map | None = None,
        *,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        stride: int = 1,
        pad: Literal["same", "end"] = "same",
        upsample: tuple[int, int] | None = None,
    ) -> Map:
        y, stats = ops.conv2d(
            h.x,
            self.weight,
            self.bias,
            x2=skip.x if skip else None,
            shift=shift,
            residual=residual,
            stride=stride,
            pad=pad,
            upsample=upsample,
            w_phases=self.w_phases,
            want_stats=self.normed,
        )
        return Map(y, stats)


class GroupNorm(nn.Module):
    """weight, bias (channels,)."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = empty(channels), empty(channels)
        self.groups, self.eps = groups, eps

    def forward(self, h: Map, skip: Map | None = None, *, act: ops.Activation | None = None) -> Map:
        x2, stats = (skip.x, (h.stats, skip.stats)) if skip else (None, h.stats)
        return Map(ops.group_norm(h.x, self.weight, self.bias, self.groups, self.eps, x2=x2, act=act, stats=stats))


class LayerNorm(nn.Module):
    """weight, bias (channels,)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = empty(channels), empty(channels)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


# -------------------------------------------------------------------------------------------------- convolution blocks


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip connection; `shift` is the time embedding's projection."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float) -> None:
        super().__init__()
        self.c_out = c_out
        self.norm1 = GroupNorm(c_in, groups, eps)
        self.conv1 = Conv2d(c_in, c_out, 3)
        self.norm2 = GroupNorm(c_out, groups, eps)
        self.conv2 = Conv2d(c_out, c_out, 3)
        self.conv_shortcut = Conv2d(c_in, c_out, 1, normed=False) if c_in != c_out else None
        self.columns: slice | None = None  # of the modulation, where there is one

    def forward(self, h: Map, skip: Map | None = None, modulation: Tensor | None = None) -> Map:
        """h, skip: (N, C, H, W), (N, C2, H, W), the input as if concatenated; modulation: (N or 1, Σ)."""
        shift = None if modulation is None or self.columns is None else modulation[:, self.columns]
        y = self.conv1(self.norm1(h, skip, act="silu"), shift=shift)
        residual = self.conv_shortcut(h, skip).x if self.conv_shortcut else h.x
        return self.conv2(self.norm2(y, act="silu"), residual=residual)


class Downsample(nn.Module):
    def __init__(self, channels: int, pad: Literal["same", "end"]) -> None:
        super().__init__()
        self.conv, self.pad = Conv2d(channels, channels, 3), pad

    def forward(self, h: Map) -> Map:
        return self.conv(h, stride=2, pad=self.pad)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, enlarges=True)

    def forward(self, h: Map, size: tuple[int, int]) -> Map:
        return self.conv(h, upsample=size)


# ------------------------------------------------------------------------------------------------------- attention


class SelfAttention(nn.Module):
    """Multi-head attention of (B, L, C) with itself. `names`: the checkpoint's names of q, k and v."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        bias: bool = False,
        names: Sequence[str] = ("to_q", "to_k", "to_v"),
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear.packed(channels, [(name, channels) for name in names], bias=bias)
        self.to_out = Linear(channels, channels)

    def forward(self, x: Tensor, *, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(dim=-3)
        return self.to_out(ops.attention(q, k, v, mask=mask).flatten(-2), residual=residual)


class CrossAttention(nn.Module):
    """Multi-head attention of (B, L, C) to keys and values that were projected before the loop."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_out = Linear(channels, channels)
        self.layer = -1  # its place in the context

    def forward(self, x: Tensor, context: Context, *, residual: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        outputs = [
            ops.attention(q, k, v) if s is None else s * ops.attention(q, k, v) for k, v, s in context[self.layer]
        ]
        return self.to_out(sum(outputs[1:], start=outputs[0]).flatten(-2), residual=residual)


class GEGLU(nn.Module):
    """weight (2 c_out, c_in), bias (2 c_out,): value, then gate."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight, self.bias = empty(2 * c_out, c_in), empty(2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(x, self.weight, self.bias)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = GEGLU(channels, 4 * channels), Linear(4 * channels, channels)

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:
        return self.down(self.up(x), residual=residual)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(channels), SelfAttention(channels, heads)
        self.norm2, self.attn2 = LayerNorm(channels), CrossAttention(channels, heads)
        self.norm3, self.ff = LayerNorm(channels), FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.attn1(self.norm1(x), residual=x)
        x = self.attn2(self.norm2(x), context, residual=x)
        return self.ff(self.norm3(x), residual=x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map. NHWC pixels are tokens already: no copy on the way in or out."""

    def __init__(self, channels: int, heads: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads) for _ in range(depth))
        self.proj_out = Linear(channels, channels)

    def forward(self, h: Map, context: Context) -> Map:
        x = self.proj_in(tokens(self.norm(h).x))
        for block in self.transformer_blocks:
            x = block(x, context)
        return Map(pixels(self.proj_out(x, residual=tokens(h.x)), h.x))


class SpatialAttention(nn.Module):
    """The autoencoder's attention: one head over the pixels of a map."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, eps)
        self.attention = SelfAttention(channels, heads=1, bias=True)

    def forward(self, h: Map) -> Map:
        return Map(pixels(self.attention(tokens(self.group_norm(h).x), residual=tokens(h.x)), h.x))


def derive(network: nn.Module, parameter: str | None = None) -> None:
    """Computes what the layers derive from their parameters where it is not there yet.

    Of the layer of `parameter` alone where one is named, and then anew what is there.
    """
    if parameter is None:
        missing = (m for m in network.modules() if isinstance(m, Conv2d) and m.enlarges and m.w_phases is None)
    else:
        layer = network.get_submodule(parameter.rpartition(".")[0])
        missing = (m for m in (layer,) if isinstance(m, Conv2d) and m.w_phases is not None)
    for convolution in missing:
        convolution.derive()


def tokens(x: Tensor) -> Tensor:
    """(N, C, H, W), channels_last -> (N, H·W, C), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixels(x: Tensor, like: Tensor) -> Tensor:
    """(N, H·W, C) -> (N, C, H, W), channels_last, the same memory; H and W from `like`."""
    return x.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)
