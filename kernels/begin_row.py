"""What the model reads in a row of the sampler: the scaled state in every branch, and the row's modulation.

    model_input[g, n, :C] = in_scale[r] · state[0, n]      modulation = mods[r]      r = row[0], on the device

Layout: state is (K, B, C, H, W), each slot contiguous; model_input (G · B, C', H, W) is channels_last; a row of mods
and modulation are contiguous. Grid: for each sample first the programs for BLOCK numbers of x, in model_input's order,
which are written to all branches; then those for BLOCK numbers of the modulation, in which the samples take turns.
Bytes: read x, write `G` times as many numbers; read and write one row of mods.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, channels_last, float32, int64

from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, launch, require, require_dtype


@triton.jit(do_not_specialize=["pixels", "width", "mods_stride"])
def _begin_row(
    # tensors
    state,
    mods,
    in_scale,
    row,
    model_input,
    modulation,
    # sizes
    pixels,
    width,  # of a row of mods
    mods_stride,  # of a row, in elements
    # meta
    C: tl.constexpr,
    C_INPUT: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.load(row)
    block, n, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    of_state = tl.cdiv(pixels * C, BLOCK)
    if block < of_state:
        i = block * BLOCK + tl.arange(0, BLOCK)
        pixel, c = i // C, i % C
        inside = pixel < pixels
        x = tl.load(state + n * C * pixels + (c * pixels + pixel), mask=inside, other=0.0)
        x = (tl.load(in_scale + r) * x).to(model_input.dtype.element_ty)
        for g in tl.static_range(G):
            tl.store(model_input + (g * batch + n) * pixels * C_INPUT + (pixel * C_INPUT + c), x, mask=inside)
    else:
        i = ((block - of_state) * batch + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        tl.store(modulation + i, tl.load(mods + r * mods_stride + i, mask=i < width), mask=i < width)


def begin_row(
    state: Tensor, mods: Tensor, tables: Any, row: Tensor, *, model_input: Tensor, modulation: Tensor
) -> None:
    """tables: `fastldm.ops.RowTables`. state: float32; mods, modulation, model_input: float16, bfloat16 or float32;
    row: int64.

    Raises `Unsupported` for other dtypes, and for layouts but those above.
    """
    _, batch, channels, height, width = state.shape
    require_dtype((float32,), state=state, in_scale=tables.in_scale)
    require_dtype((int64,), row=row)
    require_dtype(DTYPES, mods=mods, modulation=modulation, model_input=model_input)
    require(state[0].is_contiguous() and modulation.is_contiguous(), "state or modulation is not contiguous")
    require(mods[0].is_contiguous() and mods.shape[1:] == modulation.shape, "a row of mods is not like modulation")
    require(model_input.is_contiguous(memory_format=channels_last), "model_input is not channels_last")
    branches, left = divmod(len(model_input), batch)
    require(left == 0 and model_input.shape[2:] == (height, width), "model_input is not for this state")
    require(model_input.shape[1] >= channels, "model_input has fewer channels than the state")
    block, pixels = tuning.ROW_BLOCK, height * width
    require(pixels * model_input.shape[1] < 1 << 31, "a sample of model_input has 2³¹ elements")
    launch(
        _begin_row,
        (triton.cdiv(pixels * channels, block) + triton.cdiv(modulation.numel(), block * batch), batch),
        state=state,
        mods=mods,
        in_scale=tables.in_scale,
        row=row,
        model_input=model_input,
        modulation=modulation,
        pixels=pixels,
        width=modulation.numel(),
        mods_stride=mods.stride(0),
        C=channels,
        C_INPUT=model_input.shape[1],
        G=branches,
        BLOCK=block,
        warps=tuning.ROW_WARPS,
        stages=1,
    )
