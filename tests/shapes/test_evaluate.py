"""The report on a model: what is counted, measured and drawn, with a tiny model of random weights."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import judge
import numpy as np
import PIL.Image
import pytest
import scenes
import torch
from evaluate import Case, Cell, Rate, Settings
from numpy.random import default_rng

import fastldm
from examples.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model paints 256 × 256 pixels where nothing else is asked for."""
    call = fastldm.Pipeline.__call__
    monkeypatch.setattr(fastldm.Pipeline, "__call__", lambda self, *a, **k: call(self, *a, **k, height=64, width=64))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


# ------------------------------------------------------------------------------------------------------------- counting


def test_wilsons_interval() -> None:
    """Of 8 in 10, and of none: the textbook's figures."""
    assert Rate(8, 10).interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Rate(0, 10).interval() == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert str(Rate(1, 2)) == "50.0 % (9.5 to 90.5)"


def test_rates_count_each_property_by_kind() -> None:
    case = evaluate.cases(0, 4)
    images = [scenes.render(one.scene, 128) for one in case]
    verdicts = [judge.judge(one.caption, image) for one, image in zip(case, images, strict=True)]
    wrong = judge.judge("a red circle", np.full((128, 128, 3), 250, np.uint8))
    table = evaluate.rates(
        [*((one.kind, verdict) for one, verdict in zip(case, verdicts, strict=True)), ("single", wrong)]
    )
    assert set(table) == {"all", *scenes.KINDS}
    assert table["all"]["scene"] == Rate(4, 5)
    assert table["single"]["scene"] == Rate(1, 2)
    assert table["all"]["colour"] == Rate(8, 9), "1 + 2 + 2 + 3 shapes, and the missing one"
    assert table["relation"]["relation"] == Rate(1, 1)
    assert "relation" not in table["pair"]


def test_captions_are_seeded_and_held_out() -> None:
    first = evaluate.cases(0, 40)
    assert first == evaluate.cases(0, 40)
    assert first != evaluate.cases(1, 40)
    assert all(case.scene.held_out for case in first)
    assert [case.kind for case in first[:4]] == list(scenes.KINDS)


# ------------------------------------------------------------------------------------------------------------- distance


