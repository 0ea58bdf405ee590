"""Flash attention, forward, not causal: the scores never leave the chip.

    out = softmax(q kᵀ · scale + mask) v        Dao et al., arXiv 2205.14135; the running maximum: arXiv 1805.02867

Layout: q (B, Lq, H, D), k and v (B, Lk, H, D) by strides, columns contiguous; out (B, Lq, H, D) contiguous. A head of
D columns is held as D1 + D2, powers of two (40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32), so that no work is padded to
the next one. Float32 is multiplied without tensor cores, from registers: q and k go there by DEPTH columns at a time.
Grid: BLOCK_M queries × B·H heads × parts of v's columns; a program goes over all keys. With few keys
(`_short`) they are loaded once and a program goes over several blocks of queries.
FLOPs: 4 · B · H · Lq · Lk · D. Bytes: q, out once; k, v once for each program of their head, from L2.
Scores are multiplied by scale · log2(e) in the exponent's own fused multiply-add and exponentiated with base 2; that
holds for scores below 2²⁸, where a rounding of the maximum is still small beside float16's range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, require, require_dtype

LOG2_E = tl.constexpr(math.log2(math.e))
LEAST_SCALE = 1e-30  # in place of 0: where there is no key the score is −inf, and stays it


@triton.jit
def _rows(
    base,
    stride,
    left,  # how many rows there are from `base` on
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,  # all BLOCK rows are there
):
    """Columns FIRST .. FIRST + WIDTH of BLOCK rows, 0 beyond the last row and beyond column D."""
    r = tl.arange(0, BLOCK)
    c = FIRST + tl.arange(0, WIDTH)
    at = base + r[:, None] * stride + c[None, :]
    if WHOLE and FIRST + WIDTH <= D:
        tile = tl.load(at)
    elif WHOLE:
        tile = tl.load(at, mask=(c < D)[None, :], other=0.0)
    elif FIRST + WIDTH <= D:
        tile = tl.load(at, mask=(r < left)[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=(r < left)[:, None] & (c < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store(base, stride, left, tile, BLOCK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    r = tl.arange(0, BLOCK)
    c = FIRST + tl.arange(0, WIDTH)
    inside = (r < left)[:, None] & (c < D)[None, :]
    tl.store(base + r[:, None] * stride + c[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _products(q1, q2, k1, k2, D2: tl.constexpr):
    """q kᵀ of both pieces."""
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
    return s


@triton.jit
def _products_from_memory(
    q,
    k,
    q_row,
    k_row,
    queries,
    keys,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q kᵀ, DEPTH columns at a time. q, k: at the first query and key of the block."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, DEPTH)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, D, DEPTH):
        known = (at + c < D)[None, :]
        columns = (at + c)[None, :]
        q1 = tl.load(q + m[:, None] * q_row + columns, mask=(m < queries)[:, None] & known, other=0.0)
        k1 = tl.load(k + n[:, None] * k_row + columns, mask=(n < keys)[:, None] & known, other=0.0)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return s


@triton.jit
def _scores(
    s,  # q kᵀ
    mask,  # None, or at the first query and key of the block
    mask_m,
    mask_n,
    queries,  # how many there are from the block's first on
    keys,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,  # all BLOCK_N keys are there
):
    """As they are, or with a mask s · scale + mask · log2(e); −inf where there is no key."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    if mask is not None:
        at = mask + m[:, None].to(tl.int64) * mask_m + n[None, :] * mask_n
        more = tl.load(at, mask=(m < queries)[:, None] & (n < keys)[None, :], other=0.0)
        s = s * scale + more.to(tl.float32) * LOG2_E
    if not WHOLE:
        s = tl.where((n < keys)[None, :], s, -float("inf"))
    return s


@triton.jit
def _weights(s, top, scale, HAS_MASK: tl.constexpr):
    """exp2 of the scores below their maximum."""
    if HAS_MASK:
        top = tl.where(top == -float("inf"), 0.0, top)  # every key so far is hidden
        p = tl.exp2(s - top[:, None])
    else:
        p = tl.exp2(s * scale - top[:, None])
    return p


