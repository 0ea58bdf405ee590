"""What the compiler makes of the kernels, for chips that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_shapes import REAL
from tests.kernels.offline import Compiled, faults
from tests.kernels.sizes import FIRST

ROOT = Path(__file__).resolve().parent.parent.parent


GROUPS = (  # each a process of its own, which takes seconds to begin
    ("conv2d",),
    ("attention", "geglu", "timestep_embedding"),
    ("linear", "group_norm", "layer_norm", "begin_row", "end_row"),
)


def made(module: str, *words: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + "".join(
        x for x in done.stdout.splitlines() if '"faults": ["' in x
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("ops", GROUPS, ids="+".join)
def test_every_real_shape_on_sm_90(ops: tuple[str, ...]) -> None:
    rows = made("tests.kernels.offline", "90", "--dtype", "float16", *(word for op in ops for word in ("--op", op)))
    shapes = {(op, f"{shape.model}: {shape.what}") for op in ops for shape in REAL[op]}
    assert {(row["op"], row["shape"]) for row in rows} == shapes
    assert not [row for row in rows if row["faults"]]


def test_every_op_is_in_a_group() -> None:
    assert sorted(op for ops in GROUPS for op in ops) == sorted(REAL)


@pytest.mark.parametrize(("targets", "dtype"), [((80, 89, 100), "float16"), ((90,), "bfloat16")], ids=str)
def test_one_shape_of_each_op_elsewhere(targets: tuple[int, ...], dtype: str) -> None:
    rows = made("tests.kernels.offline", *map(str, targets), "--first", "--dtype", dtype)
    assert {(row["target"], row["op"]) for row in rows} == {(target, op) for target in targets for op in REAL}
    assert not [row for row in rows if row["faults"]]


def test_faults_are_seen() -> None:
    sound = Compiled(
        "linear", "", "_linear", 90, "float16", 128, spilled=0, shared=1024, wgmma=4, serialised=False, programs=1
    )
    assert faults(sound) == []
    for change, said in (
        ({"spilled": 8}, "spilled"),
        ({"shared": 228 << 10}, "shared memory"),
        ({"serialised": True}, "wait"),
        ({"wgmma": 0}, "wgmma"),
    ):
        (fault,) = faults(replace(sound, **change))
        assert said in fault


def test_thirty_sizes_compile_nothing_new() -> None:
    """Behind 512², 768², 1024², 256² and one that is not square: those take every tile there is for these models."""
    rows = made("tests.kernels.sizes")
    assert len(rows) - len(FIRST) >= 30
    assert len({tuple(row["size"]) for row in rows}) == len(rows)
    assert rows[0]["launches"] > 300
    for row in rows[len(FIRST) :]:
        assert row["new"] == [], row["size"]
