"""Small programs as people write them for diffusers: with the import changed, they make the same files."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.single import models

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
IMPORT = re.compile(r"^from diffusers import (?P<names>Stable\w+(?:, Stable\w+)*)$", re.MULTILINE)
TOLERANCE = 1e-4
ALONE = ("text_to_image",)  # run in a process of their own, as a user runs them


@dataclass(frozen=True)
class Made:
    """What a program left behind."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the programs find their models: a folder in both precisions of its name, a single file, one that edits."""
    made = models.sample(models.KINDS["sd1"], tmp_path_factory.mktemp("model"))
    made.ref.save_pretrained(made.folder, variant="fp16")
    instruct = models.randomised(models.pipeline(models.KINDS["instruct"]))
    folder = oracle.saved(instruct, tmp_path_factory.mktemp("instruct"))
    return {"MODEL": str(made.folder), "CHECKPOINT": str(made.file), "INSTRUCT_MODEL": str(folder)}


def changed(program: Path) -> str:
    """The program with its pipelines imported from fastldm."""
    source = program.read_text()
    (found,) = IMPORT.finditer(source)
    names = ", ".join(f"Pipeline as {name}" for name in found["names"].split(", "))
    return source[: found.start()] + f"from fastldm import {names}" + source[found.end() :]


def ran(program: Path, folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Made:
    """Runs a program in an empty folder."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(program), run_name="__main__")
    return Made(folder, out.getvalue())


def ran_alone(program: Path, folder: Path, environment: dict[str, str]) -> Made:
    folder.mkdir()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program)], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Made(folder, done.stdout)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_program_with_one_changed_line(
    program: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / program.name
    ours.write_text(changed(program))
    assert_one_line_differs(program.read_text(), ours.read_text())
    theirs = ran(program, tmp_path / "theirs", environment, monkeypatch)
    if program.stem in ALONE:
        mine = ran_alone(ours, tmp_path / "mine", environment)
    else:
        mine = ran(ours, tmp_path / "mine", environment, monkeypatch)
    assert mine.printed == theirs.printed
    names = sorted(file.name for file in theirs.folder.iterdir())
    assert names == sorted(file.name for file in mine.folder.iterdir())
    assert any(file.is_file() for file in theirs.folder.iterdir())
    for name in names:
        assert_same(mine.folder / name, theirs.folder / name)


def assert_one_line_differs(before: str, after: str) -> None:
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    assert sum(line.startswith("- ") for line in lines) == sum(line.startswith("+ ") for line in lines) == 1
    assert "diffusers" not in next(line for line in lines if line.startswith("+ "))


def assert_same(mine: Path, theirs: Path) -> None:
    if theirs.suffix == ".png":
        assert_same_picture(mine, theirs)
    elif theirs.is_file():
        a, b = numbers(mine), numbers(theirs)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), theirs.name
        assert oracle.relative_error(a, b) <= TOLERANCE, theirs.name


def assert_same_picture(mine: Path, theirs: Path) -> None:
    """But for last bits: what lies between two of the 256 levels may be rounded the other way."""
    with PIL.Image.open(mine) as a, PIL.Image.open(theirs) as b:
        assert (a.size, a.mode) == (b.size, b.mode), theirs.name
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
        assert len(np.unique(np.asarray(b))) > 20, f"{theirs.name} shows nothing"
    assert difference.max() <= 1, theirs.name
    assert (difference > 0).mean() < 0.01, theirs.name


def numbers(file: Path) -> Tensor:
    if file.suffix == ".npy":
        return torch.from_numpy(np.load(file))
    found: Tensor = torch.load(file, weights_only=True)
    return found


def test_there_are_programs_enough() -> None:
    assert len(PROGRAMS) >= 10
    assert set(ALONE) <= {program.stem for program in PROGRAMS}
