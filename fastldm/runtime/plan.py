"""One shape's static buffers, and the one loop of the project: begin_row, the model, end_row.

Everything a row reads or writes has a fixed place: the state, the row counter, the sampler's table, the modulation of
every row, the context, the noise slot. So a row is the same sequence of operations on the same memory, whatever the
sampler, the number of steps, the guidance or the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastldm import ops
from fastldm.model.layers import Context
from fastldm.model.unet import UNet
from fastldm.sampling import SamplerTable

ROWS = 128  # rows that the device's tables hold; longer runs refill them
SLOTS = 6  # stacked latents of the state: x and five others


@dataclass(frozen=True)
class Shape:
    """What a plan is made for. height, width: of the latents. length: tokens of the context."""

    batch: int
    branches: int
    height: int
    width: int
    length: int


@dataclass(frozen=True)
class Guidance:
    """The weight of each branch's output in every row, (R, G), the fully conditioned branch last; rescale, (R,)."""

    weights: NDArray[np.float64]
    rescale: NDArray[np.float64]


@dataclass(frozen=True)
class Inpainting:
    """The blend after every row, z0 being kept where the mask is 0. mask: (B, 1, H, W); z0, n0: (B, C, H, W)."""

    mask: Tensor
    z0: Tensor
    n0: Tensor


class Plan:
    """Buffers of one `Shape` for one U-Net. Not for two threads at once."""

    def __init__(self, unet: UNet, shape: Shape, *, modulations: int = 1) -> None:
        """modulations: M, 1 where all samples share the modulation, else G·B."""
        weight = unet.conv_in.weight
        state_dtype = ops.compute_dtype(weight.dtype)
        self.unet, self.shape = unet, shape
        rows = shape.branches * shape.batch
        size = (shape.height, shape.width)
        latents = (shape.batch, unet.config.out_channels, *size)

        def zeros(*shape: int, dtype: torch.dtype = state_dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        self.state = zeros(SLOTS, *latents)
        self.row = zeros(1, dtype=torch.int64)
        self.tables = ops.RowTables(
            in_scale=zeros(ROWS),
            a=zeros(ROWS, SLOTS, SLOTS),
            b=zeros(ROWS, SLOTS),
            c=zeros(ROWS, SLOTS),
            d=zeros(ROWS, SLOTS),
            p=zeros(ROWS),
            q=zeros(ROWS),
            limit=zeros(ROWS),
            u=zeros(ROWS),
            v=zeros(ROWS),
            guidance=zeros(ROWS, shape.branches),
            rescale=zeros(ROWS),
        )
        width = len(unet.time_projections.weight)
        self.mods = zeros(ROWS, modulations, width, dtype=weight.dtype)
        self.modulation = zeros(*self.mods.shape[1:], dtype=weight.dtype)
        self.model_input = zeros(rows, unet.config.in_channels, *size, dtype=weight.dtype).to(
            memory_format=torch.channels_last
        )
        packed = zeros(rows, shape.length, len(unet.context_projections.weight), dtype=weight.dtype)
        self.context: Context = unet.split_context(packed)
        self._packed_context = packed
        self.noise, self.z0, self.n0 = zeros(*latents), zeros(*latents), zeros(*latents)
        self.mask = zeros(shape.batch, 1, *size)

    def replay(self) -> None:
        """One row."""
        ops.begin_row(
            self.state,
            self.mods,
            self.tables,
            self.row,
            model_input=self.model_input,
            modulation=self.modulation,
        )
        e = self.unet(self.model_input, self.modulation, self.context)
        ops.end_row(self.state, e, self.tables, self.row, noise=self.noise, mask=self.mask, z0=self.z0, n0=self.n0)

    def start(
        self,
        x: Tensor,
        *,
        states: Tensor,
        extra_channels: Tensor | None = None,
        inpainting: Inpainting | None = None,
    ) -> None:
        """Fills what holds for a whole run.

        x: (B, C, H, W), the state before the first row. states: (G·B, L, context_dim), the prompt.
        extra_channels: (G·B, in_channels − C, H, W) behind the latents (inpainting models), or None.
        """
        self.state.zero_()
        self.state[0] = x
        self.noise.zero_()
        one, zero = self.mask.new_ones(()), self.mask.new_zeros(())
        blend = Inpainting(mask=one, z0=zero, n0=zero) if inpainting is None else inpainting
        self.mask.copy_(blend.mask)
        self.z0.copy_(blend.z0)
        self.n0.copy_(blend.n0)
        if extra_channels is not None:
            self.model_input[:, self.state.shape[2] :] = extra_channels
        self._packed_context.copy_(self.unet.context_projections(states))

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
            if (r - begin) % ROWS == 0:
                self.fill(slice(r, r + ROWS), table, guidance, modulation)
            if (drawn := noise(r)) is not None:
                self.noise.copy_(drawn)
            self.replay()
            yield r

    def fill(self, rows: slice, table: SamplerTable, guidance: Guidance, modulation: Tensor) -> None:
        """Brings one window of rows to the device's tables and sets the row counter to its beginning."""
        host = {f.name: getattr(table, f.name)[rows] for f in fields(self.tables) if hasattr(table, f.name)}
        host |= {"guidance": guidance.weights[rows], "rescale": guidance.rescale[rows]}
        for name, values in host.items():
            target: Tensor = getattr(self.tables, name)
            target.zero_()
            target[_corner(values.shape)] = torch.from_numpy(np.ascontiguousarray(values)).to(target)
        window = modulation[rows]
        self.mods[: len(window)] = window
        self.row.zero_()


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)
