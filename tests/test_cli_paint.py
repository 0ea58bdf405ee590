"""`fastldm "a prompt"`: what each option does, where the image goes, what is printed, and errors in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner, Result

import fastldm
from examples import tiny_model
from fastldm import arguments, cli, image, paint, png
from fastldm.cli import main
from fastldm.request import DEFAULTS
from fastldm.sampling import named, sampler_table

SIZE = (64, 48)
CALL: dict[str, Any] = {"width": 64, "height": 48, "num_inference_steps": 2, "seed": 1}
WORDS = ("--size", "64x48", "--steps", 2, "--seed", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(model: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(model)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; the model is the variable's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLDM_MODEL", str(model))
    return tmp_path


def run(*words: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="fastldm", **options)


def painted(*words: object) -> PIL.Image.Image:
    """What a command writes to out.png."""
    result = run(*words, "-o", "out.png")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "out.png\n", "")
    return opened("out.png")


def opened(path: str | Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as found:
        found.load()
    return found


def said(path: str | Path) -> png.Parameters:
    text = png.read(Path(path)).text
    assert text is not None
    return png.parsed(text)


def same(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def photo(path: Path, size: tuple[int, int] = SIZE) -> PIL.Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return opened(path)


# ---------------------------------------------------------------------------------------------------- the whole command


def test_a_prompt_becomes_a_file_that_says_how(pipe: fastldm.Pipeline) -> None:
    result = run(
        *("a cat", "-o", "cat.png", "--negative", "dull", "--guidance", 3, "--sampler", "dpmpp_2m_karras", *WORDS)
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "cat.png\n", "")
    expected = pipe("a cat", negative_prompt="dull", guidance_scale=3.0, scheduler="dpmpp_2m_karras", **CALL).images[0]
    assert same(opened("cat.png"), expected)
    assert opened("cat.png").info["parameters"] == (
        "a cat\nNegative prompt: dull\n"
        "Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 1, Size: 64x48, Model: tiny, Version: fastldm 0.1.0"
    )
    assert os.listdir() == ["cat.png"]


def options(here: Path) -> dict[str, tuple[tuple[object, ...], dict[str, Any]]]:
    """Each option, and what it is for the pipeline."""
    start, mask = photo(here / "start.png"), PIL.Image.new("L", SIZE, 0)
    mask.paste(255, (0, 0, 32, 48))
    mask.save(here / "mask.png")
    inpaint = ("--image", "start.png", "--mask", "mask.png")
    given = {"image": start, "mask_image": mask}
    return {
        "steps": (("--steps", 3), {"num_inference_steps": 3}),
        "sampler": (("--sampler", "euler"), {"scheduler": "euler"}),
        "guidance": (("--guidance", 2.5), {"guidance_scale": 2.5}),
        "seed": (("--seed", 5), {"seed": 5}),
        "size": (("--size", "48x72"), {"width": 48, "height": 72}),
        "negative": (("--negative", "the cat"), {"negative_prompt": "the cat"}),
        "clip skip": (("--clip-skip", 1), {"clip_skip": 1}),
        "eta": (("--eta", 1), {"eta": 1.0}),
        "image": (("--image", "start.png", "--strength", 0.5), {"image": start, "strength": 0.5}),
        "mask": (inpaint, given),
        "overlay": ((*inpaint, "--overlay"), {**given, "overlay": True}),
    }


NAMES = ("steps", "sampler", "guidance", "seed", "size", "negative", "clip skip", "eta", "image", "mask", "overlay")


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_the_pipeline(here: Path, pipe: fastldm.Pipeline, name: str) -> None:
    words, call = options(here)[name]
    found = painted("the red cat", *WORDS, *words)
    assert same(found, pipe("the red cat", **{**CALL, **call}).images[0])
    assert not same(found, pipe("the red cat", **CALL).images[0])


def test_no_option_was_forgotten(here: Path) -> None:
    assert tuple(options(here)) == NAMES


def test_dtype(model: Path) -> None:
    found = painted("a cat", *WORDS, "--dtype", "bf16")
    assert same(found, fastldm.Pipeline(model, dtype=torch.bfloat16)("a cat", **CALL).images[0])
    assert said("out.png").settings["Precision"] == "bf16"


def test_defaults_are_the_pipelines_and_are_said(pipe: fastldm.Pipeline) -> None:
    found = painted("a cat", "--seed", 1, "--steps", 1)
    assert found.size == (256, 256)
    assert said("out.png").settings == {
        "Steps": "1",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "1",
        "Size": "256x256",
        "Model": "tiny",
        "Version": f"fastldm {fastldm.__version__}",
    }


def test_what_is_said_of_images_and_masks(here: Path) -> None:
    words, _ = options(here)["overlay"]
    painted("a cat", *WORDS, *words, "--clip-skip", 1)
    settings = said("out.png").settings
    assert settings["Denoising strength"] == "1"
    assert settings["Clip skip"] == "2"
    assert settings["Overlay"] == "True"
    assert len(settings["Init image hash"]) == len(settings["Mask hash"]) == 10
    assert settings["Init image hash"] != settings["Mask hash"]


def test_a_photo_is_turned_upright(here: Path, pipe: fastldm.Pipeline) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    start = photo(here / "plain.png", (64, 48))
    start.save("turned.jpg", exif=exif, quality=100, subsampling=0)
    found = painted("a cat", "--image", "turned.jpg", "--steps", 2, "--seed", 1)
    assert found.size == (48, 64)
    upright = opened("turned.jpg").transpose(PIL.Image.Transpose.ROTATE_270)
    assert same(found, pipe("a cat", image=upright, num_inference_steps=2, seed=1).images[0])


def test_the_models_own_sampler_by_its_name(model: Path) -> None:
    base = fastldm.Pipeline(model).scheduler
    for name in fastldm.samplers():
        assert paint.sampler_name(named(name, base)) == name


# ------------------------------------------------------------------------------------------------ several images, seeds


def test_image_k_is_what_its_seed_alone_gives() -> None:
    assert run("a cat", *WORDS, "--n", 3, "-o", "x.png").stdout == "x-1.png\nx-2.png\nx-3.png\n"
    assert [said(f"x-{k}.png").settings["Seed"] for k in (1, 2, 3)] == ["1", "2", "3"]
    assert same(opened("x-3.png"), painted("a cat", *WORDS[:-1], 3))
    assert not same(opened("x-3.png"), opened("x-2.png"))


def test_a_seed_of_its_own_is_stored() -> None:
    first, second = (json.loads(run("a cat", *WORDS[:4], "--json").stdout) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert said(first["path"]).settings["Seed"] == str(first["seed"])
    assert same(opened(first["path"]), painted("a cat", *WORDS[:4], "--seed", first["seed"]))


# -------------------------------------------------------------------------------------------------------- where it goes


def test_without_a_name_nothing_is_replaced() -> None:
    Path("out-2.png").write_bytes(b"of somebody else")
    assert run("a cat", *WORDS).stdout == "out.png\n"
    assert run("a cat", *WORDS).stdout == "out-1.png\n"
    assert run("a cat", *WORDS, "-n", 2).stdout == "out-3.png\nout-4.png\n"
    assert Path("out-2.png").read_bytes() == b"of somebody else"


def test_what_comes_to_be_there_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = paint.Painter.paint

    def paint_slowly(self: paint.Painter, order: paint.Order) -> paint.Painted:
        order.path.write_bytes(b"of somebody else")
        return real(self, order)

    monkeypatch.setattr(paint.Painter, "paint", paint_slowly)
    result = run("a cat", *WORDS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "fastldm: out.png cannot be written: File exists\n"
    assert Path("out.png").read_bytes() == b"of somebody else"
    assert os.listdir() == ["out.png"]


def test_a_name_is_replaced() -> None:
    Path("x.PNG").write_bytes(b"before")
    assert run("a cat", *WORDS, "-o", "x.PNG").exit_code == 0
    assert said("x.PNG").prompt == "a cat"
    assert os.listdir() == ["x.PNG"]


def test_what_was_there_survives_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x.png").write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("a cat", *WORDS, "-o", "x.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "fastldm: x.png cannot be written: No space left on device\n"
    assert os.listdir() == ["x.png"]
    assert Path("x.png").read_bytes() == b"before"


def test_a_path_that_is_no_utf_8() -> None:
    result = run("a cat", *WORDS, "-o", os.fsdecode(b"\xff.png"))
    assert (result.exit_code, result.stdout_bytes) == (0, b"\xff.png\n")
    assert os.listdir(b".") == [b"\xff.png"]


# ------------------------------------------------------------------------------------------------------ what is printed


def test_json() -> None:
    result = run("a cat", *WORDS, "--n", 2, "--sampler", "euler_a", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line.pop("seconds") > 0 for line in lines] == [True, True]
    common = {"prompt": "a cat", "size": [64, 48], "steps": 2, "sampler": "euler_a"}
    assert lines == [{"path": "out-1.png", "seed": 1, **common}, {"path": "out-2.png", "seed": 2, **common}]


def test_info_reads_it_back() -> None:
    run("a cat,\nrain", *WORDS, "--negative", "Steps: 3")
    lines = run("info", "out.png").stdout.splitlines()
    assert lines[:6] == [
        "path: out.png",
        "kind: PNG image",
        "width: 64",
        "height: 48",
        r"prompt: 'a cat,\nrain'",
        "negative prompt: Steps: 3",
    ]
    assert "Sampler: DDIM" in lines
    found = json.loads(run("info", "out.png", "--json").stdout)
    assert (found["kind"], found["width"], found["height"]) == ("PNG image", 64, 48)
    assert (found["prompt"], found["negative_prompt"]) == ("a cat,\nrain", "Steps: 3")
    assert found["settings"] == dict(said("out.png").settings)


def test_info_of_a_picture_that_says_nothing(here: Path) -> None:
    photo(here / "plain.png")
    result = run("info", "plain.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("fastldm: plain.png is a PNG file without the text 'parameters'")
    assert run("info", "nowhere.png").stderr == "fastldm: nowhere.png is missing\n"


def test_info_of_a_strangers_text_cannot_steer_the_terminal(here: Path) -> None:
    settings = {"Steps": "1", "Seed": "\x1b[2J", "Size": "8x8"}
    png.write(photo(here / "x.png"), Path("x.png"), png.Parameters("\x1b]0;taken\x07", "", settings), new=False)
    result = run("info", "x.png")
    assert "taken" in result.stdout
    assert "\x1b" not in result.stdout


# ------------------------------------------------------------------------------------------------------- the first word


def test_a_commands_name_as_a_prompt() -> None:
    assert run("paint", "info", *WORDS).stdout == "out.png\n"
    assert run("--seed", 1, *WORDS[:4], "info").stdout == "out-1.png\n"
    assert run("--", "-not an option-", *WORDS).exit_code == 2
    assert run(*WORDS, "--", "-not an option-").stdout == "out-2.png\n"
    assert [said(name).prompt for name in ("out.png", "out-1.png", "out-2.png")] == ["info", "info", "-not an option-"]


def test_an_empty_prompt_is_a_prompt() -> None:
    assert run("", *WORDS).stdout == "out.png\n"
    assert said("out.png").prompt == ""


@pytest.mark.parametrize(("word", "command"), [("samplres", "samplers"), ("infos", "info"), ("convrt", "convert")])
def test_a_mistyped_command_is_no_prompt(word: str, command: str) -> None:
    result = run(word)
    assert result.exit_code == 2
    assert f"There is no command '{word}', but '{command}'. To paint the word: fastldm paint {word}" in result.stderr
    assert os.listdir() == []


def test_a_word_that_is_no_command_is_a_prompt() -> None:
    assert run("saint", *WORDS).exit_code == 0


# --------------------------------------------------------------------------------------------------------------- errors


def failed(*words: object, **options: Any) -> str:
    before = sorted(os.listdir())
    result = run(*words, **options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("fastldm: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before
    return result.stderr.removeprefix("fastldm: ").rstrip("\n")


@pytest.mark.parametrize(
    "path", ["nope", "./nope", "nope.safetensors", "a/b/nope", "~nobody/nope", "../nope.ckpt", "a\nb"]
)
def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    refuse_models(monkeypatch)
    assert failed("a cat", "--model", path) == f"--model = {path}: there is no such file or folder".replace("\n", " ")


@pytest.mark.parametrize("path", ["owner/name", "https://hf.co/a/b/blob/main/c.ckpt", "https://x.org/c.ckpt"])
def test_a_model_that_may_be_elsewhere_is_asked_for(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    refuse_models(monkeypatch)
    result = run("a cat", "--model", path)
    assert isinstance(result.exception, AssertionError)


def test_arguments_that_a_message_names_are_options_here(model: Path) -> None:
    """The tiny model is none of the known sizes, so that a file of it does not say what it is."""
    assert run("convert", model, "tiny.safetensors").exit_code == 0
    assert "pass --config with a folder" in failed("a cat", "--model", "tiny.safetensors")


def test_how_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of it reaches the pipeline under its name, and none that is not given."""
    seen: list[dict[str, Any]] = []

    def stop(self: object, model: str, **given: Any) -> None:
        seen.append({"model": model, **given})
        raise fastldm.Error("read")

    monkeypatch.setattr(fastldm.Pipeline, "__init__", stop)
    Path("m").touch()
    names = [name for name in cli.LOADING if name != "extract_ema"]
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", f"the {name}")]
    assert failed("a cat", *words, "--extract-ema", "--model", "m", "--device", "cuda:1", "--dtype", "fp16") == "read"
    assert failed("a cat") == "read"
    given = {name: f"the {name}" for name in names}
    assert seen[0] == {**given, "extract_ema": True, "model": "m", "device": "cuda:1", "dtype": torch.float16}
    assert seen[1].keys() == {"model", "device", "dtype"}


