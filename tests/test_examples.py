"""The examples, and the commands that the README promises."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastldm
from tests.oracle import relative_error

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(script: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a path with spaces") / "tiny model"
    assert run(EXAMPLES / "tiny_model.py", str(folder)) == f"{folder}\n"
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_seed_gives_the_same_model(model: Path, tmp_path: Path) -> None:
    run(EXAMPLES / "tiny_model.py", str(tmp_path / "again"))
    run(EXAMPLES / "tiny_model.py", str(tmp_path / "other"), "--seed", "1")
    assert files(tmp_path / "again") == files(model)
    differ = {name for name, data in files(tmp_path / "other").items() if data != files(model)[name]}
    assert {Path(name).suffix for name in differ} == {".safetensors"}
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left behind"


def test_an_existing_folder_is_not_touched(model: Path) -> None:
    before = files(model)
    done = subprocess.run([sys.executable, str(EXAMPLES / "tiny_model.py"), str(model)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert files(model) == before


def test_the_tiny_model_is_one_that_diffusers_loads(model: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    ours = fastldm.Pipeline(model)
    latents = []
    for pipe in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        latents.append(pipe("the red cat", num_inference_steps=3, generator=generator, output_type="latent").images)
    assert relative_error(*latents) <= 1e-4


def test_the_prompt_and_the_seed_matter(model: Path) -> None:
    pipe = fastldm.Pipeline(model)

    def paint(prompt: str, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent").images

    first = paint("the red cat", 0)
    assert torch.equal(paint("the red cat", 0), first)
    assert relative_error(paint("a blue dog", 0), first) > 0.01
    assert relative_error(paint("the red cat", 1), first) > 0.01


# --------------------------------------------------------------------------------------------- what the README promises


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return [block.strip() for block in blocks]


def test_the_readme_has_two_commands_of_one_line_each() -> None:
    image, test = commands()
    assert image.endswith("""/fastldm "a large green triangle above a small yellow circle" --seed 2 -o first.png""")
    assert test.endswith("-m pytest -n 2")
    assert "\n" not in image + test


def test_ci_runs_the_readmes_test_command() -> None:
    """The same line, and nothing behind it that could hide its failure."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert script[-1] == commands()[1]
    assert "set -euo pipefail" in script


def test_ci_runs_the_steps_of_make_check() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert recipe is not None
    steps = [line.strip() for line in recipe[1].splitlines()]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert len(steps) == 4
    assert [line for line in script if line in steps] == steps


def test_constraints_pin_everything_that_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[^\w-]", line)[0] for line in [*project["dependencies"], *extras["test"], *extras["dev"]]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "a plain version each: no path, no local build"
    names = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    assert {name.lower().replace("_", "-") for name in wanted} <= names
