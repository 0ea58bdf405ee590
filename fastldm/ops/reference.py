"""Every op in plain PyTorch: the definition that kernels are tested against, and the path that runs on a CPU.

The functions have the contract's signatures; what they compute stands in its docstrings (`fastldm/ops/__init__.py`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.ops import Activation, RowTables, Stats, compute_dtype

# ------------------------------------------------------------------------------------------------ what a CPU is fast at


@cache
def _native_cpu_dtypes() -> frozenset[torch.dtype]:
    """The dtypes whose matrix products this CPU has instructions for.

    Elsewhere oneDNN emulates them: without AMX or AVX512-BF16 a bfloat16 product ran at a quarter of the float32 rate
    (Xeon at 2.5 GHz, torch 2.13: 0.05 against 0.21 TFLOP/s), so products are done in float32, rounded once.
    """
    probes = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    found = {d for d, names in probes.items() if any(getattr(torch.cpu, n, bool)() for n in names)}
    return frozenset(found | {torch.float32, torch.float64})


def product_dtype(x: Tensor) -> torch.dtype:
    if x.device.type == "cpu" and x.dtype not in _native_cpu_dtypes():
        return torch.float32
    return x.dtype


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


# ------------------------------------------------------------------------------------------------------------- the ops


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    if (padded := _padded_head_dim(q, k)) != dim:
        q, k, v = (F.pad(t, (0, padded - dim)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_to(mask, q.dtype), scale=scale)
    return out.transpose(1, 2)[..., :dim].contiguous()


def _padded_head_dim(q: Tensor, k: Tensor) -> int:
    """Zero columns change nothing but the speed: AMX multiplies tiles of 32 half-precision numbers.

    At head dim 40 and 4096 keys, padding to 64 made PyTorch's kernel 1.25 times faster there (2 cores, bfloat16); in
    float32, and on CPUs without AMX, it only adds work.
    """
    dim = q.shape[-1]
    tiles = q.device.type == "cpu" and q.dtype.itemsize == 2 and q.dtype in _native_cpu_dtypes()
    return 64 if tiles and 32 < dim < 64 and min(q.shape[1], k.shape[1]) >= 512 else dim


def group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    *,
    x2: Tensor | None = None,
    act: Activation | None = None,
    stats: Stats | tuple[Stats | None, Stats | None] | None = None,
) -> Tensor:
    known = _joined_stats(x, x2, stats)
    if x2 is not None:
        x = torch.cat((x, x2), dim=1)
    y = _shifted_group_norm(x, w, b, groups, eps) if known is None else _normalise(x, w, b, groups, eps, known)
    return _activate(y, act).to(x.dtype)


def _shifted_group_norm(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float) -> Tensor:
    """Group norm of x − pivot, which is that of x.

    PyTorch's CPU kernel for channels_last takes the variance as E[x²] − E[x]², which is all rounding where the mean is
    large: at mean 1000 and unit variance in float32 its results were off by a thousand. A pivot near the mean, that of
    each group's first row, keeps the digits (Chan, Golub & LeVeque, 1983, section 3). The one for CUDA keeps them.
    """
    if x.device.type == "cuda":
        return F.group_norm(x, groups, w, b, eps).contiguous(memory_format=torch.channels_last)
    dtype = compute_dtype(x.dtype)
    row = x[:, :, :1].to(dtype).mean(dim=(2, 3)).unflatten(1, (groups, -1))
    pivot = row.mean(dim=2, keepdim=True).expand_as(row).flatten(1)
    return F.group_norm(x.to(dtype) - pivot[:, :, None, None], groups, w.to(dtype), b.to(dtype), eps)


def channel_stats(x: Tensor) -> Stats:
    """Mean and M2 of each channel over H and W: x (N, C, H, W) -> (N, C, 2), float32 (float64 for float64)."""
    x = x.to(compute_dtype(x.dtype))
    mean = x.mean(dim=(2, 3))
    m2 = (x - mean[:, :, None, None]).square().sum(dim=(2, 3))
    return torch.stack((mean, m2), dim=-1)


def _joined_stats(
    x: Tensor, x2: Tensor | None, stats: Stats | tuple[Stats | None, Stats | None] | None
) -> Stats | None:
    """The statistics of cat(x, x2) where at least one half is known; None where none is."""
    if stats is None or isinstance(stats, Tensor):
        return stats
    first, second = stats
    if x2 is None or (first is None and second is None):
        return first
    halves = (channel_stats(x) if first is None else first, channel_stats(x2) if second is None else second)
    return torch.cat(halves, dim=1)


def _normalise(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, stats: Stats) -> Tensor:
    """Group norm from statistics per channel, merged by Chan, Golub & LeVeque's formula (1983)."""
    n, c, h, width = x.shape
    mean, m2 = stats.unflatten(1, (groups, c // groups)).unbind(-1)
    group_mean = mean.mean(dim=2, keepdim=True)
    group_m2 = (m2 + h * width * (mean - group_mean).square()).sum(dim=2, keepdim=True)
    rstd = torch.rsqrt(group_m2 / (c // groups * h * width) + eps)
    scale = w * rstd.expand_as(mean).reshape(n, c)
    shift = b - scale * group_mean.expand_as(mean).reshape(n, c)
    return torch.addcmul(shift[:, :, None, None], x.to(stats.dtype), scale[:, :, None, None])


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return F.layer_norm(x, w.shape, w, b, eps)
    x = x + residual
    return F.layer_norm(x, w.shape, w, b, eps), x


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    dtype = product_dtype(x)
    y = _activate(F.linear(x.to(dtype), w.to(dtype), _to(b, dtype)), act)
    if residual is not None:
        y = y.add_(residual)
    return y.to(x.dtype)


def geglu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = product_dtype(x)
    value, gate = F.linear(x.to(dtype), w.to(dtype), b.to(dtype)).chunk(2, dim=-1)
    return F.gelu(gate).mul_(value).to(x.dtype)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    pad: Literal["same", "end"] = "same",
    upsample: tuple[int, int] | None = None,
    w_phases: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Stats | None]:
    dtype = product_dtype(x)
    out_dtype = x.dtype
    x = _gathered(x, x2, upsample, pad).to(dtype)
    b, shift = _to(b, dtype), _to(shift, dtype)
    if shift is not None and shift.shape[0] == 1:  # one vector for the whole batch is a bias
        b, shift = (shift[0] if b is None else b + shift[0]), None
    y = _convolve(x, w.to(dtype), b, stride, padding=0 if pad == "end" else w.shape[-1] // 2)
    if shift is not None:
        y = y.add_(shift[:, :, None, None])
    if residual is not None:
        y = y.add_(residual)
    y = y.to(out_dtype)
    return y, channel_stats(y) if want_stats else None


def _gathered(x: Tensor, x2: Tensor | None, upsample: tuple[int, int] | None, pad: str) -> Tensor:
    """What the convolution reads: both inputs, enlarged, with the padding that is not its own."""
    if x2 is not None:
        x = torch.cat((x, x2), dim=1)
    if upsample is not None:
        x = F.interpolate(x, upsample, mode="nearest")
    return F.pad(x, (0, 1, 0, 1)) if pad == "end" else x


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding: int) -> Tensor:
    n, _, height, width = x.shape
    if x.device.type == "cpu" and x.dtype == torch.float32 and stride == 1 and n * height * width < len(w):
        return _unfolded_convolution(x, w, b, padding)
    return F.conv2d(x, w, b, stride, padding)


def _unfolded_convolution(x: Tensor, w: Tensor, b: Tensor | None, padding: int) -> Tensor:
    """A convolution as one matrix product over the taps of each pixel.

    oneDNN rearranges the weights in every call. Where there are fewer pixels than output channels, unfolding the pixels
    moves less memory: 1.8 times faster at 1280 channels and 8×8 pixels, 1.4 at 16×16 (float32, batch 2, 2 cores).
    """
    size = w.shape[-1]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    taps = padded.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3)  # N H W k k C
    return F.linear(taps.flatten(3), w.permute(0, 2, 3, 1).flatten(1), b).permute(0, 3, 1, 2)


def _activate(x: Tensor, act: Activation | None) -> Tensor:
    """`x` is the caller's own intermediate and may be overwritten."""
    if act is None:
        return x
    if act == "silu":
        return F.silu(x, inplace=True)
    if act == "gelu":
        return F.gelu(x)
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"act={act!r}: there are None, 'silu', 'gelu', 'quick_gelu'")


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    flip: bool,
    shift: float,
    w: Tensor | None = None,
    b: Tensor | None = None,
    act: Activation | None = None,
) -> Tensor:
    half = dim // 2
    index = torch.arange(half, dtype=t.dtype, device=t.device)
    frequencies = torch.exp(-math.log(10000) * index / (half - shift))  # in diffusers' order: the same roundings
    angles = t[..., None] * frequencies
    waves = (angles.cos(), angles.sin()) if flip else (angles.sin(), angles.cos())
    y = F.pad(torch.cat(waves, dim=-1), (0, dim % 2))
    return y if w is None else linear(y.to(w.dtype), w, b, act=act)


