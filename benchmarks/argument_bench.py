"""Bad arguments, called: the loaded models of `faults.py`, and what becomes of each case of `argument_cases.py`."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastldm
from benchmarks.argument_cases import EULER, GOOD, SIDE, TASKS, Call
from benchmarks.outcomes import Ending, Row, ending, row
from tests.oracle import saved, stable_diffusion

USUAL = f"(1, {SIDE}, {SIDE}, 3), finite, "
Paint = Callable[..., Any]
"""A pipeline's call."""


def diffusers_paint(folder: Path, task: str) -> Paint:
    """Its class for the task. A seed and the name of a scheduler become what stands for them."""
    import diffusers

    names = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    kind = getattr(diffusers, dict(zip(TASKS, names, strict=True))[task])
    pipe = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def paint(*, scheduler: str | None = None, seed: Any = None, **rest: Any) -> Any:
        if seed is not None:
            rest["generator"] = torch.Generator().manual_seed(seed)
        if scheduler == EULER:
            pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        return pipe(**rest)

    return paint


def painted(change: Mapping[str, Any], task: str, paint: Paint) -> str:
    """The image's shape, whether it is finite, and its checksum."""
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", **GOOD[task], **change}
    if not {"seed", "generator"} & set(arguments):
        arguments["generator"] = torch.Generator().manual_seed(1)
    images = np.asarray(paint(**arguments).images)
    finite = "finite" if images.dtype != object and np.isfinite(images).all() else "not finite"
    return f"{images.shape}, {finite}, {hashlib.sha256(images.tobytes()).hexdigest()[:16]}"


class ArgumentBench:
    """A tiny model, in a folder of its own that leaving removes.

    diffusers' pipelines are made once, and each case has a fork of them; fastldm's may not be used in a fork, so each
    case makes its own. Both paint one image before the call that is timed.
    """

    def __init__(self, engines: Sequence[str]) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fastldm-"))
        self._diffusers: dict[str, Paint] = {}
        try:
            saved(stable_diffusion(levels=3), self._root / "tiny")
            for task in TASKS:
                if "diffusers" in engines:
                    self._diffusers[task] = diffusers_paint(self._root / "tiny", task)
                for engine in engines:  # here first, so that the processes to come have imported all that they need
                    self._warm(engine, task)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> ArgumentBench:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root)

    def run(self, case: Call, engine: str) -> Row:
        end = self._ending(engine, case.task, case.change)
        if end.result is None:
            return row(case, end, image="")
        return replace(row(case, end, image=self._image(engine, case, end.result)), said=end.result)

    def _ending(self, engine: str, task: str, change: Mapping[str, Any]) -> Ending:
        return ending(partial(painted, change, task), prepare=partial(self._warm, engine, task))

    def _warm(self, engine: str, task: str) -> Paint:
        """Used once: the time is that of a call in a program that runs."""
        paint = self._diffusers[task] if engine == "diffusers" else fastldm.Pipeline(self._root / "tiny")
        painted({}, task, paint)
        return paint

    def _image(self, engine: str, case: Call, result: str) -> str:
        """The right one."""
        if case.like is None:
            return result if result.startswith(USUAL) else ""
        end = self._ending(engine, case.task, case.like)
        if end.result is None:
            raise RuntimeError(f"{engine} cannot paint what is like {case.name}: {end}")
        return end.result
