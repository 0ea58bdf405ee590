"""What goes wrong while a call runs, tried on a loaded model: threads, cancelling, callbacks, forks, global state.

R01 to R22 number the faults; the tests of the same numbers (`test_r07_...`) show each of them for fastldm alone. A
trial is handed a `Subject` and returns a `Tally`; the outcome follows from it by a rule: silent where anything was
wrong, else clear or unclear where something was raised, else handled.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastldm
from benchmarks.outcomes import GOOD, OUTCOMES, Row, ending, row, says
from tests.oracle import saved
from tests.pipeline.smallest import reference

THREADS, REQUESTS = 8, 25  # of each thread
STEPS = 12  # of a call that is disturbed
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
SECONDS, FORK_SECONDS = 300.0, 20  # for hundreds of calls, and for one
Callback = Callable[[Any, int, Any, dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Tally:
    """What became of the calls. note: what else is to be told."""

    right: int = 0
    wrong: int = 0
    raised: list[str] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """An engine's pipeline. What the engines say differently is said here."""

    engine: str
    folder: Path
    pipe: Any

    @classmethod
    def made(cls, engine: str, folder: Path) -> Subject:
        if engine == "fastldm":
            return cls(engine, folder, fastldm.Pipeline(folder))
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        return cls(engine, folder, pipe)

    def sharing(self) -> Subject:
        """Another pipeline on the same networks, with a scheduler of its own."""
        pipe = type(self.pipe).from_pipe(self.pipe)
        if self.engine == "diffusers":
            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return Subject(self.engine, self.folder, pipe)

    def paint(self, prompt: str = "the red cat", *, seed: int = 1, **call: Any) -> NDArray[Any]:
        """sampler: by its name here; diffusers takes it from the pipeline, where it is assigned before the call."""
        if sampler := call.pop("sampler", None):
            call |= self._sampler(sampler)
        call = {"num_inference_steps": 2, "output_type": "np", **call}
        return np.asarray(self.pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images)

    def canceller(self) -> tuple[Callable[[], None], dict[str, Any]]:
        """What cancels a call, and the arguments that the call needs for it."""
        if self.engine == "fastldm":
            token = fastldm.CancelToken()
            return token.cancel, {"cancel": token}
        return partial(setattr, self.pipe, "_interrupt", True), {}

    def _sampler(self, name: str) -> dict[str, Any]:
        if self.engine == "fastldm":
            return {"scheduler": name}
        import diffusers

        kind = getattr(diffusers, SAMPLERS[name])
        self.pipe.scheduler = kind.from_config(self.pipe.scheduler.config)
        return {}


@dataclass(frozen=True)
class Trial:
    """right: "same", the image that the call gives alone; "refuse", an error; or "either"."""

    fault: str
    name: str
    right: str
    run: Callable[[Subject], Tally]
    called: tuple[str, ...] = ("",)
    says: tuple[str, ...] = ("",)


def tallied(attempt: Callable[[], NDArray[Any]], right: NDArray[Any] | None, note: str = "") -> Tally:
    """One call. right: None where any image is wrong."""
    try:
        found = attempt()
    except BaseException as error:
        return Tally(raised=[_told(error)], note=note)
    same = right is not None and np.array_equal(found, right)
    return Tally(right=int(same), wrong=int(not same), note=note)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:400]


# ------------------------------------------------------------------------------------------------------ R01: threads


def calls(**kinds: Sequence[Any]) -> list[dict[str, Any]]:
    """Of one thread's turn and more, in every combination of what differs that a fixed shuffle meets."""
    rng = random.Random(0)
    fixed = {"num_inference_steps": (3,), "guidance_scale": (7.5,), "prompt": ("the red cat",)}
    kinds = {**fixed, **kinds}
    return [{"seed": k, **{name: rng.choice(list(kind)) for name, kind in kinds.items()}} for k in range(24)]