def test_frechet_distance_of_known_gaussians() -> None:
    """In one direction each: (μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    x = default_rng(0).standard_normal((4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(x, 3 * x + [1, 0, 2]) == pytest.approx(5 + 3 * 4)


def test_frechet_distance_sees_what_is_spoilt() -> None:
    def rendered(seed: int) -> evaluate.Images:
        kinds = scenes.KINDS * 30
        drawn = [scenes.random_scene(default_rng((seed, i)), kind) for i, kind in enumerate(kinds)]
        return np.stack([scenes.render(scene, 64) for scene in drawn])

    real, others = evaluate.features(rendered(0)), rendered(1)
    noise = default_rng(0).normal(0, 20, others.shape)
    floor = evaluate.frechet(evaluate.features(others), real)
    spoilt = [evaluate.features((others + part * noise).clip(0, 255).astype(np.uint8)) for part in (0.5, 1)]
    distances = [evaluate.frechet(found, real) for found in spoilt]
    assert floor < distances[0] < distances[1]
    assert distances[1] > 2 * floor


# -------------------------------------------------------------------------------------------------------------- reports


def test_the_report_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, page, drawn = tmp_path / "a" / "out.json", tmp_path / "page.md", tmp_path / "c" / "out.png"
    page.write_text("before\n<!-- report -->\nold\n<!-- end of report -->\nbehind\n")
    files = ("--json", out, "--page", page, "--sheet", drawn)
    run(monkeypatch, model, "--captions", 8, "--steps", 1, "--batch", 4, *files)
    figures = json.loads(out.read_text())
    assert {name: figures[name] for name in ("command", "captions", "steps", "guidance", "sampler", "seed")} == {
        "command": "report",
        "captions": 8,
        "steps": 1,
        "guidance": 7.5,
        "sampler": "dpmpp_2m",
        "seed": 0,
    }
    assert set(figures["rates"]) == {"all", *scenes.KINDS}
    assert figures["rates"]["all"]["scene"]["of"] == 8
    assert figures["rates"]["all"]["scene"]["right"] == 0, "the weights are random"
    assert figures["frechet"] > 2 * figures["frechet_of_renders"] > 0
    table = capsys.readouterr().out
    assert table.startswith("| of scenes | fully right | background | count | colour |")
    marks = f"<!-- report -->\n\n{table}\n<!-- end of report -->"
    assert page.read_text(encoding="utf-8") == f"before\n{marks}\nbehind\n"
    with PIL.Image.open(drawn) as sheet:
        assert sheet.width == 8 * 140
        assert sheet.getpixel((3, 3)) == (255, 0, 0), "a wrong picture has a red frame"


@pytest.mark.parametrize(
    "page", ["", "<!-- report -->\n", "<!-- report --><!-- end of report -->", "<!-- guidance -->"]
)
def test_a_page_without_marks_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="the page has no <!-- report -->"):
        evaluate.rewritten(page, "report", "table")


def test_pictures_do_not_depend_on_the_batch(model: Path) -> None:
    pipe, captions = fastldm.Pipeline(model), ["a red ring", "a blue star", "a pink heart"]
    how = Settings(steps=1, batch=3, seed=5)
    together = evaluate.paint(pipe, captions, how)
    assert together.shape == (3, 64, 64, 3)
    apart = evaluate.paint(pipe, captions, replace(how, batch=2))
    assert np.abs(together - apart).max() < 1e-4
    assert np.abs(together - evaluate.paint(pipe, captions, replace(how, seed=6))).max() > 1e-2


def test_a_table_of_guidance(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(evaluate, "GUIDANCE", (1.0, 7.5))
    run(monkeypatch, "guidance", model, "--captions", 2, "--steps", 1, "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["1"]["frechet"] != figures["7.5"]["frechet"]
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 1", "| 7.5"]


def test_samplers_are_ranked_by_their_distance(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """More steps come nearer to the solution."""
    monkeypatch.setattr(evaluate, "TRUTH_STEPS", 40)
    monkeypatch.setattr(evaluate, "SAMPLERS", ("ddim", "euler", "dpmpp_2m"))
    monkeypatch.setattr(evaluate, "SAMPLER_STEPS", (5, 20))
    monkeypatch.setattr(evaluate, "SAMPLER_GUIDANCE", (1.0, 2.0))
    asked = [Case("single", case.scene, case.caption) for case in evaluate.cases(0, 1)]
    figures, table, _ = evaluate.samplers(fastldm.Pipeline(model), asked, Settings())
    assert list(figures["distances"]) == ["1", "2"]
    assert figures["distances"]["1"] != figures["distances"]["2"]
    for (scale, distances), lines in zip(figures["distances"].items(), table.split("\n\n"), strict=True):
        assert set(distances) == {"ddim", "euler", "dpmpp_2m"}
        assert all(row[20] < row[5] < 1.5 for row in distances.values()), distances
        head, _, *ranked = (line.split(" | ")[0].removeprefix("| ") for line in lines.splitlines())
        assert head == f"guidance {scale}"
        assert ranked == sorted(distances, key=lambda name: distances[name][20])


def test_every_sampler_of_the_table_begins_at_the_last_timestep(model: Path) -> None:
    pipe = fastldm.Pipeline(model)
    for name in evaluate.SAMPLERS:
        table = fastldm.sampling.sampler_table(evaluate.whole(name, pipe.scheduler), 5)
        assert table.timesteps[0] == pytest.approx(999, abs=1), name


def test_a_wrong_model_or_sampler_is_said(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments in ((model / "nothing",), (model, "--captions", 1, "--sampler", "eulr")):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert "nothing" in said
    assert "did you mean 'euler'" in said


# ---------------------------------------------------------------------------------------------------------------- sheet


def test_a_right_picture_has_no_frame_and_no_complaint() -> None:
    case = evaluate.cases(0, 1)[0]
    image = scenes.render(case.scene, 128)
    right, wrong = (judge.judge(text, image) for text in (case.caption, "a red circle and a blue star"))
    page = evaluate.sheet([Cell(image, case.caption, right), Cell(image, "...", wrong)], 2)
    pixels = np.asarray(page).astype(int)
    red = pixels[..., 0] - pixels[..., 1:].max(-1) > 100
    red[6:134] = False  # the pictures, and the frame beside them
    assert not red[:, :140].any()
    assert red[:6, 140:].any(), "the frame"
    assert red[140:, 140:].any(), "the words"
    assert np.array_equal(np.asarray(page)[6:134, 6:134], image)


def test_no_complaint_is_cut() -> None:
    """The page is as high as the longest text asks for."""
    image = np.full((128, 128, 3), 250, np.uint8)
    text = "a small red circle left of a big blue star"
    heights = []
    for count in (1, 2):
        verdict = judge.judge(text, image)
        verdict = judge.Verdict(verdict.checks * count)
        heights.append(np.asarray(evaluate.sheet([Cell(image, text, verdict)], 1)))
    lines = sum(len(textwrap.wrap(evaluate.complaint(check), 24)) for check in verdict.wrong) // 2
    assert heights[1].shape[0] - heights[0].shape[0] == 11 * lines > 0
    last = heights[1][-17:-6].astype(int)
    assert (last[..., 0] - last[..., 1:].max(-1) > 100).any(), "words in the last line"


def test_features_are_those_of_one_network() -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate.Features()(x), evaluate.Features()(x))
    assert evaluate.Features()(x).shape == (2, 72)
