"""Kernels compiled ahead, for a chip that is not here; each in a process of its own, as Triton must not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fastldm
from fastldm import cli, warmup
from fastldm.errors import ArgumentError
from fastldm.runtime.pool import Pool
from fastldm.runtime.warmup import Warmed, asked_chip
from tests.pipeline.pairs import Pair, make
from tests.runtime.recorded import Recorded


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("tiny"))


def warmed(folder: Path, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastldm", "warmup", str(folder), *words]
    return subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, timeout=600
    )


def test_what_was_compiled_is_kept_for_other_processes(pair: Pair, tmp_path: Path) -> None:
    words = ("--target", "sm_90", "--size", "16x16", "--jobs", "2", "--json")
    first, second = (warmed(pair.folder, tmp_path, *words) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    once, again = json.loads(first.stdout), json.loads(second.stdout)
    assert once["kernels"] == once["compiled"] == again["kernels"] > 10
    assert again["compiled"] == 0
    assert len({file.parent for file in tmp_path.rglob("*.cubin")}) == once["compiled"]


@pytest.mark.parametrize("target", [None, "h200", "sm_75", "sm_9", "sm_90a", 90, b"sm_90", "sm_٩٠"])
def test_chips_that_are_none(target: Any) -> None:
    with pytest.raises(ArgumentError, match="must be a chip such as sm_90") as caught:
        asked_chip(target)
    assert caught.value.field == "target"


def test_a_chip_by_name() -> None:
    assert [asked_chip(f"sm_{n}") for n in (80, 90, 100, 120)] == [80, 90, 100, 120]


def test_without_a_gpu_the_command_asks_for_a_chip(pair: Pair, tmp_path: Path) -> None:
    done = warmed(pair.folder, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no NVIDIA GPU here" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"sizes": [(24, 15)]}, "width"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"jobs": 0}, "jobs"),
        ({"target": "gpu"}, "target"),
    ],
)
def test_wrong_arguments_are_named(pair: Pair, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(fastldm.Error) as caught:
        pair.fast.warmup(**{"target": "sm_90", **arguments})
    assert caught.value.field == field


def test_sizes_are_width_by_height_on_the_command_line(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noted(networks: Any, calls: Any, **options: Any) -> Warmed:
        asked.extend(calls)
        return Warmed(0, 0, 0.0)

    monkeypatch.setattr(warmup, "warm_up", noted)
    words = ["warmup", str(pair.folder), "--size", "16x24", "--target", "sm_90"]
    assert CliRunner().invoke(cli.main, words).exit_code == 0
    factor = pair.fast._engine.vae.config.factor
    assert {(shape.height * factor, shape.width * factor) for shape, _ in asked} == {(24, 16)}
    assert [branches for _, branches in asked] == [2, 1]


def test_what_is_prepared_is_not_captured_again(pair: Pair) -> None:
    engine, recorded = fastldm.Pipeline(pair.folder)._engine, Recorded()
    for name, value in {"graphs": recorded, "pool": Pool(64 << 20)}.items():
        object.__setattr__(engine, name, value)
    from fastldm.runtime.plan import Shape

    shape = Shape(1, 12, 8, 77)
    engine.prepare(shape, 2)
    engine.prepare(shape, 2)
    assert recorded.count == 3, "a prompt, a row, and the decoder"
    engine.prepare(shape, 1)
    assert recorded.count == 4
    engine.prepare(shape, 1, decoded=2)
    assert recorded.count == 5
