"""Group norm, with SiLU, of one image or of two as if they were concatenated; the statistics of whoever has them.

    y = act((x − mean) / sqrt(var + eps) · w + b)        mean and var of a group, over its channels, H and W
                                                                                  Wu & He, arXiv 1803.08494

Layout: x and x2 are NHWC, pixels any stride apart, channels contiguous; y is NHWC and contiguous. A pixel of a group is
a run of SIZE channels. A group may hold channels of both inputs. Two forms:

- Small groups, one launch. Grid: a program for each group and sample reads its pixels twice, the second time from L1.
  How wide its loads are depends on SIZE: 16 bytes at 40 channels of half precision, 8 at 20, 4 at 10.
- Large ones, three launches, or two where the statistics are given. `_moments`: a program for BLOCK_C channels and a
  stretch of pixels leaves mean and M2 (sum of squared deviations) of each channel; `_merge`: a program for each group
  and sample makes of them each channel's centre and scale; `_apply`: a program for BLOCK_C channels and BLOCK_P pixels.
  A block of channels is of one input: only `_merge` sees groups that hold channels of both.

Statistics are merged by Chan, Golub & LeVeque's formula (1983) and taken of x − pivot, a value of the group's own, and
what is normalised is the difference x − mean: a mean of 1000 with unit variance keeps its digits.
Bytes: read x (twice) + write y, `N · H · W · C · itemsize` each; the second reading is of L2 where x fits there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, power_of_two, require, require_dtype, row_stride


@triton.jit
def _read(x, x2, row, c, inside, C, x_stride, x2_stride, TWO: tl.constexpr):
    """Channels c of cat(x, x2), float32: those below C are of x."""
    known = inside & (c < C) if TWO else inside
    value = tl.load(x + row * x_stride + c, mask=known, other=0.0).to(tl.float32)
    if TWO:
        value += tl.load(x2 + row * x2_stride + (c - C), mask=inside & (c >= C), other=0.0).to(tl.float32)
    return value


@triton.jit
def welford(mean, m2, d, inside, step):
    """One more value in every lane, the step-th: Welford's recurrence."""
    apart = tl.where(inside, d - mean, 0.0)
    mean += apart * (1.0 / step)
    return mean, m2 + apart * (d - mean)


@triton.jit
def _normalised(d, scale, shift, SILU: tl.constexpr):
    y = d * scale + shift
    if SILU:
        y = y / (1.0 + tl.exp2(y * -1.4426950408889634))  # log2 e
    return y