def together(given: list[dict[str, Any]], subject: Subject, *, own: bool = False) -> Tally:
    """own: each thread has a pipeline of its own, on the same networks."""
    alone = [subject.paint(**call) for call in given]
    mine = threading.local()
    errors: list[str] = []

    def begin() -> None:
        mine.subject = subject.sharing() if own else subject

    def right(k: int) -> bool | None:
        try:
            return np.array_equal(mine.subject.paint(**given[k]), alone[k])
        except Exception as error:
            errors.append(_told(error))
            return None

    order = random.Random(1).choices(range(len(given)), k=THREADS * REQUESTS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        with ThreadPoolExecutor(THREADS, initializer=begin) as pool:
            found = list(pool.map(right, order))
    finally:
        sys.setswitchinterval(interval)
    note = f"of {len(order)}: {found.count(True)} right, {found.count(False)} wrong, {len(errors)} raised"
    return Tally(found.count(True), found.count(False), errors, note)


def loading(subject: Subject) -> Tally:
    """Layers that one thread makes while another loads a model: on the CPU and in float32, as always?"""
    done = threading.Event()

    def load() -> None:
        for _ in range(5):
            Subject.made(subject.engine, subject.folder)
        done.set()

    odd = made = 0
    with ThreadPoolExecutor(1) as pool:
        loads = pool.submit(load)
        while not (done.is_set() or loads.done()):
            weight = torch.nn.Linear(2, 2).weight
            made += 1
            odd += weight.is_meta or weight.dtype != torch.float32
        error = loads.exception()
    raised = [] if error is None else [_told(error)]
    return Tally(right=made - odd, wrong=odd, raised=raised, note=f"{odd} of {made} layers on meta")


# ------------------------------------------------------------------------------------------------ R07, R09: cancelling


def cancelled(subject: Subject, *, at: str) -> Tally:
    cancel, options = subject.canceller()
    rows: list[bool] = []
    known = threading.Event()

    def after_row(view: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows.append(known.is_set())
        if row == STEPS // 2 and at != "before":
            if at == "callback":
                options["cancel"].cancel() if options else setattr(view, "_interrupt", True)
            else:
                other = threading.Thread(target=cancel)
                other.start()
                other.join()
            known.set()
        return tensors

    if at == "before":
        cancel()
        known.set()
    paint = partial(subject.paint, num_inference_steps=STEPS, callback_on_step_end=after_row, **options)
    found = tallied(paint, None)
    return Tally(found.right, found.wrong, found.raised, f"{sum(rows)} steps after it")


def delays(subject: Subject, *, calls: int = 200) -> Tally:
    """The time from cancelling, at random moments, to the end of the call, beside that of a step."""
    took: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        subject.paint(num_inference_steps=STEPS)
        took.append(time.perf_counter() - start)
    step = min(took) / STEPS
    late: list[float] = []
    raised: list[str] = []
    rng, wrong = random.Random(0), 0
    while len(late) < calls:
        cancel, options = subject.canceller()
        moment: list[float] = []

        def later(cancel: Callable[[], None] = cancel, moment: list[float] = moment) -> None:
            moment.append(time.perf_counter())
            cancel()

        timer = threading.Timer(rng.uniform(step, 0.8 * min(took)), later)
        timer.start()
        try:
            subject.paint(num_inference_steps=STEPS, **options)
            wrong += bool(moment)
        except Exception as error:
            raised.append(_told(error))
        end = time.perf_counter()
        timer.cancel()
        timer.join()
        if moment and moment[0] < end:
            late.append(end - moment[0])
    p50, p99 = (1000 * float(np.percentile(late, p)) for p in (50, 99))
    return Tally(
        wrong=wrong, raised=raised, note=f"ended {p50:.0f} ms later (p99 {p99:.0f}); a step: {1000 * step:.0f} ms"
    )


def after_cancelling(subject: Subject) -> Tally:
    image = subject.paint(seed=2)
    right = 0
    for at in ("callback", "thread", "before"):
        cancelled(subject, at=at)
        right += np.array_equal(subject.paint(seed=2), image)
    return Tally(right, 3 - right, note=f"{right} of 3 next images right")


def one_of_two(subject: Subject) -> Tally:
    """Two calls at once, one of which is cancelled in its middle: does the other get its image?"""
    image = subject.paint(seed=2, num_inference_steps=STEPS)
    cancel, options = subject.canceller()
    barrier = threading.Barrier(2)

    def after_row(view: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if row == STEPS // 2 and barrier.wait(20) == 0:
            cancel()
        if row == STEPS // 2:
            barrier.wait(20)
        return tensors

    call: dict[str, Any] = {"num_inference_steps": STEPS, "callback_on_step_end": after_row}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(tallied, partial(subject.paint, seed=1, **call, **options), None)
        second = pool.submit(tallied, partial(subject.paint, seed=2, **call), image)
        first.result()
        return second.result()


# --------------------------------------------------------------------------------------------- R04 to R06: disturbances


def answering(answer: Callable[[dict[str, Tensor]], Any], subject: Subject) -> Tally:
    """A callback whose answer after the third step is wrong."""

    def after_row(view: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        return answer(tensors) if row == 2 else tensors

    return tallied(partial(subject.paint, num_inference_steps=STEPS, callback_on_step_end=after_row), None)


def raising(subject: Subject) -> Tally:
    """At each of the steps: does the very exception come through, and is the next image right?"""
    image, right = subject.paint(), 0
    for last in range(STEPS):
        reason = KeyError(last)

        def after_row(
            view: Any, row: int, timestep: Any, tensors: dict[str, Tensor], last: int = last, reason: KeyError = reason
        ) -> dict[str, Tensor]:
            if row == last:
                raise reason
            return tensors

        try:
            subject.paint(num_inference_steps=STEPS, callback_on_step_end=after_row)
        except KeyError as error:
            right += error is reason and np.array_equal(subject.paint(), image)
    return Tally(right, STEPS - right, note=f"{right} of {STEPS} right")


def again(subject: Subject) -> Tally:
    """A callback that paints another image with the same pipeline: are both right?"""
    outer, inner = subject.paint(num_inference_steps=STEPS), subject.paint("a", seed=2)
    found: list[Any] = []

    def after_row(view: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if row == 2:
            found.append(subject.paint("a", seed=2))
        return tensors

    tally = tallied(partial(subject.paint, num_inference_steps=STEPS, callback_on_step_end=after_row), outer)
    wrong = sum(not np.array_equal(image, inner) for image in found)
    return Tally(tally.right + len(found) - wrong, tally.wrong + wrong, tally.raised)


def interrupted(subject: Subject, *, times: int = 100) -> Tally:
    """Ctrl-C at random moments: is the next image right?"""
    start = time.perf_counter()
    image = subject.paint()
    longest, armed, right, rng = time.perf_counter() - start, False, 0, random.Random(0)

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(times):
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-3, longest))
            subject.paint()
            armed = False
        except KeyboardInterrupt:
            armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        right += np.array_equal(subject.paint(), image)
    return Tally(right, times - right, note=f"{right} of {times} next images right")


# ---------------------------------------------------------------------------------------------------------- R16: forks


def forked(subject: Subject, *, threads: int) -> Tally:
    """A fork of the process calls the pipeline, after torch has used so many threads."""
    torch.set_num_threads(threads)
    torch.randn(1 << 22).exp_()
    image = subject.paint()
    theirs, ours = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FORK_SECONDS + 5)  # or it would wait for ever
        tally = tallied(subject.paint, image)
        os.write(ours, json.dumps(vars(tally)).encode())
        os._exit(0)
    os.close(ours)
    with os.fdopen(theirs, "rb") as told:
        answer = told.read()
    os.waitpid(child, 0)
    return Tally(**json.loads(answer))


# ---------------------------------------------------------------------------------- R21, R22: what a call leaves behind


def global_state(subject: Subject) -> Tally:
    """Does a call without a generator leave torch's, NumPy's and Python's own as they were?"""

    def state() -> list[Any]:
        _, keys, *rest = np.random.get_state()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), np.asarray(keys).tolist(), rest, random.getstate()]

    before = state()
    subject.pipe("a", num_inference_steps=2, output_type="np", eta=1.0)
    changed = [n for n, a, b in zip(("torch's", "", "NumPy's", "Python's"), before, state(), strict=True) if a != b]
    return Tally(int(not changed), int(bool(changed)), note=f"{', '.join(filter(None, changed)) or 'none'} changed")


