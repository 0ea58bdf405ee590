"""What is kept from one call for the next: plans and captured stages, the least recently used going first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch


class Kept(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Kept)


class Pool:
    """Idle things by key. Whoever leases one has it alone; a second of the same key is made where none is idle.

    Idle ones hold at most `limit` bytes together; those in use are their users' and do not count.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._idle: list[tuple[Hashable, Kept]] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Of what is idle."""
        with self._lock:
            return sum(thing.nbytes for _, thing in self._idle)

    def __len__(self) -> int:
        return len(self._idle)

    @contextmanager
    def lease(self, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """An idle thing of this key, or a new one; after the context it is idle again, whatever happened."""
        idle = self._taken(key)
        thing = self._made(make) if idle is None else idle
        try:
            yield thing  # type: ignore[misc]  # one key, one type
        finally:
            with self._lock:
                dropped = [(key, thing)]
                if self.limit and thing.nbytes <= self.limit:
                    self._idle += dropped
                    dropped = self._beyond()
            del dropped  # outside the lock: what goes may take a while

    def clear(self) -> None:
        """Lets all that is idle go."""
        with self._lock:
            dropped, self._idle = self._idle, []
        del dropped

    def _taken(self, key: Hashable) -> Kept | None:
        with self._lock:
            for i in reversed(range(len(self._idle))):
                if self._idle[i][0] == key:
                    return self._idle.pop(i)[1]
        return None

    @torch.inference_mode(False)  # what is kept outlives the mode that it is made in
    @torch.no_grad()
    def _made(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except torch.OutOfMemoryError:
            self.clear()
        return make()  # not in the handler, where the first attempt's frames are alive

    def _beyond(self) -> list[tuple[Hashable, Kept]]:
        dropped, total = [], sum(thing.nbytes for _, thing in self._idle)
        while total > self.limit:
            oldest = self._idle.pop(0)
            total -= oldest[1].nbytes
            dropped.append(oldest)
        return dropped
