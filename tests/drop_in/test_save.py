"""`pipe.save_pretrained(...)`: diffusers and fastldm read what runs; the whole is there or nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastldm
from tests import oracle
from tests.oracle import relative_error
from tests.pipeline import pairs
from tests.single import disk, models
from tests.single.models import ANOTHER, KINDS, Sample, assert_same, image, weights
from tests.test_bad_options import PathOf

PROMPTS = ["the red cat", "", "a photo of <|endoftext|> cats, 3 of them", "Ünïcode 猫  and\nlines", "cat " * 90]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    kinds = {"sd1": KINDS["sd1"], "sd2": KINDS["sd2"], "another": ANOTHER}
    return {name: models.sample(kind, tmp_path_factory.mktemp("save")) for name, kind in kinds.items()}


def handed(made: Sample, **options: Any) -> fastldm.Pipeline:
    parts = {name: value for name, value in made.ref.components.items() if value is not None}
    return fastldm.Pipeline(**parts, **options)


SOURCES = {
    "a folder": lambda made, **options: fastldm.Pipeline(made.folder, **options),
    "a single file": lambda made, **options: made.fast(**options),
    "modules of diffusers": handed,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_what_is_saved_is_what_ran(samples: dict[str, Sample], tmp_path: Path, kind: str, source: str) -> None:
    made = samples[kind]
    fast = SOURCES[source](made)
    fast.save_pretrained(tmp_path / "out")
    again = fastldm.Pipeline(tmp_path / "out")
    assert_same(weights(again), weights(fast))
    assert torch.equal(image(again), image(fast))
    assert torch.equal(again._tokenizer(PROMPTS), fast._tokenizer(PROMPTS))
    assert again.scheduler == fast.scheduler
    for name in ("unet", "vae", "text_encoder"):
        mine, before = (json.dumps(getattr(pipe, name).config, sort_keys=True) for pipe in (again, fast))
        assert mine == before
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    assert_same(weights(theirs), weights(made.ref))
    call = {"output_type": "latent"}
    assert relative_error(image(theirs, **call), image(fast, **call)) < 1e-4


def test_the_files_are_those_that_diffusers_writes(samples: dict[str, Sample], tmp_path: Path) -> None:
    """The same names and tensors, but more of the tokenizer's files: older versions read the older ones."""
    made = samples["sd1"]
    fastldm.Pipeline(made.folder).save_pretrained(tmp_path / "out")
    mine, theirs = ({str(p.relative_to(f)) for p in f.rglob("*")} for f in (tmp_path / "out", made.folder))
    old = {"vocab.json", "merges.txt", "special_tokens_map.json"}
    assert mine == theirs | {f"tokenizer/{name}" for name in old}
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        a, b = (load_file(folder / f"{file}.safetensors") for folder in (tmp_path / "out", made.folder))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)
    text = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in text)  # which all versions of transformers read


@pytest.mark.parametrize(
    ("kind", "name"),
    [("inpainting", "StableDiffusionInpaintPipeline"), ("instruct", "StableDiffusionInstructPix2PixPipeline")],
)
def test_other_tasks_are_saved_as_what_they_are(tmp_path: Path, kind: str, name: str) -> None:
    made = models.sample(KINDS[kind], tmp_path)
    fastldm.Pipeline(made.folder).save_pretrained(tmp_path / "out")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ == name
    assert_same(weights(fastldm.Pipeline(tmp_path / "out")), weights(made.ref))


