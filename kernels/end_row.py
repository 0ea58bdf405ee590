"""The end of a row of the sampler: guidance, the update of the state, the inpainting blend, and one row further.

    g         = Σ_g guidance[r, g] · e_g                                                   arXiv 2207.12598
    g         = φ · g · std(e_last) / std(g) + (1 − φ) · g,  φ = rescale[r]                arXiv 2305.08891, 3.4
    x0        = clamp(p[r] · x + q[r] · g, ±limit[r])
    state'[i] = Σ_j a[r, i, j] · state[j] + b[r, i] · g + c[r, i] · noise + d[r, i] · x0
    state'[0] = mask · state'[0] + (1 − mask) · (u[r] · z0 + v[r] · n0)

Layout: the slots of the state, noise, z0, n0 and mask are contiguous; each sample of e is dense, either way around.
Grid: a program for BLOCK numbers of a sample, which reads all K slots there before it writes them. Where φ is not 0,
every program takes the standard deviations of its sample itself, from L2: no program waits for another.

The counter. `row` holds r below bit 32 and nothing above between launches. A program reads it by adding 2³², once: what
it finds is r, and how many came before it. All add before the last one does, and only the last goes on to r + 1 and
takes the tickets away: whoever reads it reads r, and a launch leaves nothing behind that the next would have to clear.
That is two kinds of atomic additions and no memory beside the counter, so a graph replays it; the counter alone needs
their order, so they are relaxed. On another stream it must not be read while this runs.
Bytes: read `K + 3` and write `K` slots of float32, the mask, and `G` branches of e.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, channels_last, float32, int64

from fastldm.kernels import tuning
from fastldm.kernels.group_norm import welford
from fastldm.kernels.launch import DTYPES, launch, require, require_dtype


@triton.jit
def _guided(e, guidance, n, i, inside, batch, size, G: tl.constexpr):
    """Numbers i of sample n, float32: the branches combined, and the last of them."""
    total = tl.zeros(i.shape, tl.float32)
    last = total
    for g in tl.static_range(G):
        last = tl.load(e + (g * batch + n) * size + i, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(guidance + g) * last
    return total, last


@triton.jit
def _deviations(mean, m2, count, size):
    """The sum of squared deviations over all lanes."""
    apart = mean - tl.sum(mean * count) / size
    return tl.sum(m2 + apart * apart * count)


@triton.jit
def _ratio(e, guidance, n, batch, size, G: tl.constexpr, BLOCK: tl.constexpr):
    """std(e_last) / std(g) of sample n, each of differences from its first value."""
    lane = tl.arange(0, BLOCK)
    pivot, pivot_last = _guided(e, guidance, n, tl.zeros((1,), tl.int32), size > 0, batch, size, G)
    mean = tl.zeros((BLOCK,), tl.float32)
    m2, mean_last, m2_last, step = mean, mean, mean, 0.0
    for start in range(0, size, BLOCK):
        inside = start + lane < size
        total, last = _guided(e, guidance, n, start + lane, inside, batch, size, G)
        step += 1.0
        mean, m2 = welford(mean, m2, total - pivot, inside, step)
        mean_last, m2_last = welford(mean_last, m2_last, last - pivot_last, inside, step)
    count = tl.cdiv(tl.maximum(size - lane, 0), BLOCK).to(tl.float32)
    return tl.sqrt(_deviations(mean_last, m2_last, count, size) / _deviations(mean, m2, count, size))


@triton.jit(do_not_specialize=["pixels", "slot_stride"])
def _end_row(
    # tensors
    state,
    e,
    noise,
    mask,
    z0,
    n0,
    row,
    # tables
    a,
    b,
    c,
    d,
    p,
    q,
    limit,
    u,
    v,
    guidance,
    rescale,
    # sizes
    pixels,  # in units
    slot_stride,  # of the state, in units of an element
    # meta
    UNIT: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of e
    BLOCK: tl.constexpr,
    BLOCK_STD: tl.constexpr,
):
    ticket = tl.atomic_add(row, 1 << 32, sem="relaxed")
    r = ticket & 0xFFFFFFFF
    pixels, slot_stride = pixels * UNIT, tl.cast(slot_stride, tl.int64) * UNIT
    n, batch, size = tl.program_id(1).to(tl.int64), tl.num_programs(1), pixels * C
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = n * size + i  # in a slot

    guidance += r * G
    in_e = (i % pixels) * C + i // pixels if CHANNELS_LAST else i
    g, _ = _guided(e, guidance, n, in_e, inside, batch, size, G)
    if G > 1:
        phi = tl.load(rescale + r)
        if phi != 0.0:
            g *= phi * _ratio(e, guidance, n, batch, size, G, BLOCK_STD) + (1.0 - phi)

    slots = ()  # type: tuple[Any, ...]
    for j in tl.static_range(K):
        slots = slots + (tl.load(state + j * slot_stride + at, mask=inside, other=0.0),)  # noqa: RUF005  for Triton
    bound = tl.load(limit + r)
    x0 = tl.load(p + r) * slots[0] + tl.load(q + r) * g
    x0 = tl.minimum(tl.maximum(x0, -bound), bound)
    fresh = tl.load(noise + at, mask=inside, other=0.0)
    for k in tl.static_range(K):
        entry = r * K + k
        new = tl.load(b + entry) * g + tl.load(c + entry) * fresh + tl.load(d + entry) * x0
        for j in tl.static_range(K):
            new += tl.load(a + entry * K + j) * slots[j]
        if k == 0:
            painted = tl.load(mask + n * pixels + i % pixels, mask=inside, other=0.0)
            kept = tl.load(u + r) * tl.load(z0 + at, mask=inside, other=0.0)
            kept += tl.load(v + r) * tl.load(n0 + at, mask=inside, other=0.0)
            new = painted * new + (1.0 - painted) * kept
        tl.store(state + k * slot_stride + at, new, mask=inside)

    programs = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    if (ticket >> 32) == programs - 1:
        tl.atomic_add(row, 1 - (programs << 32), sem="relaxed")


def end_row(
    state: Tensor, e: Tensor, tables: Any, row: Tensor, *, noise: Tensor, mask: Tensor, z0: Tensor, n0: Tensor
) -> None:
    """tables: `fastldm.ops.RowTables`. They, state, noise, mask, z0, n0: float32; e: float16, bfloat16 or float32;
    row: int64.

    Raises `Unsupported` for other dtypes, more than eight slots, and for layouts but those above.
    """
    slots, batch, channels, height, width = state.shape
    require_dtype((float32,), state=state, noise=noise, mask=mask, z0=z0, n0=n0, **vars(tables))
    require_dtype((int64,), row=row)
    require_dtype(DTYPES, e=e)
    require(slots <= 8, f"{slots} slots of state, more than 8")
    require(all(t.is_contiguous() for t in vars(tables).values()), "a table is not contiguous")
    require(all(t.is_contiguous() for t in (state[0], noise, mask, z0, n0)), "what a row reads is not contiguous")
    require(e.is_contiguous() or e.is_contiguous(memory_format=channels_last), "e is not dense")
    require(all(t.shape == state.shape[1:] for t in (noise, z0, n0)), "noise, z0 or n0 is not like a slot of the state")
    require(mask.shape == (batch, 1, height, width), "the mask is not (B, 1, H, W)")
    branches = tables.guidance.shape[1]
    require(e.shape == (branches * batch, channels, height, width), f"e is not {branches} branches of the state")
    require(channels * height * width < 1 << 31, "a sample has 2³¹ elements")
    block, pixels, stride = tuning.ROW_BLOCK, height * width, state.stride(0)
    unit = 16 if pixels % 16 == 0 and stride % 16 == 0 else 1  # the compiler sees what is aligned
    launch(
        _end_row,
        (triton.cdiv(channels * height * width, block), batch),
        state=state,
        e=e,
        noise=noise,
        mask=mask,
        z0=z0,
        n0=n0,
        row=row,
        **{name: table for name, table in vars(tables).items() if name != "in_scale"},
        pixels=pixels // unit,
        slot_stride=stride // unit,
        UNIT=unit,
        K=slots,
        C=channels,
        G=branches,
        CHANNELS_LAST=not e.is_contiguous(),
        BLOCK=block,
        BLOCK_STD=tuning.END_ROW_STD,
        warps=tuning.ROW_WARPS,
        stages=1,
    )
