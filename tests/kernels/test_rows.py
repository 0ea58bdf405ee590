"""Whole rows on the kernels, under the interpreter: begin_row, a small U-Net, end_row, for each kind of call.

As near to the truth as plain PyTorch, both by hand, so that a plan's mistakes are seen, too. On a GPU, where there is
time for the tiny model and its whole run: `tests/runtime/test_gpu.py`.
"""

from __future__ import annotations

import pytest
import torch

from fastldm.kernels.launch import Unsupported
from fastldm.ops import reference
from tests.runtime.rows import CASES, SMALLEST, by_plan, held, kernels_alone

ROWS = 2  # the second reads what the first left: the state, its history, the row counter


@pytest.mark.parametrize("name", CASES)
def test_two_rows(name: str) -> None:
    case = CASES[name]
    plain, exact = (case.network(dtype, **SMALLEST) for dtype in (torch.float16, torch.float32))
    with kernels_alone():
        out = by_plan(case, plain, ROWS)
    held(out, case, exact, plain, ROWS)


def test_nothing_falls_back() -> None:
    """What no kernel takes is an error, and calls of the reference in `kernels_alone` are seen."""
    case = CASES["text to image"]
    with kernels_alone(), pytest.raises(Unsupported, match="float64"):
        by_plan(case, case.network(torch.float64, **SMALLEST), 1)
    with kernels_alone(), pytest.raises(AssertionError, match="by the reference"):
        reference.linear(torch.ones(1, 1), torch.ones(1, 1))
