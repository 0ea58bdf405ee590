"""Sinusoids of timesteps, and the first linear layer with its activation where there is one.

    y = act(waves wᵀ + b)      waves = (sin(t · f_i), cos(t · f_i))      f_i = 10000^(−i / (dim/2 − shift))
                                                                   Vaswani et al., arXiv 1706.03762, section 3.5

Layout: t is (M,) float32, w (O, dim), y (M, O), all contiguous. Grid: `_waves`, a program for BLOCK_M timesteps and
BLOCK_I frequencies; `_projected`, one for BLOCK_M timesteps and BLOCK_O outputs, which computes its waves in registers,
brings them to w's dtype as the layer's input would be, and multiplies.
Frequencies are float64 until they are rounded once: an angle is as much as 1000 times as wrong as its frequency.
Bytes: read w, once for BLOCK_M timesteps. FLOPs: 2 · M · O · dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, empty, launch, require, require_dtype


@triton.jit
def _angles(time, i, HALF: tl.constexpr, SHIFT: tl.constexpr):
    """time (BLOCK_M,) by i (BLOCK_I,): t · f_i, float32."""
    exponents = i.to(tl.float64) / (HALF - SHIFT)
    frequencies = tl.exp(-9.210340371976184 * exponents).to(tl.float32)  # −ln 10000
    return time[:, None] * frequencies[None, :]


@triton.jit(do_not_specialize=["rows"])
def _waves(
    # tensors
    t,
    out,
    # sizes
    rows,
    # meta
    DIM: tl.constexpr,
    SHIFT: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    angles = _angles(tl.load(t + r, mask=r < rows, other=0.0), i, HALF, SHIFT)
    inside = (r < rows)[:, None] & (i < HALF)[None, :]
    to = out + r.to(tl.int64)[:, None] * DIM + i[None, :]
    tl.store(to + (HALF if FLIP else 0), tl.sin(angles), mask=inside)
    tl.store(to + (0 if FLIP else HALF), tl.cos(angles), mask=inside)
    if DIM % 2 == 1:
        tl.store(out + r.to(tl.int64) * DIM + (DIM - 1), tl.zeros((BLOCK_M,), tl.float32), mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def _projected(
    # tensors
    t,
    w,
    b,  # None where HAS_BIAS is false
    out,
    # sizes
    rows,
    # meta
    DIM: tl.constexpr,
    O: tl.constexpr,  # noqa: E741  the contract's letter
    SHIFT: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    r, o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    time = tl.load(t + r, mask=r < rows, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, HALF, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        angles = _angles(time, i, HALF, SHIFT)
        columns = w + o[None, :] * DIM + i[:, None]
        known = (o < O)[None, :] & (i < HALF)[:, None]
        of_sines = tl.load(columns + (HALF if FLIP else 0), mask=known, other=0.0)
        of_cosines = tl.load(columns + (0 if FLIP else HALF), mask=known, other=0.0)
        total = tl.dot(tl.sin(angles).to(w.dtype.element_ty), of_sines, total, input_precision="ieee")
        total = tl.dot(tl.cos(angles).to(w.dtype.element_ty), of_cosines, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(b + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    to = out + r.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (o < O)[None, :])


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    flip: bool,
    shift: float,
    w: Tensor | None = None,
    b: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """t: (...,) float32, contiguous; w: (O, dim), b: (O,), float16, bfloat16 or float32. -> (..., dim) or (..., O).

    Raises `Unsupported` for float64, an activation but "silu", and where no frequency is defined: shift = dim/2,
    dim = 1.
    """
    require_dtype((float32,), t=t)
    require(t.is_contiguous(), "t is not contiguous")
    require(dim > 1 and shift != dim // 2, f"shift={shift} of {dim // 2} frequencies")
    if w is None:
        require(b is None and act is None, "a bias or an activation without w")
        return _sinusoids(t, dim, flip, shift)
    require_dtype(DTYPES, w=w, b=b)
    require(act in (None, "silu"), f"act={act!r}, not None or 'silu'")
    require(w.is_contiguous() and (b is None or b.is_contiguous()), "w or b is not contiguous")
    require(w.shape[1:] == (dim,), f"w is not for {dim} columns")
    require(b is None or b.shape == w.shape[:1], f"b is not for {len(w)} outputs")
    tile = tuning.TIMESTEP_EMBEDDING
    out = empty((*t.shape, len(w)), like=w)
    launch(
        _projected,
        (triton.cdiv(t.numel(), tile.block_m), triton.cdiv(len(w), tile.block_o)),
        t=t,
        w=w,
        b=b,
        out=out,
        rows=t.numel(),
        DIM=dim,
        O=len(w),
        SHIFT=shift,
        FLIP=flip,
        HAS_BIAS=b is not None,
        SILU=act == "silu",
        BLOCK_M=tile.block_m,
        BLOCK_O=tile.block_o,
        BLOCK_I=tile.block_i,
        warps=tile.warps,
        stages=1,
    )
    return out


def _sinusoids(t: Tensor, dim: int, flip: bool, shift: float) -> Tensor:
    tile = tuning.TIMESTEP_EMBEDDING
    out = empty((*t.shape, dim), like=t)
    launch(
        _waves,
        (triton.cdiv(t.numel(), tile.block_m), triton.cdiv(dim // 2, tile.block_i)),
        t=t,
        out=out,
        rows=t.numel(),
        DIM=dim,
        SHIFT=shift,
        FLIP=flip,
        BLOCK_M=tile.block_m,
        BLOCK_I=tile.block_i,
        warps=8,
        stages=1,
    )
    return out
