"""Graphs without a GPU: what is captured runs eagerly, and must be what a graph could replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastldm.runtime.graph import Buffers, Function

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")  # the host must know


class NotReplayable(AssertionError):
    """A graph of this would do something else, or could not be captured."""


class Recorded:
    """Stands in for `CudaGraphs`. captures: how many there were."""

    captures = True

    def __init__(self) -> None:
        self.count = 0

    def capture(self, function: Function, buffers: Buffers) -> Function:
        self.count += 1
        held = buffers()  # alive, so that no address is used twice
        places = _places(held)
        with Watch() as first:
            function()

        def replay() -> None:
            now = _places(buffers())
            moved = [name for name in held if now[name] != places[name]]
            if moved:
                raise NotReplayable(f"moved since the capture: {', '.join(moved)}")
            with Watch() as again:
                function()
            for i, (before, after) in enumerate(zip(first.calls, again.calls, strict=False)):
                if before != after:
                    raise NotReplayable(f"op {i} was {before}, is {after}")
            if len(first.calls) != len(again.calls):
                raise NotReplayable(f"there were {len(first.calls)} ops, there are {len(again.calls)}")

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield


def _places(buffers: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (_storage(t), t.storage_offset(), t.stride()) for name, t in buffers.items()}


class Watch(TorchDispatchMode):
    """Lists what is computed: each op with its numbers, shapes, and where what it did not make itself lies."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._made: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.__name__.partition(".")[0]
        if name in READS:
            raise NotReplayable(f"{name} reads back what the device computed")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        indices = args[1] if name in ("index", "index_put_") else ()
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices):
            raise NotReplayable(f"{name} by a mask has a size that the host must know")
        self.calls.append((str(op), *tree_leaves(tree_map(self._seen, (args, kwargs)))))
        result = op(*args, **kwargs)
        devices = {t.device.type for t in (*given, *tree_leaves(result)) if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise NotReplayable(f"{name} copies between {' and '.join(sorted(devices))}")
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and not any(_storage(t) == _storage(other) for other in given):
                self._made[_storage(t)] = t.untyped_storage()
        return result

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        place = "" if _storage(value) in self._made else f"at {_storage(value)} + {value.storage_offset()}"
        return f"{tuple(value.shape)} {value.dtype} {value.stride()} {place}"


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
