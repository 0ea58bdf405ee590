"""What the compiler makes of the kernels, for chips that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.real_shapes import REAL
from fastldm.kernels import tuning
from tests.kernels.offline import Compiled, covering, faults, forms
from tests.kernels.sizes import FIRST

ROOT = Path(__file__).resolve().parent.parent.parent


GROUPS = (  # each a process of its own, which takes seconds to begin
    ("conv2d",),
    ("attention", "geglu", "timestep_embedding"),
    ("linear", "group_norm", "layer_norm", "begin_row", "end_row", "to_uint8"),
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


def test_every_kernel_elsewhere() -> None:
    """The other dtypes, and the other shapes: `make compile-all`."""
    targets, dtype = (80, 89, 100), "float16"
    rows = made("tests.kernels.offline", *map(str, targets), "--first", "--dtype", dtype)
    found = {(row["target"], row["op"], row["kernel"]) for row in rows}
    assert found == {(target, op, name) for target in targets for op in REAL for name in kernels(op, target, dtype)}
    assert not [row for row in rows if row["faults"]]


TMA = ("geglu", "linear", "conv2d")


def test_every_form_by_tma() -> None:
    """Also where `tuning.py` prefers pointers: a GPU will tell which is faster."""
    words = ("--first", "--tma", "--dtype", "float16", *(word for op in TMA for word in ("--op", op)))
    rows = made("tests.kernels.offline", "90", *words)
    assert {row["op"] for row in rows} == set(TMA)
    assert not [row for row in rows if row["faults"]]


def kernels(op: str, target: int, dtype: str) -> set[str]:
    """The names of all that its real shapes launch."""
    with patch.object(tuning, "capability", lambda: target):
        found = set().union(*(forms(op, shape, getattr(torch, dtype)) for shape in REAL[op]))
    return {str(form[0]) for form in found}


FORMS = {
    "attention": {
        *(("_attention", key, n) for key, n in (("PARTS", 1), ("PARTS", 2), ("D2", 0), ("D2", 2))),
        *(("_short", key, n) for key, n in (("D2", 0), ("D2", 2), ("mask", False), ("mask", True))),
    },
    "group_norm": {(name, "TWO", two) for name in ("_whole", "_moments", "_merge", "_apply") for two in (False, True)},
    "linear": {("_linear", "SIDE", 0), ("_linear", "SIDE", 2), ("_sum_of_parts",)},
    "conv2d": {
        ("_conv2d", "PHASES", 1),
        ("_conv2d", "PHASES", 2),
        ("_conv2d", "sums", True),
        ("_finish",),
        ("_merge",),
    },
}


@pytest.mark.parametrize("op", FORMS)
def test_few_shapes_take_every_form(op: str) -> None:
    each = [forms(op, shape, torch.float16) for shape in REAL[op]]
    chosen = covering(each)
    assert set().union(*(each[i] for i in chosen)) == set().union(*each) >= FORMS[op]
    assert len(chosen) < len(each) / 3


def test_covering_takes_those_with_most_first() -> None:
    a, b, c, d = ((name,) for name in "abcd")
    assert covering([{a}, {a, b}, {c}, {a, b, d}, set()]) == [2, 3]
    assert covering([]) == []


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
    assert faults(replace(sound, wgmma=0, dtype="float32")) == []


@pytest.mark.parametrize("words", [(), ("--tma",)], ids=["as chosen", "by TMA"])
def test_thirty_sizes_compile_nothing_new(words: tuple[str, ...]) -> None:
    """Behind 512², 768², 1024², 256² and two that are not square: those take every tile there is for these models."""
    rows = made("tests.kernels.sizes", *words)
    assert len(rows) - len(FIRST) >= 30
    assert len({tuple(row["size"]) for row in rows}) == len(rows)
    assert rows[0]["launches"] > 300
    for row in rows[len(FIRST) :]:
        assert row["new"] == [], row["size"]
