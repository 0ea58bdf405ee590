"""The benchmark that the project is known by: that it measures what it says, with models of a size for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastldm
from benchmarks import cells, harness, latency, latency_table, painters, random_models, steps
from benchmarks.cells import Cell
from examples import tiny_model
from fastldm import config
from fastldm.assets import SHAPES
from tests.oracle import relative_error

SCRIPT = Path(latency.__file__)
CELL = Cell("shapes", 128, 128, "float32", steps=3, sampler="dpmpp_2m")
STEP = Cell("sd15", 64, 64, "float32", whole=False)
HOW = latency.How("cpu", "reference", runs=2, cold=False)
ORDER = painters.Order(CELL, str(SHAPES), "cpu", "reference")
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def measured(
    cell: Cell, *peers: str, how: latency.How = HOW, seconds: float = 60, folder: Path = Path("unused")
) -> list[dict[str, Any]]:
    return list(latency.measured([(cell, peers)], how, seconds, folder))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the benchmark, but narrow."""
    text = {**random_models.MODELS["sd15"]["text_encoder"], "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    whole = {"unet": tiny_model.UNET, "vae": tiny_model.VAE, "text_encoder": text}
    xl = {**tiny_model.UNET, **XL}
    monkeypatch.setattr(random_models, "MODELS", {"sd15": whole, "sdxl": {"unet": xl}})


# ----------------------------------------------------------------------------------------------- from prompt to pixels


def test_both_paint_the_same_and_every_part_of_the_time_is_there() -> None:
    ours, theirs = measured(CELL, "diffusers")
    for row in (ours, theirs):
        assert row["runs"] == len(row["seconds"]) == 2
        assert row["median"] == pytest.approx(sum(row["seconds"]) / 2)
        assert set(row["split"]) == {"text", "denoise", "vae", "rest"}
        assert min(row["split"].values()) > 0
        assert row["step"]["count"] == 2 * latency.SPLITS
        assert 0 < row["step"]["p50"] <= row["step"]["p90"]
        assert row["steps_per_second"] == pytest.approx(1 / row["step"]["p50"])
        assert row["images_per_second"] == pytest.approx(1 / row["median"])
        assert 0 < row["tflops"] < row["tflops"] / row["of_peak"], "less than a product alone"
        assert (row["new_size"]["width"], row["new_size"]["height"]) == (192, 192)
    assert theirs["difference"] < 1e-4
    assert theirs["times_as_long"]["low"] <= theirs["times_as_long"]["high"]
    assert ours["merge"]["tensors"] == 56
    said = latency_table.shown(theirs)
    assert f"results differ by {theirs['difference']:.1e}" in said
    assert "rounds 2" in said


def test_one_step_has_no_time_between_steps() -> None:
    (row,) = measured(replace(CELL, steps=1), how=replace(HOW, runs=1))
    assert "step" not in row
    assert "steps/s" not in latency_table.shown(row)
    assert row["median"] > 0


def test_a_stage_is_timed_alone_and_nothing_stays_behind() -> None:
    painter = painters.ours(ORDER)
    engine, slow = painter.pipe._engine, 0.3
    plain = type(engine).decode

    def slowed(*arguments: Any, **options: Any) -> Any:
        time.sleep(slow)
        return plain(engine, *arguments, **options)

    before = painter.split(CELL)[0]
    vars(engine)["decode"] = slowed
    parts, each = painter.split(CELL)
    assert vars(engine)["decode"] is slowed
    assert slow < parts["vae"] < slow + before["vae"] + 0.5
    assert parts["denoise"] < slow + before["denoise"]
    assert len(each) == 2


def test_merging_leaves_the_weights_as_they_were() -> None:
    painter = painters.ours(ORDER)
    first = painter.paint(CELL, output_type="pt")
    latency._merged(painter.pipe._engine)
    assert torch.equal(painter.paint(CELL, output_type="pt"), first)


def test_what_is_not_installed_or_does_not_run_is_a_row(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: steps.Job) -> steps.Step:
        raise RuntimeError("no such chip\nand more")

    def late(job: steps.Job) -> steps.Step:
        calls = iter([torch.zeros(1)])
        return lambda: next(calls)

    monkeypatch.setattr(painters, "NEEDS", {"diffusers": ("nosuchpackage",)})
    monkeypatch.setattr(steps, "ARMS", {**steps.ARMS, "diffusers-compiled": broken, "fastldm-reference": late})
    rows = measured(STEP, "diffusers", "diffusers-compiled", "fastldm-reference")
    assert [row["arm"] for row in rows] == ["fastldm", "diffusers", "diffusers-compiled", "fastldm-reference"]
    assert rows[1]["absent"] == "pip install nosuchpackage"
    assert rows[2]["failed"] == "RuntimeError: no such chip"
    assert rows[3]["failed"].startswith("StopIteration")
    assert latency_table.shown(rows[1]).endswith("diffusers: not installed, pip install nosuchpackage")
    assert rows[0]["runs"] == 2


def test_peers_are_measured_where_fastldm_fails_and_the_command_says_so(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(job: steps.Job) -> steps.Step:
        raise RuntimeError("a bug")

    monkeypatch.setattr(steps, "ARMS", {**steps.ARMS, "fastldm": broken})
    words = ["--model", "sd15", "--step", "--size", "64", "--runs", "1", "--peers", "diffusers"]
    assert latency.run(latency.parsed(words)) == 1
    said = capsys.readouterr()
    assert "fastldm: failed: RuntimeError: a bug" in said.out
    assert "diffusers\n    step" in said.out
    assert "Traceback" in said.err


def test_what_fails_after_the_measurement_hides_nothing(tiny: None) -> None:
    (row,) = measured(STEP)
    said = latency_table.shown({**row, "failed": "RuntimeError: late"})
    assert said.startswith(latency_table.shown(row))
    assert said.endswith("then RuntimeError: late")


def test_a_cell_that_was_measured_twice_stays_two(tiny: None) -> None:
    once, again = measured(STEP), measured(STEP)
    other = [{**row, "cell": {**row["cell"], "batch": 2}} for row in once]
    assert [len(rows) for _, rows in latency_table.groups([*once, *other, *again])] == [1, 1, 1]


def test_a_lost_gpu_ends_the_measuring(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: steps.Job) -> steps.Step:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(steps, "ARMS", {**steps.ARMS, "fastldm": broken})
    rows = list(latency.measured([(STEP, ()), (STEP, ())], HOW, 60, Path("unused")))
    assert ["failed" in row for row in rows] == [True, False]
    assert rows[1]["skipped"] == "the GPU had failed"


def test_a_cold_start_is_a_process_of_its_own() -> None:
    start = time.perf_counter()
    cold = latency._cold("fastldm", ORDER, 1)
    assert 0 < cold["seconds"] < time.perf_counter() - start
    assert cold["peak_memory_gb"] > 0.1
    assert "failed" in latency._cold("fastldm", replace(ORDER, model="nowhere"), 1)


def test_random_models_are_what_both_read(tiny: None, tmp_path: Path) -> None:
    folder = tmp_path / "sd15"
    random_models.write("sd15", folder, torch.float32, torch.device("cpu"))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found = [
        pipe(painters.PROMPT, generator=torch.Generator().manual_seed(0), **options).images
        for pipe in (fastldm.Pipeline(folder), theirs)
    ]
    assert relative_error(*found) < 1e-5
    assert float(found[0].std()) > 0.1


# --------------------------------------------------------------------------------------------------- a step of a U-Net


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_a_step_is_the_same_for_all(tiny: None, model: str, guidance: float) -> None:
    cell = replace(STEP, model=model, batch=2, guidance=guidance)
    ours, theirs, plain = measured(cell, "diffusers", "fastldm-reference")
    assert theirs["difference"] < 1e-5
    assert plain["difference"] == 0
    assert [row["runs"] for row in (ours, theirs, plain)] == [2, 2, 2]
    assert ours["cell"]["sampler"] == "ddim"


@pytest.mark.parametrize(("name", "teraflops"), [("SD15", 1.607), ("SDXL", 13.52)])
def test_the_work_of_a_step_is_that_of_the_published_shapes(name: str, teraflops: float) -> None:
    """Counted by hand elsewhere, with the text's keys and values: 0.4 % and 0.8 % of it."""
    size = {"SD15": 512, "SDXL": 1024}[name]
    cell = Cell("any", size, size, "float16")
    assert steps.flops(getattr(config, f"{name}_UNET"), cell) / 1e12 == pytest.approx(teraflops, rel=0.012)


# -------------------------------------------------------------------------------------------------- time, tables, words


def test_time_is_kept_after_what_is_slow_at_first() -> None:
    called: list[str] = []
    rows = {name: latency.new_row(CELL, name) for name in ("fastldm", "diffusers")}
    arms = {name: (lambda name=name: called.append(name) or name) for name in rows}
    found = latency.rounds(arms, rows, 5, 1, 0.0)
    assert called == ["fastldm", "diffusers"] * 2
    assert found == {"fastldm": ["fastldm"], "diffusers": ["diffusers"]}
    (late,) = measured(CELL, seconds=-1.0)
    assert late["skipped"] == "the -1 s were over"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5], {"p50": 5}),
        ([3, 1, 2], {"p50": 2}),
        (range(1, 11), {"p50": 5, "p90": 9}),
        (range(1, 101), {"p50": 50, "p90": 90, "p99": 99}),
    ],
)
def test_percentiles_are_those_that_so_few_can_tell(values: Sequence[float], expected: dict[str, float]) -> None:
    assert latency.percentiles(list(values)) == expected


