"""Rows as CUDA graphs, behind an interface that a CPU and the tests have their own versions of.

A captured function must do the same work on the same memory each time: nothing is read back, no buffer moves.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger("fastldm")

Function = Callable[[], None]
Buffers = Callable[[], Mapping[str, Tensor]]
WARM_UPS = 2  # calls before a capture: kernels are compiled and loaded, libraries make their handles


class Graphs(Protocol):
    """Who captures for an engine. captures: False if nothing ever is."""

    @property
    def captures(self) -> bool: ...
    def capture(self, function: Function, buffers: Buffers) -> Function | None:
        """-> what does the same as `function`; None where that is `function` itself.

        It is called here, too: what it changes, changes.
        buffers: the static tensors by name, whatever `function` reads and writes that outlives it.
        Raises `torch.OutOfMemoryError`.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """What is captured is called in such a context."""
        ...


class Eager:
    """Nothing is captured, and calls of several threads may run side by side: each has its own buffers."""

    captures = False

    def capture(self, function: Function, buffers: Buffers) -> None:
        return None

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield


_capturing = threading.Lock()  # torch takes one capture at a time


class CudaGraphs:
    """Graphs of one device, which share a pool of memory; it is given back when the last of them goes.

    What a graph leaves there, the next may overwrite. So they take turns, and results are copied out of it.
    """

    captures = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._queue = Queue()
        self._last = torch.cuda.current_stream(device)

    def capture(self, function: Function, buffers: Buffers) -> Function:
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.device(self.device):
            # On the caller's stream. What cuBLAS keeps for the other must come from the pool of the graphs: what it had
            # from elsewhere, PyTorch frees when one of them goes (pytorch/pytorch#175276), under the others.
            for _ in range(WARM_UPS):
                function()
            # Our own context of the stream: torch's leaves it current where a capture cannot begin or end.
            # thread_local: what other threads compute on the device is none of this capture's business.
            with (
                torch.cuda.stream(self._side),
                torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local"),
            ):
                function()
        replay: Function = graph.replay
        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._queue.turn(), torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if current != self._last:  # a caller's own
                current.wait_stream(self._last)
                self._last = current
            yield


def captured(graphs: Graphs, function: Function, buffers: Buffers, what: str) -> Function | None:
    """As `graphs.capture`; None, and a warning that names `what`, also where there is no memory for a graph."""
    try:
        return graphs.capture(function, buffers)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        log.warning("there is no memory to capture a graph for %s: it runs without", what)
    return None


def lacks_memory(error: RuntimeError) -> bool:
    """Also as CUDA, cuBLAS and Triton say it, which have no class for it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "alloc_failed" in said


class Queue:
    """First come, first served."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        mine = threading.Lock()
        mine.acquire()
        try:
            with self._mutex:
                self._waiting.append(mine)
                if self._waiting[0] is mine:
                    mine.release()
            mine.acquire()
            yield
        finally:  # also where the wait was interrupted
            with self._mutex:
                if mine in self._waiting:
                    first = self._waiting[0] is mine
                    self._waiting.remove(mine)
                    if first and self._waiting:
                        self._waiting[0].release()


class Stage:
    """A function of tensors of fixed shapes, captured: inputs are copied in, results out."""

    def __init__(self, graphs: Graphs, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        held = self._inputs = tuple(torch.empty_like(t).copy_(t) for t in inputs)
        outputs = self._outputs = tuple(torch.empty_like(t) for t in function(*held))

        def run() -> None:
            for target, result in zip(outputs, function(*held), strict=True):
                target.copy_(result)

        def buffers() -> Mapping[str, Tensor]:
            return {f"tensor {i}": t for i, t in enumerate((*held, *outputs))}

        self._run = captured(graphs, run, buffers, f"inputs of {[tuple(t.shape) for t in inputs]}") or run

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._inputs, *self._outputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for target, t in zip(self._inputs, inputs, strict=True):
            target.copy_(t)
        self._run()
        return tuple(t.clone() for t in self._outputs)