@pytest.mark.parametrize("files", ["all", "the new one", "the old ones"])
def test_a_tokenizer_is_read_from_either_kind_of_its_files(
    samples: dict[str, Sample], tmp_path: Path, files: str
) -> None:
    """With zeros in the window, as OpenCLIP has them, and with words that were added."""
    made = samples["sd2"]
    tokenizer = oracle.tokenizer()
    tokenizer.add_tokens(["<frog>", "Two Words"])
    encoder = made.ref.text_encoder
    larger = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**{**encoder.config.to_dict(), "vocab_size": len(tokenizer)})
    )
    fast = fastldm.Pipeline(made.file, config=made.folder, tokenizer=tokenizer, text_encoder=larger)
    fast.save_pretrained(tmp_path / "out")
    dropped = {"the new one": ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")}
    dropped["the old ones"] = ("tokenizer.json",)
    for name in dropped.get(files, ()):
        (tmp_path / "out/tokenizer" / name).unlink()
    prompts = [*PROMPTS, "a <frog> and two words, Two Words"]
    expected = fast._tokenizer(prompts)
    assert expected[1, -1] == 0
    assert (expected == len(tokenizer) - 1).any()
    assert torch.equal(fastldm.Pipeline(tmp_path / "out")._tokenizer(prompts), expected)
    if files != "the old ones":  # those are of versions that are not here
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out/tokenizer")
        ids = theirs(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, expected)


def test_what_was_set_is_saved(samples: dict[str, Sample], tmp_path: Path) -> None:
    fast = fastldm.Pipeline(samples["sd1"].folder)
    fast.scheduler = "dpmpp_2m_karras"
    fast.save_pretrained(str(tmp_path / "out"))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(theirs.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert theirs.scheduler.config.use_karras_sigmas
    assert fastldm.Pipeline(tmp_path / "out").scheduler == fast.scheduler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_network_in_its_dtype(samples: dict[str, Sample], tmp_path: Path, dtype: torch.dtype) -> None:
    fast = fastldm.Pipeline(samples["sd1"].folder, torch_dtype=dtype)
    fast.save_pretrained(tmp_path / "out", variant="fp16")
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, stem in names.items():
        found = {t.dtype for t in load_file(tmp_path / "out" / name / f"{stem}.fp16.safetensors").values()}
        assert found == {torch.float32 if (name, dtype) == ("vae", torch.float16) else dtype}
    again = fastldm.Pipeline(tmp_path / "out", variant="fp16", torch_dtype=dtype)
    assert_same(weights(again), weights(fast))
    said = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert said.get("dtype", said.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=dtype)
    assert theirs.text_encoder.dtype == dtype


def test_components_of_different_pipelines(samples: dict[str, Sample], tmp_path: Path) -> None:
    first, second = (fastldm.Pipeline(samples[name].folder) for name in ("sd1", "another"))
    mixed = fastldm.Pipeline(**{**first.components, "vae": second.vae})
    mixed.save_pretrained(tmp_path / "out")
    assert torch.equal(image(fastldm.Pipeline(tmp_path / "out")), image(mixed))


# ------------------------------------------------------------------------------------------- all of it, or nothing


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> fastldm.Pipeline:
    return pairs.make(tmp_path_factory.mktemp("model")).fast


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"safe_serialization": False}, "no pickles are written"),
        ({"push_to_hub": True}, "upload the folder with huggingface_hub"),
        ({"variant": "../x"}, "a plain word"),
        ({"variant": 16}, "a plain word"),
        ({"max_shard_size": "10KB"}, "one file, and the largest has"),
        ({"max_shard_size": 10}, "one file, and the largest has"),
        ({"max_shard_size": "much"}, "a number of bytes"),
        ({"max_shard_size": True}, "a number of bytes"),
        ({"max_shard_size": -1}, "a number of bytes"),
        ({"max_shard_size": math.nan}, "a number of bytes"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    fast: fastldm.Pipeline, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(fastldm.Error, match=words) as caught:
        fast.save_pretrained(tmp_path / "out", **options)
    assert caught.value.field in options
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("size", ["10GB", "2.5 MiB", "3tb", 10**9])
def test_a_size_that_no_network_reaches_is_accepted(fast: fastldm.Pipeline, tmp_path: Path, size: Any) -> None:
    fast.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert fastldm.Pipeline(tmp_path / "out").unet.config == fast.unet.config


@pytest.mark.parametrize("there", ["a folder with a file", "a file", "a dead link"])
def test_what_is_there_is_kept(fast: fastldm.Pipeline, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "a folder with a file":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif there == "a file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(fastldm.Error, match=rf"{out} exists, and is no empty folder") as caught:
        fast.save_pretrained(out)
    assert caught.value.field == "save_directory"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled_and_a_missing_one_is_made(fast: fastldm.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new/and deep/out"):
        fast.save_pretrained(out)
        assert fastldm.Pipeline(out).unet.config == fast.unet.config
        assert not [name for name in os.listdir(out.parent) if name.startswith(".")]


@pytest.mark.parametrize("path", [None, 3, "", "a\0b", ["x"], b"x", "\ud800", PathOf(b"x"), PathOf(3)])
def test_what_is_no_path_is_refused(fast: fastldm.Pipeline, path: Any) -> None:
    with pytest.raises(fastldm.Error, match="must be the path of a folder") as caught:
        fast.save_pretrained(path)
    assert caught.value.field == "save_directory"


@pytest.mark.parametrize("room", [0, 1, 7, 40])
def test_a_full_disk_leaves_nothing(
    fast: fastldm.Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    disk.with_room(monkeypatch, room)
    with pytest.raises(fastldm.Error, match="No space left") as caught:
        fast.save_pretrained(tmp_path / "out")
    assert caught.value.field == "save_directory"
    assert not os.listdir(tmp_path)


def test_a_place_that_is_no_folder(fast: fastldm.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fastldm.Error, match="cannot be written") as caught:
        fast.save_pretrained(tmp_path / "file/out")
    assert caught.value.field == "save_directory"