def test_an_instruction(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that edits images has a guidance of its own for them."""
    monkeypatch.setitem(tiny_model.UNET, "in_channels", 8)
    monkeypatch.setitem(tiny_model.INDEX, "_class_name", "StableDiffusionInstructPix2PixPipeline")
    edits = tiny_model.write_tiny_model(here / "edits")
    start = photo(here / "start.png")
    found = painted("red", "--model", edits, "--image", "start.png", "--image-guidance", 2, "--steps", 2, "--seed", 1)
    call = {"image": start, "image_guidance_scale": 2.0, "num_inference_steps": 2, "seed": 1}
    assert same(found, fastldm.Pipeline(edits)("red", **call).images[0])
    assert said("out.png").settings["Image CFG scale"] == "2"
    assert "Denoising strength" not in said("out.png").settings


def test_the_option_goes_before_the_variable(model: Path) -> None:
    assert run("a cat", *WORDS, "--model", model, env={"FASTLDM_MODEL": "nowhere"}).exit_code == 0


ERRORS = {
    "size": (("--size", "60x48"), "--size: width = 60: must be a multiple of 8"),
    "height": (("--size", "64x3"), "--size: height = 3: must be"),
    "both sides": (("--size", "20x3"), "--size: height = 3: must be"),
    "a large size": (("--size", "99999x48"), "--size: width = 99999: must be"),
    "NaN": (("--guidance", "nan"), "--guidance = nan: must be"),
    "seed": (("--seed", 2**63), f"--seed = {2**63}: must be"),
    "strength": (("--strength", 0.5), "--strength: belongs to image_to_image and inpaint"),
    "image guidance": (("--image-guidance", 2), "--image-guidance: belongs to instruct"),
    "overlay": (("--overlay",), "--overlay: belongs to inpaint"),
    "mask": (("--mask", "start.png"), "image = None: a mask needs the image"),
    "clip skip": (("--clip-skip", 5), "--clip-skip = 5: must be"),
    "device": (("--device", "tpu"), "--device = 'tpu': must be"),
    "no such image": (("--image", "nowhere.png"), "--image = nowhere.png: cannot be read: No such file"),
    "an image that is none": (("--image", "x.txt"), "--image = x.txt: is no PNG, JPEG or WebP file"),
    "a GIF": (("--image", "x.gif"), "--image = x.gif: is no PNG, JPEG or WebP file"),
    "half an image": (("--image", "half.png"), "--image = half.png: is damaged: "),
    "a large image": (("--image", "large.png"), "--image = large.png: is 4097x8, over 4096 pixels a side"),
    "a bomb": (("--image", "bomb.png"), "--image = bomb.png: is over 4096 pixels a side"),
    "half a mask": (("--image", "start.png", "--mask", "half.png"), "--mask = half.png: is damaged: "),
    "another ending": (("-o", "x.jpg"), "-o = x.jpg: must end in .png"),
    "no folder": (("-o", "new dir/x.png"), "-o = new dir/x.png: cannot be written: the folder new dir is missing"),
    "a folder": (("-o", "folder.png"), "-o = folder.png: cannot be written: is a folder"),
    "in a file": (("-o", "x.txt/x.png"), "-o = x.txt/x.png: cannot be written: Not a directory"),
    "a long name": (("-o", "n" * 300 + ".png"), "cannot be written: File name too long"),
    "a prompt with half a character": (("--negative", "\ud800"), "--negative = "),
}


@pytest.mark.parametrize(("words", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_name_the_option(here: Path, words: tuple[object, ...], message: str) -> None:
    photo(here / "start.png")
    (here / "x.txt").write_text("text")
    (here / "folder.png").mkdir()
    PIL.Image.new("RGB", (8, 8)).save("x.gif")
    (here / "half.png").write_bytes((here / "start.png").read_bytes()[:-5000])
    PIL.Image.new("L", (4097, 8)).save("large.png")
    bomb = bytearray((here / "start.png").read_bytes())
    bomb[16:33] = rechecked(bomb[12:16], (30_000).to_bytes(4, "big") * 2 + bomb[24:29])
    (here / "bomb.png").write_bytes(bomb)
    assert message in failed("a cat", *WORDS, *words)


def rechecked(kind: bytes, data: bytes) -> bytes:
    return data + zlib.crc32(kind + data).to_bytes(4, "big")


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("fastldm.pipeline.Pipeline.__init__", refuse)


def test_what_can_be_refused_is_refused_before_the_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_models(monkeypatch)
    for words in (("-o", "nowhere/x.png"), ("-o", "x.jpg"), ("--image", "nowhere.png")):
        failed("a cat", *words)


USAGE: dict[str, tuple[object, ...]] = {
    "steps": ("a cat", "--steps", 0),
    "many steps": ("a cat", "--steps", 1001),
    "no number": ("a cat", "--guidance", "x"),
    "strength": ("a cat", "--strength", 1.5),
    "size": ("a cat", "--size", "512"),
    "size of three": ("a cat", "--size", "512x512x3"),
    "an unknown sampler": ("a cat", "--sampler", "euler_b"),
    "an unknown dtype": ("a cat", "--dtype", "int8"),
    "an unknown option": ("a cat", "--fast"),
    "no images": ("a cat", "--n", 0),
    "two prompts": ("a cat", "a dog"),
    "no prompt": ("--seed", 1),
    "a prompt and prompts": ("a cat", "--prompts", "x.txt"),
    "several of prompts": ("--prompts", "x.txt", "--n", 2),
    "overwrite one": ("a cat", "--overwrite"),
}


@pytest.mark.parametrize("words", USAGE.values(), ids=USAGE.keys())
def test_wrong_use_is_exit_code_2(words: tuple[object, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Usage: fastldm" in result.stderr
    assert os.listdir() == []


def test_a_sampler_that_is_nearly_right() -> None:
    assert "There is 'dpmpp_2m_karras'." in run("a cat", "--sampler", "dpmpp2m_karras").stderr


@pytest.mark.parametrize("label", ["DPM++ 2M Karras", "dpm++ 2m karras", "DPMPP_2M_KARRAS"])
def test_a_sampler_by_the_label_that_files_have(label: str) -> None:
    assert run("a cat", *WORDS, "--sampler", label).exit_code == 0
    assert said("out.png").settings["Sampler"] == "DPM++ 2M Karras"


def test_every_label_is_its_sampler() -> None:
    for name in fastldm.samplers():
        assert cli.SamplerName().convert(png.sampler_label(name).upper(), None, None) == name


def test_a_prompt_without_quotes() -> None:
    result = run("a", "red cat", "--steps", 2)
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Got unexpected extra argument (red cat): put the prompt in quotes.\n")
    result = run("a", "red", "cat", "--steps", 2)
    assert result.stderr.endswith("Error: Got unexpected extra arguments (red cat): put the prompt in quotes.\n")


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_karras", None])
def test_eta_is_said_where_it_has_an_effect(here: Path, model: Path, sampler: str | None) -> None:
    """Also where it is the model's own sampler, and it is painted again."""
    own = ("--model", shutil.copytree(model, here / "own"))
    index = here / "own/scheduler/scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "EulerDiscreteScheduler"}))
    (here / "x.txt").write_text("a cat")
    words = ("--prompts", "x.txt", "--size", "64x48", "--steps", 2, "--eta", 0.5)
    given = own if sampler is None else ("--sampler", sampler)
    for stdout in ("out/0001.png\n", ""):
        result = run(*words, *given)
        warned = f"fastldm: --eta has no effect with the sampler {sampler or 'euler'}\n"
        assert (result.exit_code, result.stdout, result.stderr) == (0, stdout, warned)
    assert "Eta" not in said("out/0001.png").settings
    for more in ((), ("--sampler", "ddim"), ("--sampler", "tcd")):
        result = run(*words, "-o", "".join(more) or "ddim", *more)
        assert (result.exit_code, result.stderr) == (0, "")
        assert said(result.stdout.strip()).settings["Eta"] == "0.5"


def test_which_samplers_use_eta(model: Path) -> None:
    base = fastldm.Pipeline(model).scheduler
    for name in fastldm.samplers():
        config = named(name, base)
        tables = [pickle.dumps(sampler_table(config, 4, eta=eta)) for eta in (0.0, 0.5)]
        assert (tables[0] != tables[1]) == (name in paint.USE_ETA), name


def test_every_option_of_an_argument_exists() -> None:
    known = {name for option in main.commands["paint"].params for name in option.opts}
    assert set(cli.OPTIONS.values()) <= known


def test_the_limits_are_the_pipelines() -> None:
    """Stated twice, so that they are known without torch."""
    assert (paint.MAX_PROMPT, paint.MAX_SIDE) == (arguments.MAX_PROMPT_BYTES, image.MAX_SIDE)
    limits: dict[str | None, Any] = {option.name: option.type for option in main.commands["paint"].params}
    assert limits["steps"].max == arguments.MAX_STEPS
    assert limits["guidance"].max == limits["image_guidance"].max == arguments.MAX_GUIDANCE


def test_the_defaults_in_the_help_are_the_pipelines() -> None:
    text = " ".join(run("--help").stdout.split())
    paints, changes, fills, edits = (
        DEFAULTS["sd", task] for task in ("text_to_image", "image_to_image", "inpaint", "instruct")
    )
    assert f"Default: {paints.steps}; {edits.steps} for instruct-pix2pix." in text
    assert f"Default: {changes.strength:g}; {fills.strength:g} with --mask." in text
    assert f"Default: {paints.guidance:g}." in text
    assert f"Default: {edits.image_guidance:g}." in text


def test_samplers() -> None:
    lines = dict(line.split(maxsplit=1) for line in run("samplers").stdout.splitlines())
    assert lines == fastldm.samplers()
    assert json.loads(run("samplers", "--json").stdout) == fastldm.samplers()


def test_help_shows_the_options_and_three_examples() -> None:
    text = run("--help").stdout
    assert text.count("\n  fastldm ") == 3
    assert run().output == text
    for words in ("fastldm [OPTIONS] PROMPT", "--sampler NAME", "--size WIDTHxHEIGHT", "completion", "FASTLDM_MODEL"):
        assert words in text
