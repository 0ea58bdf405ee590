"""Ctrl-C and SIGTERM for a command: nothing half done stays, and what is said is one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(BaseException):
    """Raised where the program is when the signal comes, so that files without an end are taken away."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Both signals unwind the block and end the program: with exit code 130 or 143."""
    try:
        with _handled(_unwind):
            yield
    except Stopped as stopped:
        print(_line(stopped.number), end="", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)


def importing() -> AbstractContextManager[None]:
    """For imports of large modules, which turn an exception in their midst into anything: ends the program at once.

    What is printed before has to be flushed, and no file may be open.
    """
    return _handled(_end)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Leaves alone what whoever started us has switched off, and threads, which get no signals."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: old for each in WORDS if (old := signal.getsignal(each)) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)


def _unwind(number: int, _: FrameType | None) -> None:
    for each in WORDS:  # a second one must not disturb what the first has begun
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _line(number).encode())
    os._exit(128 + number)


def _line(number: int) -> str:
    return f"fastldm: {WORDS[signal.Signals(number)]}\n"
