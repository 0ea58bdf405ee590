"""The sum of `conv2d.py` by TMA: a box of pixels of one sample, moved by a tap, is one load, and the border is zeros.

For taps that move by one pixel and leave the size as it is, over inputs that TMA can address. 1×1 taps read a map as a
single row of pixels. The product has its sides exchanged, BLOCK_N channels × BLOCK_M pixels: what stands on the right
is multiplied from where TMA puts it, whatever the shape; what stands on the left only if it is a matrix, not a box.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastldm.kernels.launch import row_stride, tma_reads
from fastldm.kernels.tuning import Convolution


@triton.jit
def box_of(tile, grid_width, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Row and column of the first pixel of a tile."""
    across = tl.cdiv(grid_width, BLOCK_W)
    return tile // across * (BLOCK_M // BLOCK_W), tile % across * BLOCK_W


@triton.jit
def pixels_of(top, left, grid_width, grid_pixels, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """The pixels of a box, and whether they are inside."""
    within = tl.arange(0, BLOCK_M)
    row, column = top + within // BLOCK_W, left + within % BLOCK_W
    return row * grid_width + column, (row * grid_width < grid_pixels) & (column < grid_width)


@triton.jit
def products(
    # descriptors
    x,
    x2,  # None: there is one input
    w,
    # sizes
    C,
    C2,
    # where the sum begins: sample, row and column of the first tap, row of w
    sample,
    top,
    left,
    first,
    # which steps of the sum
    start,
    end,
    # meta
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N), float32."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    channels = C + C2
    if x2 is None:
        acc = _added(acc, x, w, sample, top, left, first, 0, channels, start, end, TAPS, BLOCK_M, BLOCK_K)
    else:  # a split of the sum may have steps of both inputs, or of one
        middle = tl.cdiv(C, BLOCK_K) * TAPS * TAPS
        stop, begin = tl.minimum(end, middle), tl.maximum(start, middle)
        if stop > start:
            acc = _added(acc, x, w, sample, top, left, first, 0, channels, start, stop, TAPS, BLOCK_M, BLOCK_K)
        if end > begin:
            begin, end = begin - middle, end - middle
            acc = _added(acc, x2, w, sample, top, left, first, C, channels, begin, end, TAPS, BLOCK_M, BLOCK_K)
    return acc.T


@triton.jit
def _added(
    acc,
    x,
    w,
    sample,
    top,
    left,
    first,
    before,  # channels of w before those of x
    channels,  # of w
    start,
    end,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for step in tl.range(start, end):
        c, tap = step // (TAPS * TAPS) * BLOCK_K, step % (TAPS * TAPS)
        pixels = x.load([sample, top + tap // TAPS, left + tap % TAPS, c]).reshape(BLOCK_M, BLOCK_K)
        weights = w.load([first, tap * channels + before + c])
        acc = tl.dot(weights, pixels.T, acc, input_precision="ieee")
    return acc


def can_read(x: Tensor, x2: Tensor | None, w: Tensor) -> bool:
    """Whether TMA can address the arguments of `conv2d`."""
    maps = _maps(x, x2)
    even = all(t.shape[-1] * t.itemsize % 16 == 0 for t in maps)  # so that are the taps' and inputs' beginnings in w
    return even and w.data_ptr() % 16 == 0 and all(tma_reads(t, row_stride(t, "a map")) for t in maps)


def descriptors(x: Tensor, x2: Tensor | None, w: Tensor, taps: int, tile: Convolution) -> dict[str, Any]:
    """Arguments of a launch in place of the tensors. taps: on a side."""
    maps = _maps(x, x2)
    depth = taps * taps * sum(t.shape[-1] for t in maps)
    weights = TensorDescriptor(w, [w.numel() // depth, depth], [depth, 1], [tile.block_n, tile.block_k])
    first, *second = (_boxes(t, taps, tile) for t in maps)
    return {"x": first, "x2": second[0] if second else None, "w": weights}


def _maps(x: Tensor, x2: Tensor | None) -> list[Tensor]:
    return [t.permute(0, 2, 3, 1) for t in (x, x2) if t is not None]


def _boxes(x: Tensor, taps: int, tile: Convolution) -> TensorDescriptor:
    samples, height, width, channels = x.shape
    if taps == 1:
        height, width = 1, height * width
    stride = row_stride(x, "a map")
    strides = [height * width * stride, width * stride, stride, 1]
    box = [1, tile.block_m // tile.block_w, tile.block_w, tile.block_k]
    return TensorDescriptor(x, [samples, height, width, channels], strides, box)