@pytest.mark.parametrize(
    ("seconds", "said"), [(2e-5, "20 µs"), (0.9997, "1 s"), (0.0123, "12.3 ms"), (0.4567, "457 ms"), (1234.5, "1234 s")]
)
def test_seconds_are_said_in_three_digits(seconds: float, said: str) -> None:
    assert latency_table.time(seconds) == said


def test_the_page_is_made_from_the_rows(tmp_path: Path, tiny: None) -> None:
    once_each = replace(HOW, runs=1)
    found = measured(CELL, how=once_each) + measured(STEP, "diffusers", how=once_each)
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"
    rows.write_text(json.dumps({"machine": harness.machine("cpu"), "rows": found}), encoding="utf-8")
    page.write_text(f"before\n{''.join(latency_table.MARKS)}\nafter\n", encoding="utf-8")
    latency_table.page(page, [rows])
    once, picture = page.read_text(encoding="utf-8"), (tmp_path / "page" / "latency.svg").read_bytes()
    latency_table.page(page, [rows])
    assert (page.read_text(encoding="utf-8"), (tmp_path / "page" / "latency.svg").read_bytes()) == (once, picture)
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "**shapes 128×128, float32, batch 1, guidance 7.5, dpmpp_2m, 3 steps**" in once
    assert (once.count("| fastldm |"), once.count("| diffusers |")) == (3, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "shapes", "--size", "100"], "multiples of 8"),
        (["--runs", "0"], "at least 1"),
        (["--model", "shapes", "--dtype", "int8"], "invalid choice"),
        (["--peers", "nobody"], "invalid choice"),
        (["--page", "page.md"], "--page needs --rows"),
        (["--steps", "3"], "--steps needs --model"),
        (["--step"], "--step needs --model"),
        (["--step", "--model", "shapes"], "--step needs --model sd15 or sd21 or sdxl"),
        (["--standard"], "needs a GPU"),
        (["--device", "cuda"], "there is no GPU here"),
    ],
)
def test_wrong_words(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        latency.parsed(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("asked", [cells.usual("cuda"), cells.usual("cpu"), cells.standard()])
def test_every_cell_is_one_that_can_be_asked_for(asked: cells.Asked) -> None:
    for cell, peers in asked:
        assert cell.model in cells.SIZES
        assert cell.whole is False or cell.model != "sdxl"
        assert set(peers) <= painters.PAINTERS.keys() & steps.ARMS.keys()
        assert cell.sampler in fastldm.samplers()


def test_a_model_that_is_not_there_is_one_line() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--model", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr
