"""What both stages of the training share: averaged weights, a state that survives a stop, a log in JSON lines."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Model = TypeVar("Model", bound=nn.Module)
LOG_SECONDS, SAVE_SECONDS = 30.0, 180.0


class Ema(Generic[Model]):
    """Exponentially averaged weights, in `model`, whose average is short while there are few steps."""

    def __init__(self, model: Model, source: nn.Module, decay: float) -> None:
        self.model, self.source, self.decay = model, source, decay
        model.requires_grad_(False).eval()
        model.load_state_dict(source.state_dict())

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        values: list[Tensor] = list(self.source.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)


def learning_rate(step: int, steps: int, *, peak: float, warmup: int, floor: float = 0.05) -> float:
    """Linear warm-up, then a cosine down to `floor` times the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def write_whole(path: Path, state: Mapping[str, Any]) -> None:
    """The file is there as a whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


class Log:
    """Prints, and appends to a file of JSON lines. The first line of a run holds its command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self(command=shlex.join(["python", *sys.argv]), torch=torch.__version__, threads=torch.get_num_threads())

    def __call__(self, **values: object) -> None:
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values})
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Stop:
    """Is true once the process was asked to end, by SIGINT or SIGTERM, while it is entered."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.asked

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def run(
    step: Callable[[int], Mapping[str, float]],
    *,
    first: int,
    last: int,
    batch: int,
    seconds: float,
    log: Log,
    save: Callable[[int, float], Mapping[str, object]],
) -> bool:
    """Does the steps from `first` to `last`, and says whether it came to the end.

    step: its number, from 0 -> losses, which are averaged between two lines of the log. save: (steps done, seconds of
    training so far, `seconds` of earlier runs among them) -> what to log; called every few minutes and at the end.
    """
    began = logged = saved = time.monotonic()
    losses: dict[str, list[float]] = {}
    count, done = 0, first
    with Stop() as stop:
        while done < last and not stop:
            for name, value in step(done).items():
                losses.setdefault(name, []).append(value)
            done, count, now = done + 1, count + 1, time.monotonic()
            if now - logged >= LOG_SECONDS or done == last or stop:
                means = {name: round(sum(values) / len(values), 5) for name, values in losses.items()}
                log(step=done, **means, samples_per_s=round(batch * count / (now - logged), 2))
                losses, count, logged = {}, 0, now
            if now - saved >= SAVE_SECONDS or done == last or stop:
                log(step=done, seconds=round(seconds + now - began), **save(done, seconds + now - began))
                saved = time.monotonic()
                logged += saved - now
    return done == last
