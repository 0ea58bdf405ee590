"""Changes of a network's weights in place: what was captured goes on with the new values, nothing is built again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from fastldm.errors import WeightsError, brief
from fastldm.model.layers import derive
from fastldm.ops import compute_dtype
from fastldm.weights.keymap import Address, addresses, fits


class Merged:
    """A network and what its tensors were before the first change; tensors go by the hub's names.

    turn: a context in which a tensor is changed, or all are brought back. A call between two changes sees the first
    alone: whoever makes several keeps calls away until they are made.
    """

    def __init__(
        self, network: nn.Module, turn: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ) -> None:
        self._network, self._turn = network, turn
        # On the host, of what was touched; the network's own, as several engines may share it.
        self._base: dict[str, Tensor] = vars(network).setdefault("merged_base", {})

    @cached_property
    def _addresses(self) -> dict[str, Address]:
        return addresses(self._network)

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(self._base)

    @torch.no_grad()
    def merge(self, name: str, delta: Tensor) -> None:
        """Adds `delta`, of the tensor's shape, to what is there: in float32, rounded once.

        Raises `WeightsError`, with nothing changed, for an unknown name, another shape, or a sum that is not finite.
        """
        address = self._address(name)
        rows = self._rows(address)
        if not fits(delta.shape, rows):
            shapes = f"{tuple(delta.shape)}, the tensor {tuple(rows.shape)}"
            raise WeightsError(f"{name}: the change has shape {shapes}", field=name)
        wide = compute_dtype(rows.dtype)
        with self._turn():
            changed = (rows.to(wide) + delta.to(rows.device, wide).view(rows.shape)).to(rows.dtype)
            if not bool(torch.isfinite(changed).all()):
                raise WeightsError(f"{name}: changed, it is not finite in {rows.dtype}", field=name)
            if name not in self._base:
                self._base[name] = rows.detach().cpu().clone(memory_format=torch.preserve_format)
            rows.copy_(changed)
            self.refresh(address.parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings back every bit of what was there before the first change."""
        with self._turn():
            for name, base in self._base.items():
                address = self._address(name)
                self._rows(address).copy_(base)
                self.refresh(address.parameter)
            self._base.clear()

    def refresh(self, parameter: str) -> None:
        """Computes anew, in place, what the network derives from a parameter."""
        derive(self._network, parameter)

    def _rows(self, address: Address) -> Tensor:
        return self._network.get_parameter(address.parameter)[address.start : address.stop]

    def _address(self, name: str) -> Address:
        if name not in self._addresses:
            raise WeightsError(f"{brief(name)}: {type(self._network).__name__} has no such tensor", field=name)
        return self._addresses[name]
