"""Attempts that may fail, each in a process of its own, and the rule that gives each outcome its class."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

SECONDS, MEMORY = 20.0, 2 << 30
POLL = 0.01
OUTCOMES = ("handled", "clear", "unclear", "silent", "hang", "crash")
GOOD = ("handled", "clear")
LONGEST = 20_000  # characters of a message that are read
PREPARING = 60.0  # seconds


class AnyCase(Protocol):
    """fault: its number. right: what an engine should do.

    called, says: an error is clear if its message has one word of each, in any case of letters: what is wrong, and why.
    """

    @property
    def fault(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def right(self) -> str: ...
    @property
    def called(self) -> tuple[str, ...]: ...
    @property
    def says(self) -> tuple[str, ...]: ...


# ------------------------------------------------------------------------------------------------------------ a process


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. result: what it returned. message: of its error; traceback: all that a traceback shows."""

    seconds: float
    result: str | None = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    stopped: str | None = None
    died: str | None = None


def ending(
    attempt: Callable[..., str],
    *,
    prepare: Callable[[], object] | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Ending:
    """Runs the attempt in a process of its own, which has the modules of this one, and watches it.

    prepare: makes there what the attempt is handed; neither its time nor its memory counts.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking: this process runs no threads of torch
        process = context.Process(target=_child, args=(attempt, prepare, theirs, seconds), daemon=True)
        process.start()
    theirs.close()
    start = time.perf_counter()
    try:
        if not ours.poll(PREPARING):
            raise RuntimeError(f"preparing takes more than {PREPARING:g} s")
        if problem := ours.recv():
            raise RuntimeError(f"what is good cannot be prepared: {problem}")
        before, start = _resident(process.pid), time.perf_counter()
        while not ours.poll(POLL):
            if time.perf_counter() - start > seconds:
                return Ending(seconds, stopped=f"no end in {seconds:g} s")
            if _resident(process.pid) - before > memory:
                return Ending(time.perf_counter() - start, stopped=f"more than {memory / 2**30:g} GiB of memory")
        return Ending(**ours.recv())
    except EOFError:
        process.join()
        return Ending(time.perf_counter() - start, died=_death(process.exitcode))
    finally:
        process.kill()
        process.join()
        ours.close()


def _child(attempt: Callable[..., str], prepare: Callable[[], object] | None, pipe: Connection, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it, too, and ends this process
    signal.alarm(int(PREPARING + seconds) + 10)  # where the parent itself is gone
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    try:
        made = () if prepare is None else (prepare(),)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}"[:LONGEST])
        return
    pipe.send("")
    start = time.perf_counter()
    try:
        answer: dict[str, Any] = {"result": attempt(*made)}
    except BaseException as error:
        answer = {
            "error": type(error).__name__,
            "message": "\n".join(str(e)[:LONGEST] for e in _chain(error, contexts=False)),
            "traceback": "\n".join(str(e)[:LONGEST] for e in _chain(error, contexts=True)),
        }
    pipe.send({"seconds": time.perf_counter() - start, **answer})


def _chain(error: BaseException, *, contexts: bool) -> Iterator[BaseException]:
    """The error, what it was raised from, and with `contexts` what was being handled when it was raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        shown = contexts and not found.__suppress_context__
        found = found.__cause__ or (found.__context__ if shown else None)


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _death(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


# ---------------------------------------------------------------------------------------------------------- the outcome


@dataclass(frozen=True)
class Row:
    """One case of one engine. in_traceback: an unclear error whose traceback has the words of a clear one."""

    outcome: str
    seconds: float
    said: str
    in_traceback: bool = False


def row(case: AnyCase, end: Ending, *, image: str, ran: bool = False, at: str = "") -> Row:
    """image: the undamaged model's. ran: whether code of the file was run. at: where the files are, left out."""
    if end.died is not None:
        return Row("crash", end.seconds, end.died)
    if ran:
        return Row("silent", end.seconds, "code of the file was run")
    if end.stopped is not None:
        return Row("hang", end.seconds, end.stopped)
    if end.error is None:
        same = end.result == image
        handled = same and case.right != "refuse"
        return Row("handled" if handled else "silent", end.seconds, f"{'the same' if same else 'another'} image")
    message, traceback = (text.replace(f"{at}/", "") for text in (end.message, end.traceback))
    said = f"{end.error}: {message}"
    if says(case, message):
        return Row("clear", end.seconds, said[:400])
    return Row("unclear", end.seconds, said[:400], in_traceback=says(case, traceback))


def says(case: AnyCase, message: str) -> bool:
    """Whether a message says what is damaged and why."""
    text = message.lower()
    return all(any(word.lower() in text for word in words) for words in (case.called, case.says))