def kept(subject: Subject) -> Tally:
    """Of five exceptions out of a callback that are held, how many tensors are held with them?"""

    def after_row(view: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del timestep, tensors
        raise KeyError(row)

    def alive() -> set[int]:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {id(found) for found in gc.get_objects() if isinstance(found, Tensor)}

    subject.paint()
    before, errors = alive(), []
    for _ in range(5):
        try:
            subject.paint(callback_on_step_end=after_row)
        except KeyError as error:
            errors.append(error)
    more = len(alive() - before)
    return Tally(int(more == 0), int(more > 0), note=f"{more} tensors kept by {len(errors)} errors")


def _wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"].repeat(1, 1, 1, 2)}


def _nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * torch.nan}


_CALLBACK = ("callback",)
_STOPPED = ("cancel", "interrupt", "stop")
_PROMPTS = ("", "a", "the red cat", "cat " * 90, "dog, " * 12)
_ALL: dict[str, Sequence[Any]] = {
    "num_inference_steps": (2, 3, 4, 5),
    "guidance_scale": (1.0, 7.5),
    "height": (8, 16),
    "width": (8, 24),
    "prompt": _PROMPTS,
}

RUNNING = (
    Trial(
        "R01", "8 threads: the same steps, prompts and seeds differ", "same", partial(together, calls(prompt=_PROMPTS))
    ),
    Trial("R01", "8 threads: 2 to 5 steps", "same", partial(together, calls(num_inference_steps=(2, 3, 4, 5)))),
    Trial("R01", "8 threads: 8 to 24 pixels", "same", partial(together, calls(height=(8, 16), width=(8, 24)))),
    Trial("R01", "8 threads: four samplers", "same", partial(together, calls(sampler=tuple(SAMPLERS)))),
    Trial("R01", "8 threads: all of that", "same", partial(together, calls(sampler=tuple(SAMPLERS), **_ALL))),
    Trial(
        "R01",
        "8 threads: 2 to 5 steps, each thread with a pipeline and a scheduler on the same networks",
        "same",
        partial(together, calls(num_inference_steps=(2, 3, 4, 5)), own=True),
    ),
    Trial("R02", "8 threads: with and without guidance", "same", partial(together, calls(guidance_scale=(1.0, 7.5)))),
    Trial("R03", "a model is loaded while another thread makes layers", "same", loading),
    Trial("R04", "the callback paints with the same pipeline", "same", again),
    Trial("R05", "the callback raises, at each of 12 steps", "same", raising),
    Trial("R05", "the callback returns None", "refuse", partial(answering, lambda t: None), _CALLBACK, ("none",)),
    Trial("R05", "the callback returns a list", "refuse", partial(answering, list), _CALLBACK, ("list", "['latents']")),
    Trial("R05", "the callback returns wider latents", "refuse", partial(answering, _wider), _CALLBACK, ("shape",)),
    Trial("R05", "the callback returns NaN", "refuse", partial(answering, _nan), _CALLBACK, ("nan", "finite")),
    Trial(
        "R05",
        "the callback returns latent, not latents",
        "refuse",
        partial(answering, lambda t: {"latent": t["latents"]}),
        _CALLBACK,
        ("'latent'",),
    ),
    Trial("R06", "Ctrl-C at 100 random moments", "same", interrupted),
    Trial("R07", "cancelled by another thread", "refuse", partial(cancelled, at="thread"), _STOPPED),
    Trial("R07", "cancelled by the callback", "refuse", partial(cancelled, at="callback"), _STOPPED),
    Trial("R07", "cancelled before the call", "refuse", partial(cancelled, at="before"), _STOPPED),
    Trial("R07", "cancelled at 200 random moments", "refuse", delays, _STOPPED),
    Trial("R09", "the next images after cancelled calls", "same", after_cancelling),
    Trial("R09", "one of two calls is cancelled: the other's image", "same", one_of_two),
    Trial(
        "R16", "used in a fork, after torch ran 4 threads", "refuse", partial(forked, threads=4), ("fork", "process")
    ),
    Trial("R16", "used in a fork, after torch ran one", "either", partial(forked, threads=1), ("fork", "process")),
    Trial("R21", "without a generator: the global generators", "same", global_state),
    Trial("R22", "five exceptions are held", "same", kept),
)


