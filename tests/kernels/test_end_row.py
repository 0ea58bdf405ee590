from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm.kernels import end_row as kernel
from fastldm.kernels.launch import DTYPES, Unsupported
from fastldm.ops import RowTables
from tests.numerics import assert_within_twice
from tests.ops.formulas import untouched

R = 5
FAR = "offsets past 2³¹"  # of the state's slots, in memory that is reserved and not used


@dataclass(frozen=True)
class Case:
    """size: B, C, H, W. mean: of the model's output."""

    size: tuple[int, int, int, int] = (2, 4, 3, 5)
    slots: int = 3
    branches: int = 2
    rescale: float = 0.0
    limit: float = torch.inf
    row: int = 2
    channels_last: bool = True
    mean: float = 0.0
    constant: bool = False
    far: bool = False


CASES: dict[str, Case] = {
    "one number": Case((1, 1, 1, 1), slots=1, branches=1, row=0),
    "one branch is never rescaled": Case(branches=1, rescale=0.7),
    "two branches": Case(),
    "three branches, batch 3, the last row": Case((3, 4, 5, 3), branches=3, row=R - 1),
    "six slots, as many as a plan has": Case(slots=6),
    "several programs for each sample": Case((2, 4, 17, 13), slots=2),
    "rescaled": Case(rescale=0.7),
    "rescaled, several programs": Case((2, 4, 17, 13), rescale=1.0),
    "rescaled, more than is summed at a time": Case((1, 4, 33, 34), rescale=0.7, slots=1),
    "rescaled, a mean of 1000": Case((2, 4, 9, 9), rescale=1.0, mean=1000.0),
    "rescaled in no row, a constant output": Case(constant=True),
    "a clamped x0": Case(limit=0.3),
    "an output in the state's order": Case(channels_last=False),
    FAR: Case((1, 4, 3, 5), far=True),
}


def tables(
    branches: int, *, slots: int = 3, rescale: float = 0.0, limit: float = torch.inf, row: int | None = None
) -> RowTables:
    """Random ones; where `row` is given, all others are NaN."""
    shapes: dict[str, tuple[int, ...]] = {"a": (R, slots, slots), "guidance": (R, branches)}
    shapes |= dict.fromkeys(("b", "c", "d"), (R, slots))
    made = {f.name: torch.randn(shapes.get(f.name, (R,))) for f in dataclasses.fields(RowTables)}
    made |= {"rescale": torch.full((R,), rescale), "limit": torch.full((R,), limit)}
    if row is not None:
        for table in made.values():
            table[torch.arange(R) != row] = torch.nan
    return RowTables(**made)


def formula(state: Tensor, e: Tensor, t: Any, r: int, *, noise: Tensor, mask: Tensor, z0: Tensor, n0: Tensor) -> Tensor:
    """The contract's docstring, line by line."""
    branches = e.chunk(t.guidance.shape[1])
    g = sum(t.guidance[r, i] * branch for i, branch in enumerate(branches))
    phi = t.rescale[r]
    if len(branches) > 1 and phi != 0:
        for n in range(len(g)):
            last, guided = branches[-1][n], g[n].clone()
            ratio = ((last - last.mean()).square().sum() / (guided - guided.mean()).square().sum()).sqrt()
            g[n] = phi * guided * ratio + (1 - phi) * guided
    x0 = (t.p[r] * state[0] + t.q[r] * g).clamp(-t.limit[r], t.limit[r])
    new = []
    for i in range(len(state)):
        value = t.b[r, i] * g + t.c[r, i] * noise + t.d[r, i] * x0
        for j in range(len(state)):
            value = value + t.a[r, i, j] * state[j]
        new.append(value)
    new[0] = mask * new[0] + (1 - mask) * (t.u[r] * z0 + t.v[r] * n0)
    return torch.stack(new)


def arguments(row: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowTables, dict[str, Tensor]]:
    batch, _, height, width = row.size
    state = torch.randn(row.slots, *row.size)
    if row.far:
        memory = torch.empty(2**32 + 64).as_strided(state.shape, (2**30, *state.stride()[1:]), 2**31)
        state = memory.copy_(state)
    e = (torch.randn(row.branches * batch, *row.size[1:]) + row.mean).to(dtype)
    e = torch.full_like(e, 0.5) if row.constant else e
    e = e.to(memory_format=torch.channels_last if row.channels_last else torch.contiguous_format)
    mask = (torch.rand(batch, 1, height, width) > 0.5).float()
    mask[0, 0, 0] = 0.25  # a soft edge
    others = {"noise": torch.randn(row.size), "mask": mask, "z0": torch.randn(row.size), "n0": torch.randn(row.size)}
    t = tables(row.branches, slots=row.slots, rescale=row.rescale, limit=row.limit, row=row.row)
    return state, e, t, others


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    row = CASES[case]
    state, e, t, others = arguments(row, dtype)
    before, counter = state.clone(), torch.tensor([row.row])
    with untouched(e, dataclasses.astuple(t), others):
        module.end_row(state, e, t, counter, **others)
    assert counter.tolist() == [row.row + 1]
    wide = RowTables(**{name: table.double() for name, table in vars(t).items()})
    truth = formula(before.double(), e.double(), wide, row.row, **{k: v.double() for k, v in others.items()})
    assert_within_twice(state, truth, formula(before, e.float(), t, row.row, **others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_end_row(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


def test_the_counter_goes_through_all_rows() -> None:
    row = CASES["several programs for each sample"]
    state, e, _, others = arguments(row, torch.float32)
    t, counter, expected = tables(2, slots=2), torch.zeros(1, dtype=torch.int64), state.double()
    wide = RowTables(**{name: table.double() for name, table in vars(t).items()})
    for r in range(R):
        expected = formula(expected, e.double(), wide, r, **{k: v.double() for k, v in others.items()})
        kernel.end_row(state, e, t, counter, **others)
        assert counter.item() == r + 1
    torch.testing.assert_close(state.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_takes() -> None:
    state, e, t, others = arguments(Case(), torch.float32)
    counter = torch.zeros(1, dtype=torch.int64)
    nine = arguments(Case(slots=9), torch.float32)
    for given, reason in (
        ((state.double(), e, t, counter, others), "state is float64, not float32"),
        ((state, e.double(), t, counter, others), "e is float64, not float16, bfloat16, float32"),
        ((state, e, t, counter.int(), others), "row is int32, not int64"),
        ((nine[0], e, nine[2], counter, others), "9 slots of state, more than 8"),
        ((state, e[:, :, ::2], t, counter, others), "e is not dense"),
        ((state, e[:2], t, counter, others), "e is not 2 branches of the state"),
        ((state, e, dataclasses.replace(t, u=torch.ones(2 * R)[::2]), counter, others), "a table is not contiguous"),
        ((state, e, t, counter, others | {"mask": others["noise"]}), "the mask is not"),
        ((state, e, t, counter, others | {"z0": others["z0"][:1]}), "noise, z0 or n0 is not like a slot"),
        (
            (state, e, t, counter, others | {"n0": others["n0"].mT.contiguous().mT}),
            "what a row reads is not contiguous",
        ),
    ):
        with pytest.raises(Unsupported, match=reason):
            kernel.end_row(*given[:-1], **given[-1])