# ------------------------------------------------------------------------------------------------- a row of the sampler


def begin_row(
    state: Tensor, mods: Tensor, tables: RowTables, row: Tensor, *, model_input: Tensor, modulation: Tensor
) -> None:
    batch, channels = state.shape[1:3]
    branches = model_input.unflatten(0, (-1, batch))[:, :, :channels]
    branches.copy_(tables.in_scale[row] * state[0].expand(branches.shape))
    modulation.copy_(mods[row].squeeze(0))


def end_row(
    state: Tensor,
    e: Tensor,
    tables: RowTables,
    row: Tensor,
    *,
    noise: Tensor,
    mask: Tensor,
    z0: Tensor,
    n0: Tensor,
) -> None:
    e = guided(e.to(state.dtype), tables, row, batch=state.shape[1])
    limit = tables.limit[row]
    x0 = (tables.p[row] * state[0] + tables.q[row] * e).clamp(-limit, limit)
    new = torch.einsum("ij,j...->i...", tables.a[row].squeeze(0), state)
    for coefficient, term in ((tables.b, e), (tables.c, noise), (tables.d, x0)):
        new += coefficient[row].reshape(-1, 1, 1, 1, 1) * term
    new[0] = mask * new[0] + (1 - mask) * (tables.u[row] * z0 + tables.v[row] * n0)
    state.copy_(new)
    row += 1


def guided(e: Tensor, tables: RowTables, row: Tensor, batch: int) -> Tensor:
    """The branches' outputs e (G·B, C, H, W) combined to (B, C, H, W)."""
    branches = e.unflatten(0, (-1, batch))
    out = torch.einsum("g,g...->...", tables.guidance[row].squeeze(0), branches)
    if len(branches) == 1:
        return out
    dims = list(range(1, out.ndim))
    phi = tables.rescale[row]
    ratio = branches[-1].std(dim=dims, keepdim=True) / out.std(dim=dims, keepdim=True)
    ratio = torch.where(phi == 0, torch.ones_like(ratio), ratio)  # 0 · (0 / 0) is NaN
    return out * (phi * ratio + 1 - phi)


# ------------------------------------------------------------------------------------------------------------ a picture


def to_uint8(pixels: Tensor) -> Tensor:
    rounded = (pixels * 0.5).add_(0.5).clamp_(0, 1).to(torch.float32).mul_(255).round_()
    return rounded.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
