"""value · gelu(gate) where (value, gate) = split(x wᵀ + b), without the product's 2 F columns ever being stored.

Layout: x is (M, K), rows any stride apart, columns contiguous; w is (2 F, K), contiguous, the value's rows first; the
output is (M, F), contiguous. Grid: a program computes BLOCK_M rows × (BLOCK_N + SIDE) columns of the product in
float32. It reads w's rows in pairs: columns 2 j and 2 j + 1 of a tile are the value and the gate of one output, so that
a single product serves both, and the two lie in the same thread when they meet. SIDE and GROUP: see `linear.py`.
By TMA w is a tensor (F, 2, K), of which a tile is such pairs; what lies outside of a tensor is read as zeros.
FLOPs: 4 M F K. Bytes: x, w and the output once, `itemsize` each.                          Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, require, require_dtype, row_stride, tma_reads
from fastldm.kernels.linear import gelu, tile_of


@triton.jit
def _row_of(column, F):
    """The row of w for a column of the product: value 0, gate 0, value 1, gate 1, ..."""
    return tl.minimum(column // 2, F - 1) + column % 2 * F


@triton.jit
def _pairs(w, column, k):
    """A tile of w by TMA, its rows those of the columns from `column` on."""
    tile = w.load([column // 2, 0, k])
    return tile.reshape(2 * tile.shape[0], tile.shape[2])


@triton.jit
def _finish(acc, out, m, column, M, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores value · gelu(gate) of the columns from `column` on."""
    value, gate = tl.split(acc.reshape(BLOCK_M, BLOCK_N // 2, 2))
    f = column // 2 + tl.arange(0, BLOCK_N // 2)
    inside = (m < M)[:, None] & (f < F)[None, :]
    tl.store(out + m[:, None] * F + f[None, :], (value * gelu(gate)).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "steps"])
def _geglu(
    # tensors; by TMA: descriptors of x and w
    x,
    w,
    w_side,  # w for the second accumulator, by TMA; otherwise None
    b,
    out,
    # sizes
    M,
    F,
    K,
    steps,  # of BLOCK_K
    # stride of a row, in elements
    x_stride,
    # meta
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,  # columns of the second accumulator; 0: there is none
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # the steps make up K
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    tl.assume(steps > 0)  # or else the products wait for each other on sm_90
    row, tile = tile_of(tl.program_id(0), M, 2 * F, BLOCK_M, BLOCK_N + SIDE, GROUP)
    m = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * (BLOCK_N + SIDE)
    k = tl.arange(0, BLOCK_K)
    rows = _row_of(column + tl.arange(0, BLOCK_N), F)
    if not TMA:  # Rows past the end are read as the last one, and not stored: no masks in the loop.
        x_tile = x + tl.minimum(m, M - 1)[:, None] * x_stride + k[None, :]
        w_tile = w + rows.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(b + rows).to(tl.float32)[None, :]
    if SIDE > 0:
        side_rows = _row_of(column + BLOCK_N + tl.arange(0, SIDE), F)
        if not TMA:
            side_tile = w + side_rows.to(tl.int64)[None, :] * K + k[:, None]
        acc_side = tl.zeros((BLOCK_M, SIDE), tl.float32) + tl.load(b + side_rows).to(tl.float32)[None, :]
    for step in range(steps):
        at = step * BLOCK_K
        if TMA:
            x_part, w_part = x.load([row * BLOCK_M, at]), _pairs(w, column, at).T
        elif WHOLE:
            x_part, w_part = tl.load(x_tile + at), tl.load(w_tile + at)
        else:
            x_part = tl.load(x_tile + at, mask=(at + k < K)[None, :], other=0.0)
            w_part = tl.load(w_tile + at, mask=(at + k < K)[:, None], other=0.0)
        acc = tl.dot(x_part, w_part, acc, input_precision="ieee")
        if SIDE > 0:
            if TMA:
                side_part = _pairs(w_side, column + BLOCK_N, at).T
            elif WHOLE:
                side_part = tl.load(side_tile + at)
            else:
                side_part = tl.load(side_tile + at, mask=(at + k < K)[:, None], other=0.0)
            acc_side = tl.dot(x_part, side_part, acc_side, input_precision="ieee")
    _finish(acc, out, m, column, M, F, BLOCK_M, BLOCK_N)
    if SIDE > 0:
        _finish(acc_side, out, m, column + BLOCK_N, M, F, BLOCK_M, SIDE)


def geglu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x: (..., K), float16, bfloat16 or float32; w: (2 F, K); b: (2 F,). -> (..., F), contiguous.

    Raises `Unsupported` for another dtype, or where x's rows are not evenly spaced.
    """
    require_dtype(DTYPES, x=x, w=w, b=b)
    n, k = w.shape
    require(n % 2 == 0, f"w has {n} rows, which cannot be halved")
    require(x.shape[-1] == k, f"x has {x.shape[-1]} columns, w has {k}")
    require(w.is_contiguous() and b.is_contiguous(), "w or b is not contiguous")
    m, x_stride = x.numel() // k, row_stride(x, "x")
    tile = tuning.geglu(m, n, x.dtype)
    steps = triton.cdiv(k, tile.depth)
    by_tma = tuning.by_tma(tile) and tma_reads(x, x_stride) and tma_reads(w, k)

    def pairs(columns: int) -> TensorDescriptor:
        return TensorDescriptor(w, [n // 2, 2, k], [k, n // 2 * k, 1], [columns // 2, 2, tile.depth])

    out = empty((*x.shape[:-1], n // 2), like=x)
    launch(
        _geglu,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns + tile.side),),
        x=TensorDescriptor(x, [m, k], [x_stride, 1], [tile.rows, tile.depth]) if by_tma else x,
        w=pairs(tile.columns) if by_tma else w,
        w_side=pairs(tile.side) if by_tma and tile.side else None,
        b=b,
        out=out,
        M=m,
        x_stride=x_stride,
        F=n // 2,
        K=k,
        steps=steps,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        SIDE=tile.side,
        BLOCK_K=tile.depth,
        WHOLE=steps * tile.depth == k,
        GROUP=tile.group,
        TMA=by_tma,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out