@triton.jit(do_not_specialize=["pixels"])
def _whole(
    # tensors
    x,
    x2,  # None where C2 is 0
    w,
    b,
    out,
    # sizes
    pixels,
    eps,
    C,
    C2,
    # strides of a pixel, in elements
    x_stride,
    x2_stride,
    # meta
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,  # a power of two, at least SIZE
    TWO: tl.constexpr,
    SILU: tl.constexpr,
):
    group, first = tl.program_id(0), tl.program_id(1).to(tl.int64) * pixels
    lane, j = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_J)
    c = group * SIZE + j
    pivot = _read(x, x2, first, group * SIZE, pixels > 0, C, x_stride, x2_stride, TWO)
    mean = tl.zeros((BLOCK_P, BLOCK_J), tl.float32)  # of x − pivot
    m2 = tl.zeros((BLOCK_P, BLOCK_J), tl.float32)
    step = 0.0
    for start in range(0, pixels, BLOCK_P):
        p = start + lane
        inside = (p < pixels)[:, None] & (j < SIZE)[None, :]
        d = _read(x, x2, (first + p)[:, None], c[None, :], inside, C, x_stride, x2_stride, TWO) - pivot
        step += 1.0
        mean, m2 = welford(mean, m2, d, inside, step)
    count = tl.where((j < SIZE)[None, :], tl.cdiv(tl.maximum(pixels - lane, 0), BLOCK_P)[:, None], 0).to(tl.float32)
    whole_mean = tl.sum(mean * count) / (pixels * SIZE)
    apart = mean - whole_mean
    rstd = 1.0 / tl.sqrt(tl.sum(m2 + apart * apart * count) / (pixels * SIZE) + eps)
    scale = tl.load(w + c, mask=j < SIZE, other=0.0).to(tl.float32) * rstd
    shift = tl.load(b + c, mask=j < SIZE, other=0.0).to(tl.float32)
    for start in range(0, pixels, BLOCK_P):
        p = start + lane
        inside = (p < pixels)[:, None] & (j < SIZE)[None, :]
        d = _read(x, x2, (first + p)[:, None], c[None, :], inside, C, x_stride, x2_stride, TWO) - pivot
        y = _normalised(d - whole_mean, scale[None, :], shift[None, :], SILU)
        to = out + (first + p)[:, None] * (C + C2) + c[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------- moments of each channel


@triton.jit(do_not_specialize=["pixels", "stretch"])
def _moments(
    # tensors
    x,
    x2,  # None where C2 is 0
    partial,  # (N, stretches, C, 2)
    partial2,
    # sizes
    pixels,
    stretch,  # how many pixels of them a program takes
    C,
    C2,
    # strides of a pixel, in elements
    x_stride,
    x2_stride,
    # meta
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TWO: tl.constexpr,
):
    block, column, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = C
    if TWO:
        second = column >= tl.cdiv(C, BLOCK_C)
        x, x_stride = tl.where(second, x2, x), tl.where(second, x2_stride, x_stride)
        partial, channels = tl.where(second, partial2, partial), tl.where(second, C2, C)
        column = tl.where(second, column - tl.cdiv(C, BLOCK_C), column)
    lane, c = tl.arange(0, BLOCK_P), column * BLOCK_C + tl.arange(0, BLOCK_C)
    first = n * pixels + block * stretch
    size = tl.minimum(pixels - block * stretch, stretch)
    pivot = tl.load(x + first * x_stride + c, mask=c < channels, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)  # of x − pivot
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(0, size, BLOCK_P):
        p = start + lane
        inside = (p < size)[:, None] & (c < channels)[None, :]
        d = tl.load(x + (first + p)[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        step += 1.0
        mean, m2 = welford(mean, m2, d - pivot[None, :], inside, step)
    count = tl.cdiv(tl.maximum(size - lane, 0), BLOCK_P).to(tl.float32)[:, None]
    whole_mean = tl.sum(mean * count, axis=0) / size
    apart = mean - whole_mean[None, :]
    whole_m2 = tl.sum(m2 + apart * apart * count, axis=0)
    to = partial + ((n * tl.num_programs(0) + block) * channels + c) * 2
    tl.store(to, pivot + whole_mean, mask=c < channels)
    tl.store(to + 1, whole_m2, mask=c < channels)


# ------------------------------------------------------------------------------------ from channels to their groups


@triton.jit
def _sum_of_means(partial, pivot, n, c, pixels, stretch, C, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Σ count · (mean − pivot) over the stretches of those channels c that this input has."""
    total = tl.zeros((BLOCK_S, BLOCK_J), tl.float32)
    stretches = tl.cdiv(pixels, stretch)
    for start in range(0, stretches, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < stretches)[:, None] & ((c >= 0) & (c < C))[None, :]
        count = tl.minimum(pixels - s * stretch, stretch).to(tl.float32)
        at = partial + ((n * stretches + s)[:, None] * C + c[None, :]) * 2
        total += tl.where(inside, count[:, None] * (tl.load(at, mask=inside, other=0.0) - pivot), 0.0)
    return tl.sum(total)


@triton.jit
def _sum_of_squares(partial, mean, n, c, pixels, stretch, C, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Σ M2 + count · (mean of the channel − mean)², likewise."""
    total = tl.zeros((BLOCK_S, BLOCK_J), tl.float32)
    stretches = tl.cdiv(pixels, stretch)
    for start in range(0, stretches, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < stretches)[:, None] & ((c >= 0) & (c < C))[None, :]
        count = tl.minimum(pixels - s * stretch, stretch).to(tl.float32)
        at = partial + ((n * stretches + s)[:, None] * C + c[None, :]) * 2
        apart = tl.load(at, mask=inside, other=0.0) - mean
        m2 = tl.load(at + 1, mask=inside, other=0.0)
        total += tl.where(inside, m2 + count[:, None] * apart * apart, 0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["pixels", "stretch", "stretch2"])
def _merge(
    # tensors
    partial,  # (N, stretches, C, 2)
    partial2,  # None where C2 is 0
    w,
    centre,  # (N, 2, C + C2): the mean of a channel's group, and w / its standard deviation
    # sizes
    pixels,
    stretch,
    stretch2,
    eps,
    C,
    C2,
    # meta
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,  # a power of two, at least SIZE
    TWO: tl.constexpr,
):
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BLOCK_J)
    c = tl.where(j < SIZE, group * SIZE + j, C + C2)  # what is beyond the group belongs to no input
    start = group * SIZE
    pivot = tl.load(partial + (n * tl.cdiv(pixels, stretch) * C + start) * 2, mask=start < C, other=0.0)
    if TWO:
        at = partial2 + (n * tl.cdiv(pixels, stretch2) * C2 + start - C) * 2
        pivot += tl.load(at, mask=start >= C, other=0.0)
    count = pixels.to(tl.float32) * SIZE
    mean = _sum_of_means(partial, pivot, n, c, pixels, stretch, C, BLOCK_S, BLOCK_J)
    if TWO:
        mean += _sum_of_means(partial2, pivot, n, c - C, pixels, stretch2, C2, BLOCK_S, BLOCK_J)
    mean = pivot + mean / count
    m2 = _sum_of_squares(partial, mean, n, c, pixels, stretch, C, BLOCK_S, BLOCK_J)
    if TWO:
        m2 += _sum_of_squares(partial2, mean, n, c - C, pixels, stretch2, C2, BLOCK_S, BLOCK_J)
    scale = tl.load(w + c, mask=j < SIZE, other=0.0).to(tl.float32) / tl.sqrt(m2 / count + eps)
    to = centre + n * 2 * (C + C2) + c
    tl.store(to, tl.zeros_like(scale) + mean, mask=j < SIZE)
    tl.store(to + (C + C2), scale, mask=j < SIZE)


# ------------------------------------------------------------------------------------------------------ normalisation


@triton.jit(do_not_specialize=["pixels"])
def _apply(
    # tensors
    x,
    x2,  # None where C2 is 0
    centre,  # (N, 2, C + C2)
    b,
    out,
    # sizes
    pixels,
    C,
    C2,
    # strides of a pixel, in elements
    x_stride,
    x2_stride,
    # meta
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TWO: tl.constexpr,
    SILU: tl.constexpr,
):
    column, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels, before = C, 0  # of this input, and of `out` before those
    if TWO:
        second = column >= tl.cdiv(C, BLOCK_C)
        x, x_stride = tl.where(second, x2, x), tl.where(second, x2_stride, x_stride)
        channels, before = tl.where(second, C2, C), tl.where(second, C, 0)
        column = tl.where(second, column - tl.cdiv(C, BLOCK_C), column)
    p, c = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), column * BLOCK_C + tl.arange(0, BLOCK_C)
    row, to, known = (n * pixels + p)[:, None], before + c, c < channels
    inside = (p < pixels)[:, None] & known[None, :]
    value = tl.load(x + row * x_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(centre + n * 2 * (C + C2) + to, mask=known, other=0.0)
    scale = tl.load(centre + (n * 2 + 1) * (C + C2) + to, mask=known, other=0.0)
    shift = tl.load(b + to, mask=known, other=0.0).to(tl.float32)
    y = _normalised(value - mean[None, :], scale[None, :], shift[None, :], SILU)
    tl.store(out + row * (C + C2) + to[None, :], y.to(out.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launcher


def group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    *,
    x2: Tensor | None = None,
    act: str | None = None,
    stats: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """x (N, C, H, W), x2 (N, C2, H, W): float16, bfloat16 or float32, channels_last; w, b: (C + C2,).

    stats: (N, C, 2) float32, or with x2 a pair; not read where one launch does all. -> (N, C + C2, H, W), NHWC.
    Raises `Unsupported` for another dtype or layout, an activation but "silu", and groups of more than 8192 channels.
    """
    known = _check(x, w, b, groups, x2, act, stats)
    channels, channels2 = x.shape[1], 0 if x2 is None else x2.shape[1]
    pixels, size = x.shape[2] * x.shape[3], (channels + channels2) // groups
    tile = tuning.group_norm(size)
    inputs: dict[str, Any] = {
        "x": x,
        "x2": x2,
        "x_stride": _pixel_stride(x, "x"),
        "x2_stride": None if x2 is None else _pixel_stride(x2, "x2"),
    }
    common: dict[str, Any] = {"pixels": pixels, "C": channels, "C2": channels2, "TWO": x2 is not None, "stages": 1}
    out = empty((len(x), channels + channels2, *x.shape[2:]), like=x, channels_last=True)
    if pixels * size <= tuning.GROUP_NORM_WHOLE:
        launch(
            _whole,
            (groups, len(x)),
            w=w,
            b=b,
            out=out,
            eps=eps,
            SIZE=size,
            BLOCK_P=tile.block_rows,
            BLOCK_J=power_of_two(size),
            SILU=act == "silu",
            warps=tile.warps,
            **inputs,
            **common,
        )
        return out
    (partial, stretch), (partial2, stretch2) = _partials(x, x2, known)
    centre = empty((len(x), 2, channels + channels2), like=x, dtype=float32)
    launch(
        _merge,
        (groups, len(x)),
        partial=partial,
        partial2=partial2,
        w=w,
        centre=centre,
        stretch=stretch,
        stretch2=stretch2,
        eps=eps,
        SIZE=size,
        BLOCK_S=tile.block_stretches,
        BLOCK_J=power_of_two(size),
        warps=4,
        **common,
    )
    flat = tuning.GROUP_NORM_APPLY
    launch(
        _apply,
        (triton.cdiv(pixels, flat.block_rows), _columns(x, flat.columns) + _columns(x2, flat.columns), len(x)),
        centre=centre,
        b=b,
        out=out,
        BLOCK_P=flat.block_rows,
        BLOCK_C=flat.columns,
        SILU=act == "silu",
        warps=flat.warps,
        **inputs,
        **common,
    )
    return out


def _check(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    x2: Tensor | None,
    act: str | None,
    stats: Tensor | tuple[Tensor | None, Tensor | None] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Refuses what no kernel takes. -> the statistics that are known, of x and of x2"""
    require_dtype(DTYPES, x=x, x2=x2, w=w, b=b)
    require(act in (None, "silu"), f"act={act!r}, not None or 'silu'")
    require(w.is_contiguous() and b.is_contiguous(), "w or b is not contiguous")
    require(x2 is None or (x2.shape[0], *x2.shape[2:]) == (x.shape[0], *x.shape[2:]), "x2 has another size than x")
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    require(len(w) == len(b) == channels, f"w or b is not for {channels} channels")
    require(channels % groups == 0, f"{channels} channels are not {groups} groups")
    require(x2 is None or not isinstance(stats, Tensor), "with x2 the statistics are a pair")
    known = stats if isinstance(stats, tuple) else (stats, None)
    for of, each in zip((x, x2), known, strict=True):
        if each is not None and of is not None:
            require(each.dtype == float32 and each.is_contiguous(), "the statistics are not contiguous float32")
            require(each.shape == (*of.shape[:2], 2), "the statistics have another shape than (N, C, 2)")
    return known


def _pixel_stride(x: Tensor, name: str) -> int:
    """How many elements its pixels are apart, over rows of pixels and samples as well."""
    return row_stride(x.permute(0, 2, 3, 1), name)


def _columns(x: Tensor | None, width: int) -> int:
    return 0 if x is None else triton.cdiv(x.shape[1], width)


def _partials(
    x: Tensor, x2: Tensor | None, known: tuple[Tensor | None, Tensor | None]
) -> tuple[tuple[Tensor, int], tuple[Tensor | None, int]]:
    """Of each input the moments of its channels, one set for each stretch of so many pixels, in at most one launch."""
    pixels, tile = x.shape[2] * x.shape[3], tuning.GROUP_NORM_MOMENTS
    wanted = [of for of, each in zip((x, x2), known, strict=True) if of is not None and each is None]
    stretch = tuning.group_norm_stretch(pixels, sum(_columns(of, tile.columns) for of in wanted))
    stretches = triton.cdiv(pixels, stretch)
    made = [empty((len(x), stretches, of.shape[1], 2), like=x, dtype=float32) for of in wanted]
    if wanted:
        second = wanted[1] if len(wanted) == 2 else None
        launch(
            _moments,
            (stretches, sum(_columns(of, tile.columns) for of in wanted), len(x)),
            x=wanted[0],
            x2=second,
            partial=made[0],
            partial2=made[1] if len(made) == 2 else None,
            pixels=pixels,
            stretch=stretch,
            x_stride=_pixel_stride(wanted[0], "x"),
            x2_stride=None if second is None else _pixel_stride(second, "x2"),
            C=wanted[0].shape[1],
            C2=0 if second is None else second.shape[1],
            TWO=second is not None,
            BLOCK_P=tile.block_rows,
            BLOCK_C=tile.columns,
            warps=tile.warps,
            stages=1,
        )
    left = iter(made)
    first = (next(left), stretch) if known[0] is None else (known[0], pixels)
    if x2 is None:
        return first, (None, pixels)
    return first, (next(left), stretch) if known[1] is None else (known[1], pixels)
