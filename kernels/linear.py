"""act(x wᵀ + b) + residual: one matrix product, the rest of it on the accumulators before they are stored.

Layout: x is (M, K), rows any stride apart, columns contiguous; w is (N, K), contiguous; the output is contiguous.
Grid: a program computes BLOCK_M rows × (BLOCK_N + SIDE) columns in float32. The channels of these models are multiples
of 160, tiles are powers of two: with 128 + 32 columns as two accumulators over the same tile of x nothing is computed
in vain. Programs run in groups of GROUP tiles of rows, so that what is read of w stays in L2.
Where M is short there are too few programs for a chip: K is then cut into parts, whose products are written in
float32 and added by a second launch, always in the same order.
Tiles of x and w are read through pointers or by TMA, to which what lies outside of a tensor is zeros.
FLOPs: 2 M N K. Bytes: x, w and the residual once, the output once, `itemsize` each; with parts 8 · M · N more for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32
from triton.tools.tensor_descriptor import TensorDescriptor

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, require, require_dtype, row_stride, tma_reads

ACTIVATIONS = (None, "silu", "gelu", "quick_gelu")


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    if ACT == "gelu":
        x = gelu(x)
    if ACT == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows and of columns a program computes: down the columns of a group of GROUP tiles of rows."""
    across = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = program % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def _bias(b, n, N, BLOCK_M: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Where a sum starts: rows of the bias. Added at the end it would take as many registers as the sum."""
    acc = tl.zeros((BLOCK_M, n.shape[0]), tl.float32)
    if HAS_BIAS:
        acc += tl.load(b + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _finish(acc, residual, out, m, n, M, residual_stride, N, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    """Stores act(acc) + residual at rows m, columns n."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = _activated(acc, ACT)
    if RESIDUAL:
        acc += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "steps"])
def _linear(
    # tensors; by TMA: descriptors of x and w
    x,
    w,
    w_side,  # w for the second accumulator, by TMA; otherwise None
    b,
    residual,
    out,  # with splits the parts: (splits, M, N), float32
    # sizes
    M,
    N,
    K,
    steps,  # of BLOCK_K, that a part has
    # strides of a row, in elements
    x_stride,
    residual_stride,
    # meta
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,  # columns of the second accumulator; 0: there is none
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # the parts' steps make up K
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    tl.assume(steps > 0)  # or else the products wait for each other on sm_90
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N + SIDE, GROUP)
    part = tl.program_id(1)
    m = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * (BLOCK_N + SIDE) + tl.arange(0, BLOCK_N)
    first_k = part * (steps * BLOCK_K)
    k = first_k + tl.arange(0, BLOCK_K)
    if not TMA:  # Rows past the end are read as the last one, and not stored: no masks in the loop.
        x_tile = x + tl.minimum(m, M - 1)[:, None] * x_stride + k[None, :]
        w_tile = w + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = _bias(b, n, N, BLOCK_M, HAS_BIAS)
    if SIDE > 0:
        n_side = column * (BLOCK_N + SIDE) + BLOCK_N + tl.arange(0, SIDE)
        if not TMA:
            side_tile = w + tl.minimum(n_side, N - 1).to(tl.int64)[None, :] * K + k[:, None]
        acc_side = _bias(b, n_side, N, BLOCK_M, HAS_BIAS)
    for step in range(steps):
        at = step * BLOCK_K
        if TMA:
            x_part = x.load([row * BLOCK_M, first_k + at])
            w_part = w.load([column * (BLOCK_N + SIDE), first_k + at]).T
        elif WHOLE:
            x_part, w_part = tl.load(x_tile + at), tl.load(w_tile + at)
        else:
            x_part = tl.load(x_tile + at, mask=(at + k < K)[None, :], other=0.0)
            w_part = tl.load(w_tile + at, mask=(at + k < K)[:, None], other=0.0)
        acc = tl.dot(x_part, w_part, acc, input_precision="ieee")
        if SIDE > 0:
            if TMA:
                side_part = w_side.load([column * (BLOCK_N + SIDE) + BLOCK_N, first_k + at]).T
            elif WHOLE:
                side_part = tl.load(side_tile + at)
            else:
                side_part = tl.load(side_tile + at, mask=(at + k < K)[:, None], other=0.0)
            acc_side = tl.dot(x_part, side_part, acc_side, input_precision="ieee")
    out += part.to(tl.int64) * M * N
    _finish(acc, residual, out, m, n, M, residual_stride, N, ACT, HAS_RESIDUAL)
    if SIDE > 0:
        _finish(acc_side, residual, out, m, n_side, M, residual_stride, N, ACT, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["M", "splits"])
