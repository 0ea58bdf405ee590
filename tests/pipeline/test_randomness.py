"""Where a call's randomness comes from: its seeds or generators alone, and nothing of the process."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.runtime.engine import Engine, Job
from tests.pipeline import smallest
from tests.pipeline.pairs import generators
from tests.pipeline.smallest import NEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("smallest")
    smallest.make(at)
    return at


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder)


# ------------------------------------------------------------------------------------------------------- R20: seeds


class Begun(Exception):
    def __init__(self, job: Job) -> None:
        self.job = job


@pytest.fixture
def jobs(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """jobs(**call): what the call hands to its engine, before the first row."""

    def begin(self: Engine, job: Job) -> None:
        raise Begun(job)

    def get(**call: Any) -> Job:
        with pytest.raises(Begun) as begun:
            pipe(prompt_embeds=torch.zeros(1, 77, 24), guidance_scale=1.0, **call)
        return begun.value.job

    monkeypatch.setattr(Engine, "begin", begin)
    return get


def noises(job: Job) -> list[Tensor]:
    """The state that the run starts from, and what its rows draw."""
    drawn = (job.noise(row) for row in range(job.table.rows))
    return [job.x, *(t for t in drawn if t is not None)]


@pytest.mark.parametrize("task", ["text", "image", "inpaint", "inpaint from noise"])
def test_r20_image_k_of_n_has_the_noise_of_its_seed_alone(jobs: Callable[..., Job], task: str) -> None:
    """1,000 seeds, as a first one and as lists, each image's numbers bit for bit those of its seed in a call alone."""
    rng = random.Random(task)
    rest: dict[str, Any] = {"num_inference_steps": 2, "scheduler": "euler_a"} | smallest.pictures(task)
    checked = 0
    while checked < (1000 if task == "text" else 100):
        count = rng.randint(2, 8)
        first = rng.choice([rng.randrange(2**20), rng.randrange(2**63 - count)])
        seeds = (
            [rng.randrange(2**63) for _ in range(count)] if rng.random() < 0.5 else list(range(first, first + count))
        )
        given = first if seeds[0] == first else seeds
        together = noises(jobs(seed=given, num_images_per_prompt=count, **rest))
        for k, seed in enumerate(seeds):
            alone = noises(jobs(seed=seed, **rest))
            assert len(alone) == len(together) > 1
            assert all(torch.equal(a[0], t[k]) for a, t in zip(alone, together, strict=True))
        checked += count


def test_r20_a_seed_is_the_generator_of_that_seed(jobs: Callable[..., Job]) -> None:
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1):
        mine, theirs = (noises(jobs(**given)) for given in ({"seed": seed}, {"generator": generators(seed)}))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_r20_different_seeds_give_different_noise(jobs: Callable[..., Job]) -> None:
    seeds = [0, 1, 2, 2**16, 2**31, 2**32 - 2, 2**32 - 1]  # torch's generator on the CPU reads 32 bits
    starts = {tuple(jobs(seed=seed).x.flatten().tolist()) for seed in seeds}
    assert len(starts) == len(seeds)


# ------------------------------------------------------------------------------------------------- R21: global state


def global_state() -> dict[str, object]:
    mt = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (mt[1].tolist(), *mt[2:]),
        "random": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "warnings": list(warnings.filters),
        "log": (logging.root.level, logging.getLogger("fastldm").level, logging.getLogger("transformers").level),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }


@pytest.mark.parametrize("given", [{}, {"seed": 1}, {"generator": True}], ids=["none", "seed", "generator"])
@pytest.mark.parametrize("task", ["text", "image", "inpaint"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_sde"])
def test_r21_a_call_leaves_the_process_as_it_was(
    pipe: fastldm.Pipeline, given: dict[str, Any], task: str, scheduler: str
) -> None:
    pipe(**NEXT)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = global_state()
    given = {"generator": generators(1)} if "generator" in given else given
    pipe("a", num_inference_steps=3, eta=1.0, scheduler=scheduler, **given, **smallest.pictures(task))
    assert global_state() == before


def test_r21_loading_and_what_fails_leave_the_process_as_it_was(folder: Path, tmp_path: Path) -> None:
    def nothing(*_: Any) -> None:
        return None

    def use() -> None:
        pipe = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)
        fastldm.Pipeline.from_pretrained(str(folder))
        pipe.encode_prompt("a")
        with pytest.raises(fastldm.Error):
            fastldm.Pipeline(tmp_path)
        with pytest.raises(fastldm.Error):
            pipe("a", height=-1)
        with pytest.raises(fastldm.Error):
            pipe("a", num_inference_steps=2, callback_on_step_end=nothing)

    use()
    before = global_state()
    use()
    assert global_state() == before
