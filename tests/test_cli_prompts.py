"""`fastldm --prompts FILE`: one image each into a folder; run again, it goes on where it was, or says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner, Result

import fastldm
from examples.tiny_model import write_tiny_model
from fastldm import paint, png
from fastldm.cli import main

WORDS = ("--prompts", "prompts.txt", "-o", "made", "--size", "32x24", "--steps", "1")
PROMPTS = ["a cat", "the red cat", "灯台"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(model: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(model)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with prompts.txt; the model is the variable's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLDM_MODEL", str(model))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return tmp_path


def run(*words: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="fastldm", **options)


def failed(*words: object, **options: Any) -> str:
    before = state()
    result = run(*words, **options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("fastldm: ")
    assert result.stderr.count("\n") == 1
    assert state() == before
    return result.stderr


def state() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("fastldm.pipeline.Pipeline.__init__", refuse)


def no_painting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was painted")

    monkeypatch.setattr("fastldm.paint.Painter.paint", refuse)


def said(path: str) -> png.Parameters:
    text = png.read(Path(path)).text
    assert text is not None
    return png.parsed(text)


def test_one_image_each(pipe: fastldm.Pipeline) -> None:
    result = run(*WORDS)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["made/0001.png", "made/0002.png", "made/0003.png"]
    assert sorted(os.listdir("made")) == ["0001.png", "0002.png", "0003.png"]
    for k, prompt in enumerate(PROMPTS):
        path = f"made/{k + 1:04}.png"
        assert (said(path).prompt, said(path).settings["Seed"]) == (prompt, str(k))
        with PIL.Image.open(path) as found:
            expected = pipe(prompt, width=32, height=24, num_inference_steps=1, seed=k).images[0]
            assert found.tobytes() == expected.tobytes()


def test_seeds_count_from_the_one_that_is_given() -> None:
    lines = [json.loads(line) for line in run(*WORDS, "--seed", 7, "--json").stdout.splitlines()]
    assert [(line["path"], line["prompt"], line["seed"]) for line in lines] == [
        (f"made/{k + 1:04}.png", prompt, k + 7) for k, prompt in enumerate(PROMPTS)
    ]


def test_the_folder_has_a_name_of_its_own() -> None:
    assert run(*WORDS[:2], *WORDS[4:]).stdout.splitlines()[0] == "out/0001.png"


def test_what_is_no_prompt(here: Path) -> None:
    (here / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\n  \n# a note\n  # another\n\ta dog \n")
    run(*WORDS)
    assert [said(f"made/{name}").prompt for name in sorted(os.listdir("made"))] == ["a cat", "a dog"]


def test_from_the_standard_input() -> None:
    result = run("--prompts", "-", *WORDS[2:], input="a cat\na dog\n")
    assert result.stdout == "made/0001.png\nmade/0002.png\n"
    assert said("made/0002.png").prompt == "a dog"


WRONG = {
    "not UTF-8": (b"a cat\n\na \xff dog\n", r"prompts.txt: line 3 is not UTF-8: b'a \xff dog'"),
    "a long line": (b"a cat\n" + b"a" * 65537, "prompts.txt: line 2 has 65537 bytes, over 65536"),
    "empty": (b"", "prompts.txt: holds 0 prompts, must hold 1 to 100000"),
    "notes alone": (b"# one\n\n", "prompts.txt: holds 0 prompts"),
    "too many": (b"a\n" * 100_001, "prompts.txt: holds 100001 prompts"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_names_the_line(here: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str) -> None:
    no_model(monkeypatch)
    (here / "prompts.txt").write_bytes(data)
    assert f"--prompts = {message}" in failed(*WORDS)
    assert f"--prompts = {message.replace('prompts.txt', 'the standard input')}" in failed(
        "--prompts", "-", *WORDS[2:], input=data
    )


def test_a_file_that_cannot_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    monkeypatch.setattr(paint, "MAX_PROMPTS_FILE", 4)
    assert "--prompts = prompts.txt: has over 4 bytes" in failed(*WORDS)
    (here / "prompts.txt").unlink()
    assert "--prompts = prompts.txt: cannot be read: No such file or directory" in failed(*WORDS)


# ---------------------------------------------------------------------------------------------------------------- again


def test_again_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run(*WORDS)
    before = state()
    no_painting(monkeypatch)
    result = run(*WORDS)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert state() == before


def test_again_it_paints_what_is_missing() -> None:
    run(*WORDS)
    before = state()
    os.unlink("made/0002.png")
    assert run(*WORDS).stdout == "made/0002.png\n"
    assert state() == before


def test_prompts_that_are_added_are_painted(here: Path) -> None:
    run(*WORDS)
    with open("prompts.txt", "a", encoding="utf-8") as file:
        file.write("\na fourth\n")
    assert run(*WORDS).stdout == "made/0004.png\n"


def test_another_version_painted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run(*WORDS)
    monkeypatch.setattr(paint, "__version__", "0.2.0")
    no_painting(monkeypatch)
    assert run(*WORDS).exit_code == 0


CHANGED = {
    "seed": (("--seed", 1), "made/0001.png has Seed 0, not 1"),
    "steps": (("--steps", 2), "made/0001.png has Steps 1, not 2"),
    "sampler": (("--sampler", "euler"), "made/0001.png has Sampler DDIM, not Euler"),
    "size": (("--size", "24x32"), "made/0001.png has Size 32x24, not 24x32"),
    "negative": (("--negative", "dull"), "made/0001.png has the negative prompt '', not 'dull'"),
    "guidance": (("--guidance", 2), "made/0001.png has CFG scale 7.5, not 2"),
    "dtype": (("--dtype", "bf16"), "made/0001.png has Precision nothing, not bf16"),
    "clip skip": (("--clip-skip", 1), "made/0001.png has Clip skip nothing, not 2"),
    "vae": (("--vae", "x/other"), "made/0001.png has VAE nothing, not other"),
    "model": (("--model", "x/other.safetensors"), "made/0001.png has Model tiny, not other"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder that was painted; not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ("--prompts", folder / "prompts.txt", "-o", folder / "made", *WORDS[4:], "--model", model)
    assert run(*words).exit_code == 0
    return folder


@pytest.mark.parametrize(("words", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_other_settings_are_an_error_before_the_model_is_read(
    done: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(done)
    no_model(monkeypatch)
    assert failed(*WORDS, *words) == f"fastldm: {message}; --overwrite paints it anew, another -o leaves it\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "32x24"), "has Steps 1, not 50"),
        (("--steps", 1), "has Size 32x24, not 256x256"),
    ],
)
def test_other_defaults_are_an_error_before_anything_is_painted(
    done: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(done)
    no_painting(monkeypatch)
    assert message in failed(*WORDS[:4], *words)


def test_a_setting_that_is_no_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run(*WORDS, "--clip-skip", 1)
    no_painting(monkeypatch)
    assert "made/0001.png has Clip skip 2, not nothing" in failed(*WORDS)


def test_other_images_and_masks_are_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*WORDS[:4], "--steps", 2, "--image", "start.png")
    PIL.Image.new("RGB", (32, 24), "red").save("start.png")
    assert run(*words).exit_code == 0
    PIL.Image.new("RGB", (32, 24), "blue").save("start.png")
    no_model(monkeypatch)
    assert "made/0001.png has Init image hash " in failed(*words)


def test_another_prompt_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*WORDS)
    (here / "prompts.txt").write_text("a cat\na dog\n")
    no_model(monkeypatch)
    assert "made/0002.png has the prompt 'the red cat', not 'a dog'" in failed(*WORDS)


STRANGE = {
    "no image": (lambda path: path.write_bytes(b"text"), "made/0002.png is no PNG file"),
    "a picture": (lambda path: PIL.Image.new("RGB", (8, 8)).save(path), "made/0002.png does not say what it was made"),
    "a folder": (lambda path: path.mkdir(), "made/0002.png is no file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "made/0002.png is missing"),
}


@pytest.mark.parametrize(("make", "message"), STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_file_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str) -> None:
    (here / "made").mkdir()
    make(here / "made/0002.png")
    no_model(monkeypatch)
    assert message in failed(*WORDS)


def test_a_strangers_text_cannot_steer_the_terminal(here: Path) -> None:
    run(*WORDS)
    found = said("made/0001.png")
    settings = {**found.settings, "Seed": "\x1b]0;taken\x07" * 100}
    png.write(PIL.Image.new("RGB", (8, 8)), here / "made/0001.png", png.Parameters("a cat", "", settings), new=False)
    message = failed(*WORDS)
    assert "made/0001.png has Seed \\x1b]0;taken" in message
    assert message.rstrip("\n").isprintable()
    assert len(message) < 250


def test_overwrite_replaces_what_differs_and_nothing_else(here: Path) -> None:
    run(*WORDS)
    before = state()
    (here / "made/0001.png").write_bytes(b"text")
    (here / "prompts.txt").write_text("a cat\na dog\n灯台\n", encoding="utf-8")
    assert run(*WORDS, "--overwrite").stdout == "made/0001.png\nmade/0002.png\n"
    after = state()
    assert said("made/0002.png").prompt == "a dog"
    assert [before[f"made/000{k}.png"] == after[f"made/000{k}.png"] for k in (1, 2, 3)] == [True, False, True]


def test_what_comes_to_be_there_meanwhile_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = paint.Painter.paint

    def paint_slowly(self: paint.Painter, order: paint.Order) -> paint.Painted:
        order.path.write_bytes(b"of somebody else")
        return real(self, order)

    monkeypatch.setattr(paint.Painter, "paint", paint_slowly)
    result = run(*WORDS)
    assert result.exit_code == 1
    assert result.stderr == "fastldm: made/0001.png cannot be written: File exists\n"
    assert (here / "made/0001.png").read_bytes() == b"of somebody else"
    assert os.listdir("made") == ["0001.png"]


def test_the_folder_is_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_model(monkeypatch)
    (here / "made").write_text("text")
    assert "-o = made: cannot be written: made is no folder" in failed(*WORDS)


def test_no_folder_is_left_where_the_model_fails() -> None:
    assert "--model = nowhere.safetensors: there is no such file" in failed(*WORDS, "--model", "nowhere.safetensors")


def test_what_is_done_stays_when_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) > 2:  # the first file, and its folder
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    result = run(*WORDS)
    assert (result.exit_code, result.stdout) == (1, "made/0001.png\n")
    assert result.stderr == "fastldm: made/0002.png cannot be written: No space left on device\n"
    assert os.listdir("made") == ["0001.png"]
    monkeypatch.setattr(os, "fsync", real)
    assert run(*WORDS).stdout == "made/0002.png\nmade/0003.png\n"
