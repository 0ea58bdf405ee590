"""One shape's static buffers, and the one loop of the project: begin_row, the model, end_row.

Everything a row reads or writes has a fixed place: the state, the row counter, the sampler's table, the modulation of
every row, the context, the noise slot. So a row is the same sequence of operations on the same memory, whatever the
sampler, the number of steps, the guidance or the prompt, and is captured once for each number of guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastldm import ops
from fastldm.model.layers import Context
from fastldm.model.unet import UNet
from fastldm.runtime.graph import Eager, Graphs, captured
from fastldm.sampling import SamplerTable

ROWS = 128  # rows that the device's tables hold; longer runs refill them
SLOTS = 6  # stacked latents of the state: x and five others


@dataclass(frozen=True)
class Shape:
    """What a plan is made for. height, width: of the latents. length: tokens of the context.

    shared: whether all samples have the same modulation.
    """

    batch: int
    height: int
    width: int
    length: int
    shared: bool = True


@dataclass(frozen=True)
class Guidance:
    """The weight of each branch's output in every row, (R, G), the fully conditioned branch last; rescale, (R,).

    on: (R,), False where a row evaluates the last branch alone, which is then its result; None: nowhere.
    """

    weights: NDArray[np.float64]
    rescale: NDArray[np.float64]
    on: NDArray[np.bool_] | None = None

    def branches(self, row: int) -> int:
        """How many the row evaluates."""
        return self.weights.shape[1] if self.on is None or self.on[row] else 1

    def of(self, branches: int) -> Guidance:
        """What the rows that evaluate so many see."""
        if branches == self.weights.shape[1]:
            return self
        return Guidance(np.ones((len(self.weights), 1)), np.zeros(len(self.weights)))


@dataclass(frozen=True)
class Inpainting:
    """The blend after every row, z0 being kept where the mask is 0. mask: (B, 1, H, W); z0, n0: (B, C, H, W)."""

    mask: Tensor
    z0: Tensor
    n0: Tensor


class Plan:
    """Buffers of one `Shape` for one U-Net. Not for two threads at once."""

    def __init__(self, unet: UNet, shape: Shape, graphs: Graphs | None = None) -> None:
        self.unet, self.shape, self.graphs = unet, shape, graphs or Eager()
        latents = (shape.batch, unet.config.out_channels, shape.height, shape.width)
        self.state = self.zeros(SLOTS, *latents)
        self.row = self.zeros(1, dtype=torch.int64)
        per_slot = {name: self.zeros(ROWS, SLOTS) for name in "bcd"}
        per_row = {name: self.zeros(ROWS) for name in ("in_scale", "p", "q", "limit", "u", "v")}
        self.tables = {"a": self.zeros(ROWS, SLOTS, SLOTS), **per_slot, **per_row}  # the sampler's
        self.noise, self.z0, self.n0 = self.zeros(*latents), self.zeros(*latents), self.zeros(*latents)
        self.mask = self.zeros(shape.batch, 1, *latents[2:])
        self.rows: dict[int, Row] = {}  # by the number of branches

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: the state's where None."""
        weight = self.unet.conv_in.weight
        return torch.zeros(shape, dtype=dtype or ops.compute_dtype(weight.dtype), device=weight.device)

    @torch.inference_mode(False)  # buffers outlive the mode that they are made in
    @torch.no_grad()
    def of(self, branches: int) -> Row:
        """The row that evaluates so many branches; made, and captured, the first time."""
        if branches not in self.rows:
            row = Row(self, branches)
            before = self.state.clone(), self.row.clone()
            self.row.zero_()  # a capture runs a few rows, and it may stand at the tables' end
            row.capture(self)
            self.state.copy_(before[0])
            self.row.copy_(before[1])
            self.rows[branches] = row
        return self.rows[branches]

    def replay(self, branches: int) -> None:
        """One row. `of(branches)` was called before."""
        self.rows[branches].replay(self)

    @property
    def nbytes(self) -> int:
        own = {id(t): t.nbytes for t in (self.state, self.noise, self.z0, self.n0, self.mask, *self.tables.values())}
        rows = {id(t): t.nbytes for row in self.rows.values() for t in row.buffers(self).values()}
        return sum((own | rows).values())

    def start(
        self,
        x: Tensor,
        *,
        states: Tensor,
        extra_channels: Tensor | None = None,
        inpainting: Inpainting | None = None,
        alone: bool = False,
    ) -> None:
        """Fills what holds for a whole run.

        x: (B, C, H, W), the state before the first row. states: (G·B, L, context_dim), the prompt.
        extra_channels: (G·B, in_channels − C, H, W) behind the latents (inpainting models), or None.
        alone: there are rows that evaluate the last branch alone.
        """
        batch = self.shape.batch
        context = self.unet.context_projections(states)
        for count in {len(states) // batch, *((1,) if alone else ())}:
            last = slice(-count * batch, None)
            self.of(count).condition(context[last], None if extra_channels is None else extra_channels[last])
        self.state.zero_()
        self.state[0] = x
        self.noise.zero_()
        one, zero = self.mask.new_ones(()), self.mask.new_zeros(())
        blend = Inpainting(mask=one, z0=zero, n0=zero) if inpainting is None else inpainting
        self.mask.copy_(blend.mask)
        self.z0.copy_(blend.z0)
        self.n0.copy_(blend.n0)

    def run(
        self,
        table: SamplerTable,
        guidance: Guidance,
        modulation: Tensor,
        noise: Callable[[int], Tensor | None],
        *,
        begin: int = 0,
    ) -> Iterator[int]:
        """Replays every row from `begin` on; yields its index after each, with the latents in `state[0]`.

        modulation: (R, M, Σ). noise: gives row r's, (B, C, H, W), or None where it draws none; called in their order.
        """
        for r in range(begin, table.rows):
            drawn = noise(r)
            with self.graphs.turn():
                if (r - begin) % ROWS == 0:
                    self.fill(slice(r, r + ROWS), table, guidance, modulation)
                if drawn is not None:
                    self.noise.copy_(drawn)
                self.replay(guidance.branches(r))
            yield r

    def fill(self, rows: slice, table: SamplerTable, guidance: Guidance, modulation: Tensor) -> None:
        """Brings one window of rows to the device's tables and sets the row counter to its beginning."""
        for name, target in self.tables.items():
            if hasattr(table, name):
                _set_corner(target, getattr(table, name)[rows])
        for count in {guidance.branches(r) for r in range(table.rows)[rows]}:
            self.rows[count].fill(rows, guidance.of(count), modulation)
        self.row.zero_()


class Row:
    """A row with some number of guidance branches: what it reads besides the plan's buffers, and how it is run."""

    def __init__(self, plan: Plan, branches: int) -> None:
        unet, shape = plan.unet, plan.shape
        dtype, samples = unet.conv_in.weight.dtype, branches * shape.batch
        self._captured: Callable[[], None] | None = None
        self.tables = ops.RowTables(**plan.tables, guidance=plan.zeros(ROWS, branches), rescale=plan.zeros(ROWS))
        self.mods = plan.zeros(ROWS, 1 if shape.shared else samples, len(unet.time_projections.weight), dtype=dtype)
        self.modulation = plan.zeros(*self.mods.shape[1:], dtype=dtype)
        self.model_input = plan.zeros(samples, unet.config.in_channels, shape.height, shape.width, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        self._context = plan.zeros(samples, shape.length, len(unet.context_projections.weight), dtype=dtype)
        self.context: Context = unet.split_context(self._context)

    def replay(self, plan: Plan) -> None:
        if self._captured is None:
            self.compute(plan)
        else:
            self._captured()

    def compute(self, plan: Plan) -> None:
        """begin_row, the model, end_row."""
        ops.begin_row(
            plan.state, self.mods, self.tables, plan.row, model_input=self.model_input, modulation=self.modulation
        )
        e = plan.unet(self.model_input, self.modulation, self.context)
        ops.end_row(plan.state, e, self.tables, plan.row, noise=plan.noise, mask=plan.mask, z0=plan.z0, n0=plan.n0)

    def capture(self, plan: Plan) -> None:
        """From now on replays are what was captured here, if anything."""
        self._captured = captured(plan.graphs, lambda: self.compute(plan), lambda: self.buffers(plan), str(plan.shape))

    def buffers(self, plan: Plan) -> Mapping[str, Tensor]:
        """Every static tensor, by name."""
        own = ("mods", "modulation", "model_input", "_context")
        shared = ("state", "row", "noise", "z0", "n0", "mask")
        tables = {f"tables.{f.name}": getattr(self.tables, f.name) for f in fields(self.tables)}
        return {n: getattr(self, n) for n in own} | {n: getattr(plan, n) for n in shared} | tables

    def condition(self, context: Tensor, extra_channels: Tensor | None) -> None:
        """context: (G·B, L, Σ), every layer's keys and values. extra_channels: as in `Plan.start`."""
        if extra_channels is not None:
            self.model_input[:, -extra_channels.shape[1] :] = extra_channels
        self._context.copy_(context)

    def fill(self, rows: slice, guidance: Guidance, modulation: Tensor) -> None:
        """One window of rows of guidance and modulation."""
        _set_corner(self.tables.guidance, guidance.weights[rows])
        _set_corner(self.tables.rescale, guidance.rescale[rows])
        window = modulation[rows, -self.mods.shape[1] :]
        self.mods[: len(window)] = window


def _set_corner(target: Tensor, values: NDArray[np.float64]) -> None:
    target.zero_()
    corner = tuple(slice(0, n) for n in values.shape)
    target[corner] = torch.from_numpy(np.ascontiguousarray(values)).to(target)
