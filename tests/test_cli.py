"""The command line: `fastldm convert`, `fastldm info`, their errors in one line, and Ctrl-C. Others: test_cli_*.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from fastldm.cli import main
from fastldm.signals import WORDS
from tests.single import models
from tests.single.models import KINDS, Sample, as_ckpt, rewritten
from tests.single.narrow import narrow as make_narrow

VOCABULARY = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return models.sample(KINDS["sd1"], tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_narrow(tmp_path_factory.mktemp("narrow"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def failed(*words: object) -> str:
    """The one line that it says."""
    result = run(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("fastldm: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    return result.stderr


# --------------------------------------------------------------------------------------------------------------- info


def test_info_of_a_file(narrow: Sample) -> None:
    result = run("info", narrow.file)
    assert result.exit_code == 0
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["family"] == "Stable Diffusion 1.x"
    assert lines["task"] == "text-to-image"
    assert lines["prediction type"] == "epsilon"
    assert lines["missing"] == "tokenizer"
    assert lines["parameters"] == f"{sum(tensor.numel() for tensor in load_file(narrow.file).values()):,}"
    assert lines["dtypes"] == f"float32 {len(load_file(narrow.file))}"
    assert "block out channels 32 64" in lines["unet"]
    assert "problem" not in lines


def test_info_as_json(narrow: Sample) -> None:
    for path in (narrow.file, narrow.folder):
        result = run("info", path, "--json")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["path"] == str(path)
        assert found["prediction_type"] == "epsilon"
        assert set(found["components"]) == {"unet", "vae", "text_encoder"}


def test_info_with_the_options_of_a_file(made: Sample) -> None:
    result = run("info", made.file, "--config", made.folder, "--prediction-type", "v_prediction", "--json")
    assert json.loads(result.stdout)["prediction_type"] == "v_prediction"


def test_info_of_another_kind(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "word.safetensors")
    result = run("info", tmp_path / "word.safetensors")
    assert result.exit_code == 0
    assert "kind: a textual inversion" in result.stdout


def test_info_of_a_damaged_model_fails_and_says_why(narrow: Sample, tmp_path: Path) -> None:
    name = "model.diffusion_model.out.2.bias"
    file = rewritten(narrow.file, tmp_path / "damaged.safetensors", lambda tensors: tensors.pop(name))
    result = run("info", file)
    assert result.exit_code == 1
    assert [line.startswith("problem: ") for line in result.stdout.splitlines() if name in line] == [True]
    assert "family: Stable Diffusion 1.x" in result.stdout
    as_json = run("info", file, "--json")
    assert as_json.exit_code == 1
    assert len(json.loads(as_json.stdout)["problems"]) == 1


# ------------------------------------------------------------------------------------------------------------ convert


def test_convert_there_and_back(made: Sample, tmp_path: Path) -> None:
    file, folder = tmp_path / "model.safetensors", tmp_path / "folder"
    result = run("convert", made.folder, file)
    assert result.exit_code == 0
    assert result.stdout == f"{file}\n"
    assert file.read_bytes() == made.file.read_bytes()
    assert run("convert", file, folder, "--config", made.folder).stdout == f"{folder}\n"
    assert (folder / "model_index.json").is_file()


def test_convert_a_pickle(made: Sample, tmp_path: Path) -> None:
    result = run(
        "convert", as_ckpt(made.file, tmp_path / "a.ckpt"), tmp_path / "b.safetensors", "--config", made.folder
    )
    assert result.exit_code == 0
    assert (tmp_path / "b.safetensors").read_bytes() == made.file.read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_convert_to_a_dtype(made: Sample, tmp_path: Path, dtype: str) -> None:
    assert run("convert", made.folder, tmp_path / "out.safetensors", "--dtype", dtype).exit_code == 0
    expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out.safetensors").values()} == {expected}


def test_convert_with_parts_from_elsewhere(made: Sample, tmp_path: Path) -> None:
    parts = ("--vae", made.folder, "--text-encoder", made.folder / "text_encoder", "--tokenizer", made.folder)
    assert run("convert", made.file, tmp_path / "out", "--config", made.folder, *parts).exit_code == 0
    assert run("convert", made.folder, tmp_path / "two.safetensors", *parts[:2]).exit_code == 0
    assert (tmp_path / "two.safetensors").read_bytes() == made.file.read_bytes()


# ------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(made: Sample, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "there exists" in failed("convert", made.folder, tmp_path / "there")
    assert "nowhere.safetensors is missing" in failed("convert", tmp_path / "nowhere.safetensors", tmp_path / "out")
    assert "is for a single file" in failed("convert", made.folder, tmp_path / "out", "--config", made.folder)
    assert "must be one of epsilon" in failed("info", made.file, "--config", made.folder, "--prediction-type", "x\ny")
    assert os.listdir(tmp_path) == ["there"]


def test_what_a_file_lacks_is_a_problem(made: Sample) -> None:
    result = run("info", made.file)
    assert result.exit_code == 1
    assert "problem: " in result.stdout
    assert "pass config=" in result.stdout


def test_strings_out_of_files_cannot_steer_the_terminal(made: Sample, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": "\x1b]0;taken\x07"}))
    result = run("info", folder)
    assert result.exit_code == 1
    assert "taken" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_path_with_a_new_line_stays_in_one(tmp_path: Path) -> None:
    failed("info", tmp_path / "a\nb.safetensors")


USAGE = {
    "an unknown option": ["convert", "a", "b", "--fast"],
    "a mistyped command": ["infos"],
    "an unknown shell": ["completion", "csh"],
    "an unknown dtype": ["convert", "a", "b", "--dtype", "int8"],
    "no OUT": ["convert", "a"],
    "no model": ["info"],
    "one too many": ["info", "a", "b"],
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE.keys())
def test_wrong_use_is_exit_code_2(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


HELP = [["--help"], ["-h"], *([name, "--help"] for name in main.commands)]


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


# ------------------------------------------------------------------------------------------------------ real processes


def process(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastldm", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_the_module_is_the_command() -> None:
    done = process("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fastldm ")


def test_a_process_fails_in_one_line() -> None:
    done = process("info", "nowhere.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastldm: nowhere.safetensors is missing\n"


@pytest.mark.parametrize("words", [*HELP, ["--version"], ["info"], ["a cat", "--fast"]], ids=" ".join)
def test_help_comes_at_once(words: list[str]) -> None:
    """Without torch, which takes seconds to import."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['fastldm', *{words}]\n"
        "try:\n"
        "    runpy.run_module('fastldm', run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('\\nloaded', *sorted({'torch', 'numpy', 'transformers', 'tqdm'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_leaves_nothing(made: Sample, tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of a conversion, of a model that takes a while."""
    source = larger(made, tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("folder", "file.safetensors"):
        words = [sys.executable, "-m", "fastldm", "convert", str(source), str(out / name), "--dtype", "fp32"]
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
        deadline = time.monotonic() + 60
        while not written(out) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert running.poll() is None, "it was too quick to be interrupted"
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=60)
        assert running.returncode == 128 + number
        assert stdout == ""
        assert stderr.splitlines()[-1] == f"fastldm: {WORDS[number]}"
        assert "Traceback" not in stderr
        assert not os.listdir(out)


def heard() -> None:
    """Ctrl-C is on, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def larger(made: Sample, folder: Path) -> Path:
    """The same model with a million words."""
    shutil.copytree(made.folder, folder)
    config = folder / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": VOCABULARY}))
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = torch.zeros(VOCABULARY, tensors[name].shape[1], dtype=torch.float16)
    save_file(tensors, path)
    return folder


def written(folder: Path) -> bool:
    """Whether anything is being written below the folder."""
    return any(path.is_file() and path.stat().st_size for path in folder.rglob("*"))