def _sum_of_parts(
    # tensors
    parts,  # (splits, M, N), float32
    b,
    residual,
    out,
    # sizes
    splits,
    M,
    N,
    # strides of a row, in elements
    residual_stride,
    # meta
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = _bias(b, n, N, BLOCK_M, HAS_BIAS)
    for part in range(splits):
        rows = (m + part * M)[:, None]
        acc += tl.load(parts + rows * N + n[None, :], mask=inside, other=0.0)
    _finish(acc, residual, out, m, n, M, residual_stride, N, ACT, HAS_RESIDUAL)


def linear(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, act: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """x: (..., K), float16, bfloat16 or float32; w: (N, K); b: (N,); residual: (..., N). -> (..., N), contiguous.

    Raises `Unsupported` for another dtype or activation, or where rows are not evenly spaced.
    """
    require(act in ACTIVATIONS, f"act is {act!r}, not {', '.join(map(repr, ACTIVATIONS))}")
    require_dtype(DTYPES, x=x, w=w, b=b, residual=residual)
    n, k = w.shape
    m, shape = x.numel() // k, (*x.shape[:-1], n)
    require(x.shape[-1] == k, f"x has {x.shape[-1]} columns, w has {k}")
    require(w.is_contiguous() and (b is None or b.is_contiguous()), "w or b is not contiguous")
    require(residual is None or residual.shape == shape, "the residual has another shape than the output")
    x_stride = row_stride(x, "x")
    tile = tuning.linear(m, n, k, x.dtype)
    steps = triton.cdiv(k, tile.splits * tile.depth)
    by_tma = tuning.by_tma(tile) and tma_reads(x, x_stride) and tma_reads(w, k)

    def tiled(matrix: Tensor, rows: int, stride: int, block_rows: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, [rows, k], [stride, 1], [block_rows, tile.depth])

    end = {
        "b": b,
        "residual": residual,
        "residual_stride": None if residual is None else row_stride(residual, "the residual"),
        "ACT": act,
        "HAS_BIAS": b is not None,
        "HAS_RESIDUAL": residual is not None,
    }
    later = {
        "b": None,
        "residual": None,
        "residual_stride": None,
        "ACT": None,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
    }
    out = empty(shape, like=x)
    target = out if tile.splits == 1 else empty((tile.splits, m, n), like=x, dtype=float32)
    launch(
        _linear,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns + tile.side), tile.splits),
        x=tiled(x, m, x_stride, tile.rows) if by_tma else x,
        w=tiled(w, n, k, tile.columns) if by_tma else w,
        w_side=tiled(w, n, k, tile.side) if by_tma and tile.side else None,
        out=target,
        M=m,
        x_stride=x_stride,
        N=n,
        K=k,
        steps=steps,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        SIDE=tile.side,
        BLOCK_K=tile.depth,
        WHOLE=tile.splits * steps * tile.depth == k,
        GROUP=tile.group,
        TMA=by_tma,
        warps=tile.warps,
        stages=tile.stages,
        **(end if tile.splits == 1 else later),
    )
    if tile.splits > 1:
        launch(
            _sum_of_parts,
            (triton.cdiv(m, tuning.SUM_ROWS), triton.cdiv(n, tuning.SUM_COLUMNS)),
            parts=target,
            out=out,
            M=m,
            N=n,
            BLOCK_M=tuning.SUM_ROWS,
            BLOCK_N=tuning.SUM_COLUMNS,
            splits=tile.splits,
            warps=4,
            stages=1,
            **end,
        )
    return out
