"""Convolution with 1×1 or 3×3 taps as an implicit matrix product, with everything around it in its epilogue.

    y = conv(up(cat(x, x2)), w) + b + shift + residual          and mean and M2 of each channel of y, as it was rounded

Layout: NHWC. x (N, H, W, C), w (O, k, k, C + C2), y (N, H', W', O): rows of the product are output pixels, its columns
are output channels, and it is summed over (channel block, tap) in one loop that never drains. No column matrix, no
concatenation, no enlarged input and no padded border exist: all four are arithmetic on the addresses of a pixel's taps.
Grid: (BLOCK_M pixels of one sample) × (BLOCK_N channels), those that share pixels side by side; × splits of the sum
where a map is small: each leaves float32 sums, and `_finish` adds them up and does what else the epilogue does.
Where TMA can, it reads boxes of pixels instead: see `conv2d_tma.py`.
A tile of 160 channels is two accumulators, 128 + 32: 320, 640 and 1280 are multiples of it, and no power of two fits.
Enlargement by exactly 2 before 3×3 taps: an output pixel of one parity sees 2×2 distinct input pixels, so four
convolutions with 2×2 taps of pre-summed weights (`fastldm.ops.phase_weights`) do it with 4/9 of the products.
FLOPs: 2 · N · H' · W' · O · k² · (C + C2). Bytes: x, w, residual and y once, if the L2 cache holds what tiles share.
Statistics: each program centres its own pixels; `_merge` joins these by Chan, Golub & LeVeque's formula (1983).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels import conv2d_tma, tuning
from fastldm.kernels.launch import DTYPES, Unsupported, empty, launch, require, require_dtype, row_stride

_ANY = [  # what no variant is compiled for
    *("height", "width", "in_height", "in_width", "grid_height", "grid_width", "grid_pixels", "pixels", "tiles"),
    *("across", "column_tiles", "steps", "splits", "stride", "before", "shift_stride"),
]


@triton.jit(do_not_specialize=_ANY)
def _conv2d(
    # tensors; by TMA: descriptors of x, x2 and w
    x,
    x2,  # None: there is one input
    w,
    b,  # None: nothing is added, and so for shift and residual
    shift,
    residual,
    out,
    moments,  # (N, PHASES · tiles, 2, O) float32: mean and M2 of each program's pixels; None: not wanted
    sums,  # (splits, N · pixels, O) float32: the products alone, and nothing else is read or written; None: no split
    # sizes
    height,  # of what the taps move over, which is the input or its enlargement
    width,
    in_height,
    in_width,
    grid_width,  # of the output, or of one phase of it; of a single row of all pixels for 1×1 taps by TMA
    grid_pixels,
    tiles,  # of BLOCK_M pixels
    column_tiles,
    C,
    C2,  # 0 where x2 is None
    O,  # noqa: E741
    stride,  # of the taps: 1 or 2
    before,  # how far the first tap lies outside
    steps,  # of a split's sum
    # strides, in elements: of a pixel, or of a sample's shift
    x_stride,
    x2_stride,
    shift_stride,
    residual_stride,
    # meta
    TAPS: tl.constexpr,  # on a side
    BORDER: tl.constexpr,  # some taps lie outside
    ENLARGED: tl.constexpr,  # pixels are repeated
    PHASES: tl.constexpr,  # 1 or 4
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MORE_N: tl.constexpr,  # columns of the second accumulator, or 0
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # it divides C and C2
    FLAT: tl.constexpr,  # few channels: a step goes on to the next tap's
    TMA: tl.constexpr,  # and BLOCK_M pixels are a box that is BLOCK_W wide
    BLOCK_W: tl.constexpr,
):
    AREA: tl.constexpr = TAPS * TAPS
    row_tile = tl.program_id(0) // column_tiles
    sample = (row_tile // (tiles * PHASES)).to(tl.int64)
    sample_tile = row_tile % (tiles * PHASES)
    phase = sample_tile // tiles
    tile = sample_tile % tiles
    first_column = tl.program_id(0) % column_tiles * (BLOCK_N + MORE_N)
    n = first_column + tl.arange(0, BLOCK_N)
    if MORE_N > 0:
        n_more = first_column + BLOCK_N + tl.arange(0, MORE_N)

    first_blocks = tl.cdiv(C, BLOCK_K)
    start = tl.program_id(1) * steps
    all_steps = tl.cdiv(C * AREA, BLOCK_K) if FLAT else (first_blocks + tl.cdiv(C2, BLOCK_K)) * AREA
    end = tl.minimum(start + steps, all_steps)
    tl.assume(end > start)  # or else the products wait for each other on sm_90
    if TMA:
        top, left = conv2d_tma.box_of(tile, grid_width, BLOCK_M, BLOCK_W)
        m, row_inside = conv2d_tma.pixels_of(top, left, grid_width, grid_pixels, BLOCK_M, BLOCK_W)
        top, left = top - before + phase // 2, left - before + phase % 2
        acc = conv2d_tma.products(
            x, x2, w, C, C2, sample.to(tl.int32), top, left, phase * O + first_column, start, end,
            TAPS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        # the pixels: beyond the last one it is repeated, and not stored
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_inside = m < grid_pixels
        m = tl.minimum(m, grid_pixels - 1)
        top = m // grid_width * stride - before + phase // 2
        left = m % grid_width * stride - before + phase % 2

        # which of a pixel's taps are inside: a bit for each
        inside = tl.zeros([BLOCK_M], tl.int32)
        if BORDER:
            for each in tl.static_range(AREA):
                i, j = top + each // TAPS, left + each % TAPS
                inside |= ((i >= 0) & (i < height) & (j >= 0) & (j < width)).to(tl.int32) << each

        k = tl.arange(0, BLOCK_K)
        first_pixel = sample * in_height * in_width
        if not ENLARGED:
            first_pixel += top.to(tl.int64) * in_width + left
            x_rows = x + (first_pixel * x_stride)[:, None] + k[None, :]
            if x2 is not None:
                x2_rows = x2 + (first_pixel * x2_stride)[:, None] + k[None, :]

        # the columns: beyond the last one it is repeated, and not stored
        w_rows = w + (phase * O + tl.minimum(n, O - 1))[:, None] * (AREA * (C + C2)) + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if MORE_N > 0:
            w_rows_more = w + (phase * O + tl.minimum(n_more, O - 1))[:, None] * (AREA * (C + C2)) + k[None, :]
            acc_more = tl.zeros([BLOCK_M, MORE_N], tl.float32)

        for step in tl.range(start, end):
            if FLAT:
                c = step * BLOCK_K + k  # of all taps
                tap = (c // C)[None, :]
                moved = tap // TAPS * tl.cast(in_width, tl.int64) + tap % TAPS
                x_tile = x_rows + (moved * x_stride + (c % C - k)[None, :])
                w_step = step * BLOCK_K
                k_inside = (c < AREA * C)[None, :]
                x_inside = k_inside & (inside[:, None] >> tap & 1 != 0)
            else:
                block, tap = step // AREA, step % AREA
                c = block * BLOCK_K
                channels = C
                if x2 is not None:
                    second = block >= first_blocks
                    c = tl.where(second, c - first_blocks * BLOCK_K, c)
                    channels = tl.where(second, C2, C)
                if ENLARGED:
                    pixel = first_pixel + ((top + tap // TAPS) >> 1).to(tl.int64) * in_width
                    pixel += (left + tap % TAPS) >> 1
                    x_tile = x + (pixel * x_stride)[:, None] + (c + k)[None, :]
                    if x2 is not None:
                        x_tile = tl.where(second, x2 + (pixel * x2_stride)[:, None] + (c + k)[None, :], x_tile)
                else:
                    moved = tap // TAPS * tl.cast(in_width, tl.int64) + tap % TAPS
                    x_tile = x_rows + (moved * x_stride + c)
                    if x2 is not None:
                        x_tile = tl.where(second, x2_rows + (moved * x2_stride + c), x_tile)
                w_step = tap * (C + C2) + c
                if x2 is not None:
                    w_step = tl.where(second, w_step + C, w_step)
                k_inside = (c + k < channels)[None, :]  # of no consequence where EVEN_K
                x_inside = (inside >> tap & 1 != 0)[:, None]
                if not BORDER:
                    x_inside = None if EVEN_K else k_inside
                elif not EVEN_K:
                    x_inside &= k_inside

            w_inside = None if EVEN_K else k_inside
            x_values = tl.load(x_tile, mask=x_inside, other=None if x_inside is None else 0.0)
            w_values = tl.load(w_rows + w_step, mask=w_inside, other=None if w_inside is None else 0.0)
            acc = tl.dot(x_values, w_values.T, acc, input_precision="ieee")
            if MORE_N > 0:
                w_values = tl.load(w_rows_more + w_step, mask=w_inside, other=None if w_inside is None else 0.0)
                acc_more = tl.dot(x_values, w_values.T, acc_more, input_precision="ieee")

    if PHASES == 1:
        row = sample * grid_pixels + m
    else:
        row = 4 * sample * grid_pixels + (2 * (m // grid_width) + phase // 2).to(tl.int64) * (2 * grid_width)
        row += 2 * (m % grid_width) + phase % 2
    if sums is not None:
        samples = tl.num_programs(0) // column_tiles // (tiles * PHASES)
        sums += (tl.program_id(1) * samples.to(tl.int64) * grid_pixels * PHASES) * O
        _store(sums, acc, row, row_inside, n, O)
        if MORE_N > 0:
            _store(sums, acc_more, row, row_inside, n_more, O)
    else:
        shift_row = None if shift is None else shift + sample * shift_stride
        y = _epilogue(acc, b, shift_row, residual, row, residual_stride, row_inside, n, O).to(out.dtype.element_ty)
        _store(out, y, row, row_inside, n, O)
        if moments is not None:
            moments += (sample * tiles * PHASES + sample_tile) * 2 * O
            _store_moments(moments, y, row_inside, n, O)
        if MORE_N > 0:
            y = _epilogue(acc_more, b, shift_row, residual, row, residual_stride, row_inside, n_more, O)
            y = y.to(out.dtype.element_ty)
            _store(out, y, row, row_inside, n_more, O)
            if moments is not None:
                _store_moments(moments, y, row_inside, n_more, O)


@triton.jit
def _epilogue(acc, b, shift, residual, row, residual_stride, row_inside, n, O):  # noqa: E741
    """acc + b + shift + residual, float32. shift: a sample's. row: the pixel, of all samples. n: the channel."""
    if b is not None:
        acc += tl.load(b + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        acc += tl.load(shift + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        more = residual + (row * residual_stride)[:, None] + n[None, :]
        acc += tl.load(more, mask=row_inside[:, None] & (n < O)[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def _store(out, y, row, row_inside, n, O):  # noqa: E741
    tl.store(out + (row * O)[:, None] + n[None, :], y, mask=row_inside[:, None] & (n < O)[None, :])


@triton.jit
def _moments(y, row_inside):
    """Count, and of each column mean and M2, float32, of the rows that are inside: at least one."""
    count = tl.sum(row_inside.to(tl.float32), axis=0)
    y = tl.where(row_inside[:, None], y.to(tl.float32), 0.0)
    mean = tl.sum(y, axis=0) / count
    centred = tl.where(row_inside[:, None], y - mean[None, :], 0.0)
    return count, mean, tl.sum(centred * centred, axis=0)


@triton.jit
def _joined(count, mean, m2, more_count, more_mean, more_m2):
    """Chan's formula. more_count: not 0."""
    total = count + more_count
    delta = more_mean - mean
    return total, mean + delta * (more_count / total), m2 + more_m2 + delta * delta * (count * more_count / total)


@triton.jit
def _store_moments(moments, y, row_inside, n, O):  # noqa: E741
    _, mean, m2 = _moments(y, row_inside)
    tl.store(moments + n, mean, mask=n < O)
    tl.store(moments + O + n, m2, mask=n < O)


@triton.jit(do_not_specialize=_ANY)
def _finish(
    # tensors
    sums,
    b,
    shift,
    residual,
    out,
    stats,  # (N, O, 2) float32; None: not wanted
    # sizes
    splits,
    pixels,  # of a sample
    O,  # noqa: E741
    # strides, as above
    shift_stride,
    residual_stride,
    # meta
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What a split sum leaves to do. Grid: (samples, BLOCK_C channels); the pixels of a small map are a short loop."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split_stride = tl.num_programs(0).to(tl.int64) * pixels * O
    shift_row = None if shift is None else shift + sample * shift_stride
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, pixels, BLOCK_R):
        m = start + tl.arange(0, BLOCK_R)
        row_inside, row = m < pixels, sample * pixels + m
        here = sums + (row * O)[:, None] + n[None, :]
        inside = row_inside[:, None] & (n < O)[None, :]
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for _ in tl.range(0, splits, loop_unroll_factor=2):
            acc += tl.load(here, mask=inside, other=0.0)
            here += split_stride
        y = _epilogue(acc, b, shift_row, residual, row, residual_stride, row_inside, n, O).to(out.dtype.element_ty)
        _store(out, y, row, row_inside, n, O)
        if stats is not None:
            more_count, more_mean, more_m2 = _moments(y, row_inside)
            count, mean, m2 = _joined(count, mean, m2, more_count, more_mean, more_m2)
    if stats is not None:
        to = stats + (sample * O + n) * 2
        tl.store(to, mean, mask=n < O)
        tl.store(to + 1, m2, mask=n < O)


@triton.jit(do_not_specialize=_ANY)
def _merge(
    # tensors
    moments,  # (N, PHASES · tiles, 2, O) float32
    stats,  # (N, O, 2) float32
    # sizes
    tiles,  # of a phase
    across,  # tiles that lie beside each other
    grid_height,  # of a phase; the last tiles have the rest
    grid_width,
    O,  # noqa: E741
    # meta
    PHASES: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: (samples, BLOCK_C channels). BLOCK_T tiles at once: all about their common mean, and joined to the rest."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, tiles * PHASES, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        here = moments + ((sample * tiles * PHASES + t) * 2 * O)[:, None] + n[None, :]
        inside = (t < tiles * PHASES)[:, None] & (n < O)[None, :]
        means = tl.load(here, mask=inside, other=0.0)
        m2s = tl.load(here + O, mask=inside, other=0.0)
        rows = tl.minimum(grid_height - t % tiles // across * TILE_HEIGHT, TILE_HEIGHT)
        columns = tl.minimum(grid_width - t % tiles % across * TILE_WIDTH, TILE_WIDTH)
        counts = tl.where(t < tiles * PHASES, (rows * columns).to(tl.float32), 0.0)
        more_count = tl.sum(counts, axis=0)
        more_mean = tl.sum(means * counts[:, None], axis=0) / more_count
        apart = means - more_mean[None, :]
        more_m2 = tl.sum(m2s + apart * apart * counts[:, None], axis=0)
        count, mean, m2 = _joined(count, mean, m2, more_count, more_mean, more_m2)
    to = stats + (sample * O + n) * 2
    tl.store(to, mean, mask=n < O)
    tl.store(to + 1, m2, mask=n < O)


@dataclass(frozen=True)
class _Geometry:
    """What is convolved. With 4 phases: the input itself with 2×2 taps, though the output is enlarged."""

    samples: int
    c_in: int
    c_more: int  # of x2
    c_out: int
    in_height: int
    in_width: int
    height: int  # of what the taps move over
    width: int
    taps: int  # on a side
    stride: int
    before: int  # how far the first tap lies outside
    around: int  # and the first and the last together
    phases: int
    enlarged: bool  # by repeating pixels

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the output, or of a phase of it."""
        height, width = ((side + self.around - self.taps) // self.stride + 1 for side in (self.height, self.width))
        return height, width

    @property
    def grid_pixels(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the output."""
        times = 1 if self.phases == 1 else 2
        return self.samples, self.c_out, times * self.grid[0], times * self.grid[1]

    @property
    def flat(self) -> bool:
        """Few channels: the sum goes over all taps' channels as if they were one tap's."""
        return self.c_in < 16 and self.taps > 1 and not (self.c_more or self.enlarged)

    @property
    def moves_only(self) -> bool:
        """A tap is the input, moved: for TMA."""
        return self.grid == (self.height, self.width) and self.stride == 1 and not (self.enlarged or self.flat)

    @property
    def sums(self) -> tuple[tuple[int, ...], int]:
        """How long the sums of a tap are, and how many taps there are."""
        area = self.taps * self.taps
        return ((area * self.c_in,), 1) if self.flat else ((self.c_in, self.c_more), area)


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
) -> tuple[Tensor, Tensor | None]:
    """x: (N, C, H, W), channels_last, float16, bfloat16 or float32; w: (O, C + C2, k, k), channels_last; k is 1 or 3.

    w_phases: `fastldm.ops.phase_weights(w)`, used where the enlargement is exactly by 2. The rest as in the contract.
    -> (y, stats or None). Raises `Unsupported` for another dtype or layout, and for sizes that do not fit together.
    """
    require_dtype(DTYPES, x=x, w=w, b=b, x2=x2, shift=shift, residual=residual, w_phases=w_phases)
    g = _geometry(x, w, x2, stride, pad, upsample, in_phases=w_phases is not None)
    if g.phases == 4:
        w = _checked_phases(w_phases, g)
    epilogue = _epilogue_of(g, b, shift, residual)
    strides = {"x_stride": _pixel_stride(x, "x"), "x2_stride": None if x2 is None else _pixel_stride(x2, "x2")}

    (depths, taps), tile = g.sums, _tile(g, x.dtype, readable=conv2d_tma.can_read(x, x2, w))
    (height, width), (box_height, box_width) = size, box = _boxes(g, tile)
    tiles = triton.cdiv(height, box_height) * triton.cdiv(width, box_width)
    column_tiles = triton.cdiv(g.c_out, tile.block_n + tile.more_n)
    all_steps = sum(triton.cdiv(depth, tile.block_k) for depth in depths) * taps
    steps = triton.cdiv(all_steps, tile.splits)
    splits = triton.cdiv(all_steps, steps)

    out = empty(g.shape, like=x, channels_last=True)
    stats = empty((g.samples, g.c_out, 2), like=x, dtype=torch.float32) if want_stats else None
    sums = moments = None
    if splits > 1:
        sums = empty((splits, out.numel()), like=x, dtype=torch.float32)
    elif want_stats:
        moments = empty((g.samples, g.phases * tiles, 2, g.c_out), like=x, dtype=torch.float32)
    launch(
        _conv2d,
        (g.samples * g.phases * tiles * column_tiles, splits),
        **(conv2d_tma.descriptors(x, x2, w, g.taps, tile) if tile.block_w else {"x": x, "x2": x2, "w": w}),
        out=out if sums is None else None,
        moments=moments,
        sums=sums,
        height=g.height,
        width=g.width,
        in_height=g.in_height,
        in_width=g.in_width,
        grid_width=width if tile.block_w else g.grid[1],
        grid_pixels=g.grid_pixels,
        tiles=tiles,
        column_tiles=column_tiles,
        C=g.c_in,
        C2=g.c_more,
        O=g.c_out,
        stride=g.stride,
        before=g.before,
        steps=steps,
        **strides,
        **(epilogue if sums is None else _epilogue_of(g, None, None, None)),
        TAPS=g.taps,
        BORDER=g.around > 0,
        ENLARGED=g.enlarged,
        PHASES=g.phases,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        MORE_N=tile.more_n,
        BLOCK_K=tile.block_k,
        EVEN_K=all(depth % tile.block_k == 0 for depth in depths),
        FLAT=g.flat,
        TMA=tile.block_w > 0,
        BLOCK_W=tile.block_w,
        warps=tile.warps,
        stages=tile.stages,
    )
    if sums is not None:
        _launch_finish(g, sums, out, stats, splits, epilogue)
    elif moments is not None:
        _launch_merge(g, moments, stats, size, box)
    return out, stats


def _geometry(
    x: Tensor,
    w: Tensor,
    x2: Tensor | None,
    stride: int,
    pad: str,
    upsample: tuple[int, int] | None,
    *,
    in_phases: bool,
) -> _Geometry:
    samples, c_in, in_height, in_width = x.shape
    c_out, c_all, taps, _ = w.shape
    c_more = 0 if x2 is None else x2.shape[1]
    require(taps == w.shape[3] and taps in (1, 3), f"{taps}×{w.shape[3]} taps, not 1×1 or 3×3")
    require(c_all == c_in + c_more, f"w reads {c_all} channels, and there are {c_in + c_more}")
    require(x2 is None or x2.shape == (samples, c_more, in_height, in_width), "x2 has another size than x")
    require(w.permute(0, 2, 3, 1).is_contiguous(), "w is not channels_last")
    require(stride in (1, 2), f"stride {stride}, not 1 or 2")
    require(pad in ("same", "end"), f"pad {pad!r}, not 'same' or 'end'")
    height, width = upsample or (in_height, in_width)
    require(
        upsample is None or (_fits(height, in_height) and _fits(width, in_width)),
        f"{in_height}×{in_width} is enlarged to {height}×{width}, not to twice that or one less",
    )
    before, around = (0, 1) if pad == "end" else (taps // 2, 2 * (taps // 2))
    g = _Geometry(
        samples=samples,
        c_in=c_in,
        c_more=c_more,
        c_out=c_out,
        in_height=in_height,
        in_width=in_width,
        height=height,
        width=width,
        taps=taps,
        stride=stride,
        before=before,
        around=around,
        phases=1,
        enlarged=upsample is not None,
    )
    require(min(g.grid) > 0, f"nothing is left of {height}×{width}")
    if in_phases and (height, width) == (2 * in_height, 2 * in_width) and (taps, stride, before) == (3, 1, 1):
        return replace(g, height=in_height, width=in_width, taps=2, around=1, phases=4, enlarged=False)
    return g


def _fits(side: int, in_side: int) -> bool:
    return side in (2 * in_side - 1, 2 * in_side)


def _checked_phases(w_phases: Tensor | None, g: _Geometry) -> Tensor:
    shape = (4, g.c_out, 2, 2, g.c_in + g.c_more)
    if w_phases is None or w_phases.shape != shape or not w_phases.is_contiguous():
        raise Unsupported("w_phases: see fastldm.ops.phase_weights")
    return w_phases


def _epilogue_of(g: _Geometry, b: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> dict[str, Any]:
    """What is added to the products, as arguments of a launch."""
    c_out = g.c_out
    require(b is None or (b.shape == (c_out,) and b.is_contiguous()), "b is not one contiguous number per channel")
    require(shift is None or shift.shape in ((g.samples, c_out), (1, c_out)), "shift is not (N or 1, O)")
    require(shift is None or shift.stride(1) == 1 or c_out == 1, "the last dimension of shift is not contiguous")
    require(residual is None or residual.shape == g.shape, "the residual has another shape than the output")
    return {
        "b": b,
        "shift": shift,
        "shift_stride": 0 if shift is None or len(shift) == 1 else shift.stride(0),
        "residual": residual,
        "residual_stride": None if residual is None else _pixel_stride(residual, "the residual"),
    }


def _tile(g: _Geometry, dtype: torch.dtype, *, readable: bool) -> tuning.Convolution:
    """readable: TMA can address the inputs."""
    (depths, taps), maps = g.sums, g.samples * g.phases
    if readable and g.moves_only:
        tile = tuning.conv2d_tma(maps, g.grid, depths, taps, g.c_out, dtype)
        if tile is not None and tuning.by_tma(tile):
            return tile
    return tuning.conv2d(maps, g.grid_pixels, depths, taps, g.c_out, dtype)


def _boxes(g: _Geometry, tile: tuning.Convolution) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the output, or of a phase of it, and of its tiles: boxes for TMA, or parts of a row."""
    if tile.block_w and g.taps > 1:
        return g.grid, (tile.block_m // tile.block_w, tile.block_w)
    return (1, g.grid_pixels), (1, tile.block_m)


def _launch_finish(
    g: _Geometry, sums: Tensor, out: Tensor, stats: Tensor | None, splits: int, epilogue: dict[str, Any]
) -> None:
    block_r, block_c = tuning.CONV2D_FINISH
    launch(
        _finish,
        (g.samples, triton.cdiv(g.c_out, block_c)),
        sums=sums,
        out=out,
        stats=stats,
        splits=splits,
        pixels=g.phases * g.grid_pixels,
        O=g.c_out,
        **epilogue,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        warps=8,
        stages=1,
    )


def _launch_merge(
    g: _Geometry, moments: Tensor, stats: Tensor | None, size: tuple[int, int], box: tuple[int, int]
) -> None:
    """size, box: see `_boxes`."""
    across = triton.cdiv(size[1], box[1])
    block_t, block_c = tuning.CONV2D_MERGE
    launch(
        _merge,
        (g.samples, triton.cdiv(g.c_out, block_c)),
        moments=moments,
        stats=stats,
        tiles=triton.cdiv(size[0], box[0]) * across,
        across=across,
        grid_height=size[0],
        grid_width=size[1],
        O=g.c_out,
        PHASES=g.phases,
        TILE_HEIGHT=box[0],
        TILE_WIDTH=box[1],
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        warps=4,
        stages=1,
    )


def _pixel_stride(x: Tensor, name: str) -> int:
    return row_stride(x.permute(0, 2, 3, 1), name)
