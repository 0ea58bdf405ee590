"""Layer norm over the last dimension, with the residual added first where there is one.

    s = x + residual        y = (s − mean(s)) / sqrt(var(s) + eps) · w + b          Ba, Kiros & Hinton, arXiv 1607.06450

Layout: x is (rows, C), rows any stride apart, columns contiguous; y and s are contiguous. Grid: one program for
BLOCK_R rows, each held whole in registers, so x is read once and the variance is that of s − mean, two passes over
registers: a mean of 1000 with unit variance keeps its digits.
Bytes: (read x) + (read residual, write s) + (write y), `C · itemsize` each; w and b come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, power_of_two, require, require_dtype, row_stride


@triton.jit(do_not_specialize=["rows"])
def _layer_norm(
    # tensors
    x,
    residual,  # None: nothing is added, and `total` is not written
    w,
    b,
    out,
    total,
    # sizes
    rows,
    eps,
    # strides of a row, in elements
    x_stride,
    residual_stride,
    # meta
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a power of two, at least C
    HAS_RESIDUAL: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < C)[None, :]
    s = tl.load(x + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        more = tl.load(residual + r[:, None] * residual_stride + c[None, :], mask=inside, other=0.0)
        s = (s.to(tl.float32) + more.to(tl.float32)).to(s.dtype)  # normalised is what is stored
        tl.store(total + r[:, None] * C + c[None, :], s, mask=inside)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / C
    centred = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    scale = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(b + c, mask=c < C, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + r[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x, residual: (..., C), float16, bfloat16 or float32; w, b: (C,). -> like x, contiguous; with a residual a pair.

    Raises `Unsupported` for another dtype, more than 8192 columns, or rows that are not evenly spaced.
    """
    columns = x.shape[-1]
    require_dtype(DTYPES, x=x, w=w, b=b, residual=residual)
    require(w.is_contiguous() and b.is_contiguous(), "w or b is not contiguous")
    require(residual is None or residual.shape == x.shape, "the residual has another shape than x")
    tile, rows = tuning.layer_norm(columns), x.numel() // columns
    out, total = empty(x.shape, like=x), None if residual is None else empty(x.shape, like=x)
    launch(
        _layer_norm,
        (triton.cdiv(rows, tile.block_rows),),
        x=x,
        residual=residual,
        w=w,
        b=b,
        out=out,
        total=total,
        rows=rows,
        eps=eps,
        x_stride=row_stride(x, "x"),
        residual_stride=None if residual is None else row_stride(residual, "the residual"),
        C=columns,
        BLOCK_R=tile.block_rows,
        BLOCK_C=power_of_two(columns),
        HAS_RESIDUAL=residual is not None,
        warps=tile.warps,
        stages=1,
    )
    return out if total is None else (out, total)