@triton.jit
def _step(
    q,  # at the first query of the block; with DEPTH = 0 its columns are in q1 and q2
    q1,
    q2,
    k,  # at the first key of the block
    v,
    mask,
    acc1,
    acc2,
    top,
    total,
    q_row,
    k_row,
    v_row,
    mask_m,
    mask_n,
    queries,
    keys,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One block of keys into the running maximum, sum and output of each query."""
    HAS_MASK: tl.constexpr = mask is not None
    if DEPTH > 0:
        s = _products_from_memory(q, k, q_row, k_row, queries, keys, D, DEPTH, BLOCK_M, BLOCK_N)
    else:
        k1 = _rows(k, k_row, keys, BLOCK_N, 0, D1, D, WHOLE)
        k2 = k1
        if D2 > 0:
            k2 = _rows(k, k_row, keys, BLOCK_N, D1, D2, D, WHOLE)
        s = _products(q1, q2, k1, k2, D2)
    s = _scores(s, mask, mask_m, mask_n, queries, keys, scale, BLOCK_M, BLOCK_N, WHOLE)
    highest = tl.max(s, 1)
    if not HAS_MASK:
        highest = highest * scale
    new = tl.maximum(top, highest)
    p = _weights(s, new, scale, HAS_MASK)
    shrink = tl.exp2(top - (tl.where(new == -float("inf"), 0.0, new) if HAS_MASK else new))
    total = total * shrink + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    v1 = _rows(v, v_row, keys, BLOCK_N, 0, V1, D, WHOLE)
    acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision="ieee")
    if D2 > 0:
        v2 = _rows(v, v_row, keys, BLOCK_N, D1, D2, D, WHOLE)
        acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision="ieee")
    return acc1, acc2, new, total


@triton.jit(do_not_specialize=["lq", "lk", "heads"])
def _attention(
    # tensors
    q,
    k,
    v,
    mask,  # None: nothing is added
    out,
    # sizes
    lq,
    lk,
    heads,
    scale,  # times log2(e)
    # strides of a batch, of a row, in elements; of a mask also of a head and a key
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    # meta
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,  # 0: one piece
    PARTS: tl.constexpr,  # of v's columns, each a program's
    DEPTH: tl.constexpr,  # 0: q stays in registers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    V1: tl.constexpr = D1 // PARTS
    first = tl.program_id(0) * BLOCK_M
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    column = tl.program_id(2) * V1
    row = first.to(tl.int64)
    queries = lq - first
    q += b * q_batch + row * q_row + h * Q_HEAD
    k += b * k_batch + h * K_HEAD
    v += b * v_batch + h * V_HEAD + column
    out += ((b * lq + row) * heads + h) * D + column
    if mask is not None:
        mask += b * mask_b + h.to(tl.int64) * mask_h + row * mask_m
    q1 = q
    if DEPTH == 0:
        q1 = _rows(q, q_row, queries, BLOCK_M, 0, D1, D, False)
    q2 = q1
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = 0.0
    if D2 > 0:
        if DEPTH == 0:
            q2 = _rows(q, q_row, queries, BLOCK_M, D1, D2, D, False)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(lk // BLOCK_N):
        acc1, acc2, top, total = _step(
            q, q1, q2, k, v, mask, acc1, acc2, top, total, q_row, k_row, v_row, mask_m, mask_n, queries, BLOCK_N, scale,
            D, D1, D2, V1, DEPTH, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        k += BLOCK_N * k_row
        v += BLOCK_N * v_row
        if mask is not None:
            mask += BLOCK_N * mask_n
    if lk % BLOCK_N > 0:
        acc1, acc2, top, total = _step(
            q, q1, q2, k, v, mask, acc1, acc2, top, total, q_row, k_row, v_row, mask_m, mask_n, queries, lk % BLOCK_N,
            scale, D, D1, D2, V1, DEPTH, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    share = 1.0 / total
    _store(out, heads * D, queries, acc1 * share[:, None], BLOCK_M, 0, V1, D)
    if D2 > 0:
        _store(out, heads * D, queries, acc2 * share[:, None], BLOCK_M, D1, D2, D)


@triton.jit(do_not_specialize=["lq", "lk", "heads", "walk"])
def _short(
    # tensors
    q,
    k,
    v,
    mask,  # None: nothing is added
    out,
    # sizes
    lq,
    lk,  # at most BLOCK_N
    heads,
    walk,  # how many queries a program goes over, a multiple of BLOCK_M
    scale,  # times log2(e)
    # strides of a batch, of a row, in elements; of a mask also of a head and a key
    q_batch,
    q_row,
    k_batch,
    k_row,
    v_batch,
    v_row,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    # meta
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,  # 0: one piece
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    q += b * q_batch + h * Q_HEAD
    k += b * k_batch + h * K_HEAD
    v += b * v_batch + h * V_HEAD
    out += (b * lq * heads + h) * D
    if mask is not None:
        mask += b * mask_b + h.to(tl.int64) * mask_h
    k1 = _rows(k, k_row, lk, BLOCK_N, 0, D1, D, False)
    v1 = _rows(v, v_row, lk, BLOCK_N, 0, D1, D, False)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = _rows(k, k_row, lk, BLOCK_N, D1, D2, D, False)
        v2 = _rows(v, v_row, lk, BLOCK_N, D1, D2, D, False)
    begin = tl.program_id(0) * walk
    for done in range(0, tl.minimum(walk, lq - begin), BLOCK_M):
        row = begin.to(tl.int64) + done
        queries = lq - begin - done
        q1 = _rows(q + row * q_row, q_row, queries, BLOCK_M, 0, D1, D, False)
        q2 = q1
        if D2 > 0:
            q2 = _rows(q + row * q_row, q_row, queries, BLOCK_M, D1, D2, D, False)
        here = mask if mask is None else mask + row * mask_m
        s = _products(q1, q2, k1, k2, D2)
        s = _scores(s, here, mask_m, mask_n, queries, lk, scale, BLOCK_M, BLOCK_N, False)
        top = tl.max(s, 1) if mask is not None else tl.max(s, 1) * scale
        p = _weights(s, top, scale, mask is not None)
        share = 1.0 / tl.sum(p, 1)
        p = p.to(q1.dtype)
        to = out + row * heads * D
        y = tl.dot(p, v1, input_precision="ieee")
        _store(to, heads * D, queries, y * share[:, None], BLOCK_M, 0, D1, D)
        if D2 > 0:
            y = tl.dot(p, v2, input_precision="ieee")
            _store(to, heads * D, queries, y * share[:, None], BLOCK_M, D1, D2, D)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """q: (B, Lq, H, D), k, v: (B, Lk, H, D), float16, bfloat16 or float32, the last dimension contiguous.

    mask: float16, bfloat16 or float32, broadcastable to (B, H, Lq, Lk). -> (B, Lq, H, D), contiguous.
    Raises `Unsupported` for another dtype, a head dim over 256 that is not 512, no keys, or a negative scale.
    """
    batch, lq, heads, dim = q.shape
    lk = k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    require_dtype(DTYPES, q=q, k=k, v=v)
    for name, t in {"q": q, "k": k, "v": v}.items():
        require(t.stride(-1) == 1 or dim == 1, f"the last dimension of {name} is not contiguous")
        require(t.stride(1) * tuning.MOST_ROWS < 2**31, f"the rows of {name} are too far apart")
    require(k.shape == v.shape == (batch, lk, heads, dim), "k or v does not fit q")
    require(lk > 0, "there are no keys")
    require(0 <= scale < math.inf, f"scale={scale}")
    require(batch * heads < 2**16, "more than 65535 heads")
    if mask is not None:
        require(mask.dtype in DTYPES, f"the mask is {mask.dtype}")
        mask = mask.expand(batch, heads, lq, lk)
    tile = tuning.attention(dim, lk, q.dtype == torch.float32)
    out = empty(q.shape, like=q)
    blocks = triton.cdiv(lq, tile.block_m)
    common: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "out": out,
        "lq": lq,
        "lk": lk,
        "heads": heads,
        "scale": max(scale, LEAST_SCALE) * math.log2(math.e),
        **{f"{name}_batch": t.stride(0) for name, t in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_row": t.stride(1) for name, t in (("q", q), ("k", k), ("v", v))},
        **{f"mask_{axis}": None if mask is None else mask.stride(i) for i, axis in enumerate("bhmn")},
        **{f"{name}_HEAD": t.stride(2) for name, t in (("Q", q), ("K", k), ("V", v))},
        "D": dim,
        "D1": tile.d1,
        "D2": tile.d2,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "warps": tile.warps,
        "stages": tile.stages,
    }
    if tile.short:
        each = tuning.attention_walk(blocks, batch * heads)
        launch(_short, (triton.cdiv(blocks, each), batch * heads), walk=each * tile.block_m, **common)
    else:
        launch(_attention, (blocks, batch * heads, tile.parts), PARTS=tile.parts, DEPTH=tile.depth, **common)
    return out
