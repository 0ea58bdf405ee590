"""Decoded pixels as bytes: the last kernel before a picture is copied to the host.

    y = round(255 · clamp(x/2 + 1/2, 0, 1)), halves to even

Layout: x is (B, C, H, W) of any strides, y (B, H, W, C), contiguous. Grid: for each sample a program for BLOCK numbers
in y's order; where a sample of x lies in that order (channels_last), it is read as it lies.
Rounding: x/2 + 1/2 in x's dtype, the product in float32, as the same ops one by one. The product is rounded before it
is rounded to an integer, in fixed point: a compiler that fused a multiplication and an addition would leave that out.
Bytes: read `C · itemsize` and write `C` for each pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, uint8

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, require, require_dtype


@triton.jit
def _rounded(x, BITS: tl.constexpr):
    """x / 2^BITS, halves to even."""
    return (x + ((1 << (BITS - 1)) - 1 + (x >> BITS & 1))) >> BITS


@triton.jit(do_not_specialize=["width", "row_stride", "column_stride", "channel_stride"])
def _to_uint8(
    # tensors
    x,
    out,
    # sizes
    size,  # of a sample, in elements
    width,
    # strides of x, in elements
    sample_stride,
    row_stride,
    column_stride,
    channel_stride,
    # meta
    C: tl.constexpr,
    FLAT: tl.constexpr,  # a sample of x lies as that of `out`
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x += n * sample_stride
    if FLAT:
        at = i
    else:
        pixel = i // C
        at = pixel // width * tl.cast(row_stride, tl.int64) + pixel % width * tl.cast(column_stride, tl.int64)
        at += i % C * tl.cast(channel_stride, tl.int64)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    unit = tl.minimum(tl.maximum(value * 0.5 + 0.5, 0.0), 1.0)
    if x.dtype.element_ty == tl.bfloat16:  # as its cast does, which cuts off in Triton's interpreter
        unit = (_rounded(unit.to(tl.uint32, bitcast=True), 16) << 16).to(tl.float32, bitcast=True)
    else:
        unit = unit.to(x.dtype.element_ty).to(tl.float32)
    product = unit * 255.0
    fixed = (product * (1 << 24)).to(tl.uint32)  # exact from 1/2 on; the rest becomes 0 either way
    tl.store(out + n * size + i, _rounded(fixed, 24).to(tl.uint8), mask=inside)


def to_uint8(pixels: Tensor) -> Tensor:
    """pixels: float16, bfloat16 or float32, finite.

    Raises `Unsupported` for other dtypes, and for samples of 2³¹ elements.
    """
    batch, channels, height, width = pixels.shape
    require_dtype(DTYPES, pixels=pixels)
    size, block = channels * height * width, tuning.TO_UINT8_BLOCK
    require(size < 1 << 31, "a sample has 2³¹ elements")
    out = empty((batch, height, width, channels), like=pixels, dtype=uint8)
    sample_stride, channel_stride, row_stride, column_stride = pixels.stride()
    launch(
        _to_uint8,
        (triton.cdiv(size, block), batch),
        x=pixels,
        out=out,
        size=size,
        width=width,
        sample_stride=sample_stride,
        row_stride=row_stride,
        column_stride=column_stride,
        channel_stride=channel_stride,
        C=channels,
        FLAT=pixels[0].permute(1, 2, 0).is_contiguous(),
        BLOCK=block,
        warps=tuning.TO_UINT8_WARPS,
        stages=1,
    )
    return out
