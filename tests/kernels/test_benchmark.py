"""`benchmarks/kernels.py` as far as it goes without a GPU: its rows, with PyTorch on the CPU in place of all arms."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.real_shapes import REAL, Shape
from fastldm.kernels.launch import recording
from fastldm.ops import reference

ROOT = Path(__file__).resolve().parent.parent.parent


def row(op: str, shape: str, arm: str, us: float) -> dict[str, Any]:
    return {"op": op, "model": "SD", "shape": shape, "arm": arm, "us": us, "of_peak": 0.5}


FOUND = [
    {"device": "a GPU", "versions": {"torch": "2"}, "commit": "abc"},
    {"peak": {"tflops": 700.0, "gbps": 4000.0}, "dtype": "float16"},
    row("linear", "small", "kernel", 10.0),
    row("linear", "small", "reference", 20.0),
    row("linear", "small", "compiled", 15.0),
    {"op": "linear", "model": "SD", "shape": "small", "arm": "third", "failed": "no"},
    row("linear", "large", "kernel", 40.0),
    row("linear", "large", "reference", 20.0),
    row("conv2d", "alone", "kernel", 1.0),
]


def test_tables_hold_the_kernel_against_the_fastest_of_the_others() -> None:
    assert kernels.summary(FOUND).splitlines()[2:] == ["| linear | 2 | 1 | 0.87 | 0.50 | 1.50 |"]
    assert kernels.table(FOUND).splitlines()[2:] == [
        "| linear | SD | small | 10.0 µs | 50% | 15.0 µs, compiled | 1.50 |",
        "| linear | SD | large | 40.0 µs | 50% | 20.0 µs, reference | 0.50 |",
        "| conv2d | SD | alone | 1.0 µs | 50% | |  |",
    ]


def test_page_is_written_between_its_marks() -> None:
    begin, end = kernels.MARKS
    text = kernels.page(f"before {begin} old {end} after", FOUND)
    assert text.startswith(f"before {begin}")
    assert text.endswith(f"{end} after")
    assert "old" not in text
    assert "a GPU; torch 2; commit abc. peak: 700 TFLOP/s, 4000 GB/s." in text
    with pytest.raises(ValueError, match="kernels"):
        kernels.page("no marks", FOUND)


def test_the_projects_page_has_the_marks() -> None:
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in kernels.MARKS)


@pytest.fixture
def on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(arm: Any, sets: Any) -> list[float]:
        for arguments, options in sets:
            arm(*arguments, **options)
        return [3.0, 1.0, 2.0]

    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "PRODUCT", 8)
    monkeypatch.setattr(kernels, "COPIED", 64)
    monkeypatch.setattr(kernels, "MOST_SETS", 2)
    monkeypatch.setattr(kernels, "timed", timed)
    monkeypatch.setattr(kernels, "arms", lambda op, compiled: {"kernel": getattr(reference, op), "broken": broken})
    monkeypatch.setattr(kernels, "REAL", {op: shapes[-1:] for op, shapes in REAL.items()})


def broken(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("not for this shape\nand more")


@pytest.mark.parametrize("op", ["layer_norm", "begin_row", "end_row", "timestep_embedding", "to_uint8"])
def test_rows_of_an_op(on_this_cpu: None, op: str, tmp_path: Path) -> None:
    found = kernels.rows([op], torch.float32, time.monotonic() + 60)
    peak, kernel, failed = kernels.saved(found, tmp_path / "new" / "rows.jsonl")
    assert set(peak["peak"]) == {"tflops", "gbps"}
    assert (kernel["us"], kernel["arm"]) == (2.0, "kernel")
    assert kernel["of_peak"] > 0
    assert kernel.get("error", 0) < 1e-5
    assert failed["failed"] == "RuntimeError: not for this shape"
    head, *lines = (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    assert "commit" in json.loads(head)
    assert [json.loads(line) for line in lines] == [peak, kernel, failed]


def test_ops_take_turns_and_an_error_of_the_device_ends_it(on_this_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "REAL", {op: REAL[op][-2:] for op in ("layer_norm", "begin_row")})
    calls: list[str] = []

    def tried(op: str, *_: Any) -> dict[str, Any]:
        calls.append(op)
        return {"failed": "RuntimeError: CUDA error: an illegal memory access"} if len(calls) == 5 else {"failed": "no"}

    monkeypatch.setattr(kernels, "tried", tried)
    found = list(kernels.rows(["layer_norm", "begin_row"], torch.float32, time.monotonic() + 60))
    assert calls == ["layer_norm"] * 2 + ["begin_row"] * 2 + ["layer_norm"]
    assert len(found) == 6


def shape_of(op: str, what: str) -> Shape:
    return next(shape for shape in REAL[op] if what in f"{shape.model} {shape.what}")


@pytest.mark.parametrize(
    ("op", "what", "other"),
    [
        ("linear", "8192×320 by 320×320", "kernel by TMA"),
        ("geglu", "8192×320", "kernel by TMA"),
        ("conv2d", "VAE 512² 1×512×64×64 to 512, 3×3, residual", "kernel by pointers"),
        ("conv2d", "SD 1.5 512² 2×320×64×64 to 320, 3×3, stride 2", None),
        ("layer_norm", "4096×320", None),
    ],
)
def test_the_other_form_is_timed_where_there_are_two(op: str, what: str, other: str | None) -> None:
    assert kernels.other_form(op, shape_of(op, what), torch.float16) == other


def test_a_row_for_each_form(on_this_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def arms(op: str, compiled: bool) -> dict[str, Any]:
        return dict.fromkeys(("kernel", *kernels.FORMS), getattr(reference, op))

    monkeypatch.setattr(kernels, "arms", arms)
    monkeypatch.setattr(kernels, "REAL", {"linear": [shape_of("linear", "50×320 by 1280×320")]})
    _, *found = kernels.rows(["linear"], torch.float16, time.monotonic() + 60)
    assert [row["arm"] for row in found] == ["kernel", "kernel by TMA"]
    assert all("us" in row for row in found)


@pytest.mark.parametrize("tma", [True, False])
def test_an_arm_takes_its_form(tma: bool) -> None:
    arm = kernels.arms("linear", compiled=False)[next(name for name, wanted in kernels.FORMS.items() if wanted == tma)]
    arguments, options = shape_of("linear", "50×320 by 1280×320").make("meta", torch.float16)
    with recording() as launches:
        arm(*arguments, **options)
    assert launches[0].arguments["TMA"] is tma


def test_no_row_is_begun_after_its_time(on_this_cpu: None) -> None:
    found: Iterator[dict[str, Any]] = kernels.rows(["layer_norm"], torch.float32, time.monotonic() - 1)
    assert [set(row) for row in found] == [{"peak", "dtype"}]
