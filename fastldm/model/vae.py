"""The KL-regularised autoencoder, both halves, and the tiles that bound its memory.

Rombach et al., arXiv 2112.10752, appendix G. z (the encoder's mean or sample) is not yet scaled: latents =
(z − shift_factor) · scaling_factor, see `AutoencoderKL.to_latents` and `from_latents`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.config import VAEConfig
from fastldm.model.layers import Conv2d, Downsample, GroupNorm, Map, ResBlock, SpatialAttention, Upsample

EPS = 1e-6
OVERLAP = 0.25  # of a tile, on each side


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian: (N, latent_channels, H, W) each."""

    mean: Tensor
    std: Tensor


class AutoencoderKL(nn.Module):
    hub_names = ((".attention.", "."), (".to_out.", ".to_out.0."))

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Conv2d(2 * z, 2 * z, 1, normed=False) if config.quant_conv else None
        self.post_quant_conv = Conv2d(z, z, 1, normed=False) if config.post_quant_conv else None

    def to_latents(self, z: Tensor) -> Tensor:
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        return latents / self.config.scaling_factor + self.config.shift_factor

    def encode(self, image: Tensor, *, slicing: bool = False, tiling: bool = False) -> Posterior:
        """image: (N, in_channels, H, W) in −1..1, H and W multiples of `config.factor` -> the posterior of z."""
        size, factor = self.config.sample_size, self.config.factor
        encode: Callable[[Tensor], Tensor] = self._moments
        if tiling and max(image.shape[-2:]) > size:
            encode = _Tiles(self._moments, tile=size, out_tile=size // factor)
        moments = _by_sample(encode, image) if slicing else encode(image)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, z: Tensor, *, slicing: bool = False, tiling: bool = False) -> Tensor:
        """z: (N, latent_channels, H, W) -> image (N, out_channels, factor·H, factor·W), about −1..1.

        slicing: one sample at a time. tiling: overlapping tiles of `config.sample_size`, blended linearly; the memory
        is that of one tile and the image, the result differs slightly from that of one piece.
        """
        size, factor = self.config.sample_size, self.config.factor
        decode: Callable[[Tensor], Tensor] = self._image
        if tiling and max(z.shape[-2:]) > size // factor:
            decode = _Tiles(self._image, tile=size // factor, out_tile=size)
        return _by_sample(decode, z) if slicing else decode(z)

    def _moments(self, image: Tensor) -> Tensor:
        h = self.encoder(Map(image))
        return (self.quant_conv(h) if self.quant_conv else h).x

    def _image(self, z: Tensor) -> Tensor:
        h = Map(z)
        return self.decoder(self.post_quant_conv(h) if self.post_quant_conv else h).x


def _by_sample(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([f(sample) for sample in x.split(1)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config.channels
        self.conv_in = Conv2d(config.in_channels, c[0], 3)
        self.down_blocks = nn.ModuleList(
            Stage(ci, co, config.layers, config.groups, Downsample(co, "end") if i < len(c) - 1 else None)
            for i, (ci, co) in enumerate(zip(c[:1] + c[:-1], c, strict=True))
        )
        self.mid_block = Middle(c[-1], config)
        self.conv_norm_out = GroupNorm(c[-1], config.groups, EPS)
        self.conv_out = Conv2d(c[-1], 2 * config.latent_channels, 3, normed=False)

    def forward(self, h: Map) -> Map:
        h = self.conv_in(h)
        for stage in (*self.down_blocks, self.mid_block):
            h = stage(h)
        return self.conv_out(self.conv_norm_out(h, act="silu"))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config.channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, c[0], 3)
        self.mid_block = Middle(c[0], config)
        self.up_blocks = nn.ModuleList(
            Stage(ci, co, config.layers + 1, config.groups, Upsample(co) if i < len(c) - 1 else None)
            for i, (ci, co) in enumerate(zip(c[:1] + c[:-1], c, strict=True))
        )
        self.conv_norm_out = GroupNorm(c[-1], config.groups, EPS)
        self.conv_out = Conv2d(c[-1], config.out_channels, 3, normed=False)

    def forward(self, h: Map) -> Map:
        h = self.conv_in(h)
        for stage in (self.mid_block, *self.up_blocks):
            h = stage(h)
        return self.conv_out(self.conv_norm_out(h, act="silu"))


class Stage(nn.Module):
    """The residual blocks of one resolution and the way to the next."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: Downsample | Upsample | None) -> None:
        super().__init__()
        ins = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResBlock(c, c_out, groups, EPS) for c in ins)
        self.downsamplers = nn.ModuleList([resample] if isinstance(resample, Downsample) else [])
        self.upsamplers = nn.ModuleList([resample] if isinstance(resample, Upsample) else [])

    def forward(self, h: Map) -> Map:
        for resnet in self.resnets:
            h = resnet(h)
        for downsample in self.downsamplers:
            h = downsample(h)
        for upsample in self.upsamplers:
            height, width = h.x.shape[-2:]
            h = upsample(h, size=(2 * height, 2 * width))
        return h


class Middle(nn.Module):
    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, config.groups, EPS) for _ in range(2))
        attention = [SpatialAttention(channels, config.groups, EPS)] if config.mid_attention else []
        self.attentions = nn.ModuleList(attention)

    def forward(self, h: Map) -> Map:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class _Tiles:
    """Applies `f` to overlapping tiles and blends the results linearly, with one row of tiles in memory.

    tile, out_tile: the side of a tile before and after `f`.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], *, tile: int, out_tile: int) -> None:
        self.f, self.tile = f, tile
        self.step = int(tile * (1 - OVERLAP))
        self.blend = int(out_tile * OVERLAP)
        self.keep = out_tile - self.blend

    def __call__(self, x: Tensor) -> Tensor:
        rows, above = [], None
        for top in range(0, x.shape[2], self.step):
            row = self._row(x[:, :, top : top + self.tile], above)
            rows.append(torch.cat([tile[:, :, : self.keep, : self.keep] for tile in row], dim=3))
            above = row
        return torch.cat(rows, dim=2)

    def _row(self, band: Tensor, above: list[Tensor] | None) -> list[Tensor]:
        row: list[Tensor] = []
        for i, left in enumerate(range(0, band.shape[3], self.step)):
            piece = band[:, :, :, left : left + self.tile]
            tile = self.f(piece.contiguous(memory_format=torch.channels_last))
            if above:
                _blend(above[i], tile, self.blend, dim=2)
            if row:
                _blend(row[-1], tile, self.blend, dim=3)
            row.append(tile)
        return row


def _blend(before: Tensor, after: Tensor, width: int, dim: int) -> None:
    """Fades the end of `before` into the beginning of `after`, which is changed in place."""
    width = min(width, before.shape[dim], after.shape[dim])
    shape = [1] * before.ndim
    shape[dim] = width
    fade = (torch.arange(width, dtype=before.dtype, device=before.device) / width).view(shape)
    edge = after.narrow(dim, 0, width)
    edge.copy_(before.narrow(dim, before.shape[dim] - width, width) * (1 - fade) + edge * fade)
