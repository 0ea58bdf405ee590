from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastldm.kernels import begin_row as kernel
from fastldm.kernels.launch import DTYPES, Unsupported
from fastldm.ops import RowTables
from tests.kernels.test_end_row import R, tables
from tests.numerics import assert_within_twice
from tests.ops.formulas import untouched, up

FAR = "offsets past 2³¹"  # of the rows of mods, in memory that is reserved and not used


@dataclass(frozen=True)
class Case:
    """size: B, C, H, W. extra: channels of the model's input behind those of the state. rows: of the modulation."""

    size: tuple[int, int, int, int] = (2, 4, 3, 5)
    branches: int = 2
    extra: int = 0
    rows: int = 1
    width: int = 7
    row: int = 2
    far: bool = False


CASES: dict[str, Case] = {
    "one number": Case((1, 1, 1, 1), branches=1, width=1, row=0),
    "text to image": Case(),
    "inpainting": Case(extra=5),
    "instruction, three branches, batch 3": Case((3, 4, 3, 5), branches=3, extra=4),
    "several programs": Case((2, 4, 17, 13), extra=1, width=1300),
    "a modulation for each sample, the last row": Case(rows=4, row=R - 1),
    FAR: Case(far=True, row=2),
}


def arguments(row: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowTables, Tensor, Tensor]:
    """-> state, mods, tables, model_input, modulation"""
    batch, channels, height, width = row.size
    model_input = torch.randn(row.branches * batch, channels + row.extra, height, width).to(dtype)
    model_input[:, :channels] = torch.nan
    mods = torch.randn(R, row.rows, row.width).to(dtype)
    if row.far:
        mods = torch.empty(2**32 + 64, dtype=dtype).as_strided((3, row.rows, row.width), (2**30, row.width, 1), 2**31)
        mods.copy_(torch.randn(mods.shape))
    modulation = torch.full((row.rows, row.width), torch.nan, dtype=dtype)
    t = tables(row.branches, row=row.row)
    return torch.randn(3, *row.size), mods, t, model_input.to(memory_format=torch.channels_last), modulation


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    row = CASES[case]
    state, mods, t, model_input, modulation = arguments(row, dtype)
    counter, channels = torch.tensor([row.row]), row.size[1]
    behind = model_input[:, channels:].clone()
    with untouched(state, mods, dataclasses.astuple(t), counter):
        module.begin_row(state, mods, t, counter, model_input=model_input, modulation=modulation)
    scale, x = t.in_scale[row.row], state[0].repeat(row.branches, 1, 1, 1)
    assert_within_twice(model_input[:, :channels], up(scale, torch.float32) * x, (scale * x).to(dtype))
    assert torch.equal(model_input[:, channels:], behind)
    assert torch.equal(modulation, mods[row.row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_begin_row(case: str, dtype: torch.dtype) -> None:
    if not (case == FAR and dtype == torch.float32):
        check(kernel, case, dtype)


def test_what_no_kernel_takes() -> None:
    state, mods, t, x, modulation = arguments(Case(), torch.float32)
    counter = torch.zeros(1, dtype=torch.int64)
    for given, reason in (
        ((state.double(), mods, counter, x, modulation), "state is float64, not float32"),
        ((state, mods.double(), counter, x, modulation), "mods is float64, not float16, bfloat16, float32"),
        ((state, mods, counter, x.half(), modulation), "model_input is float16 beside float32"),
        ((state, mods, counter.int(), x, modulation), "row is int32, not int64"),
        ((state, mods[:, :, :3], counter, x, modulation), "a row of mods is not like modulation"),
        ((state, mods, counter, x.contiguous(), modulation), "model_input is not channels_last"),
        ((state, mods, counter, x[:3], modulation), "model_input is not for this state"),
        ((state, mods, counter, x[:, :3].clone(memory_format=torch.channels_last), modulation), "fewer channels"),
        ((state.mT, mods, counter, x, modulation), "state or modulation is not contiguous"),
    ):
        with pytest.raises(Unsupported, match=reason):
            kernel.begin_row(given[0], given[1], t, given[2], model_input=given[3], modulation=given[4])