# ------------------------------------------------------------------------------------------------------------ the bench


class RunningBench:
    """A tiny model, in a folder of its own that leaving removes. Each trial has a process of its own."""

    def __init__(self, engines: Sequence[str]) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fastldm-"))
        try:
            saved(reference(), self._root / "tiny")
            for engine in engines:  # here first, so that the processes to come have imported all that they need
                self._warm(engine)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RunningBench:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root)

    def run(self, trial: Trial, engine: str) -> Row:
        end = ending(
            lambda subject: json.dumps(vars(trial.run(subject))),
            prepare=partial(self._warm, engine),
            seconds=FORK_SECONDS if trial.fault == "R16" else SECONDS,
        )
        if end.result is None:
            found = row(trial, end, image="")
            return replace(found, outcome="unclear") if found.outcome == "clear" and trial.right == "same" else found
        return judged(trial, Tally(**json.loads(end.result)), end.seconds)

    def _warm(self, engine: str) -> Subject:
        subject = Subject.made(engine, self._root / "tiny")
        subject.paint()
        return subject


@dataclass(frozen=True)
class Judged(Row):
    note: str = ""


def judged(trial: Trial, tally: Tally, seconds: float) -> Judged:
    said = "; ".join(sorted(set(tally.raised))[:3])
    if tally.wrong:
        outcome = "silent"
    elif not tally.raised:
        outcome = "handled"
    else:
        clear = trial.right != "same" and all(says(trial, message) for message in tally.raised)
        outcome = "clear" if clear else "unclear"
    return Judged(outcome, seconds, said, note=tally.note)


def summary(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    lines = [f"| of {len(rows)} trials | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    for kind in OUTCOMES:
        counts = (sum(r[engine]["outcome"] == kind for r in rows) for engine in engines)
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    lines = [f"| fault | what is tried | right | {' | '.join(engines)} |", "|---|---|---|" + "---|" * len(engines)]
    for r in rows:
        lines.append(f"| {r['fault']} | {r['name']} | {r['right']} | {' | '.join(_cell(r[e]) for e in engines)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    word, note = found["outcome"], found.get("note")
    return f"{word if word in GOOD else f'**{word}**'}{f': {note}' if note else ''}"
