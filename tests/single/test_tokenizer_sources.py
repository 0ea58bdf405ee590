"""Where the tokenizer of a single file comes from: it is passed, in config=, in the hub's cache, or an error says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

import fastldm
from tests import oracle
from tests.single.models import CAT, Sample, image, painted, theirs

REVISION = "0123456789abcdef0123456789abcdef01234567"
ADVICE = (
    r"model\.safetensors: a single file has no tokenizer: pass tokenizer= with a folder that holds tokenizer\.json, or "
    r"vocab\.json and merges\.txt \(that of any Stable Diffusion in diffusers' layout, or of openai/clip-vit-large-"
    r"patch14\), or fetch the latter into the hub's cache once with `hf download openai/clip-vit-large-patch14 "
    r"tokenizer\.json tokenizer_config\.json`"
)


def bare(made: Sample, tmp_path: Path) -> Path:
    """The configurations without the tokenizer."""
    return Path(shutil.copytree(made.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer", "*.safet*")))


def old_layout(tokenizer: Path, out: Path) -> Path:
    """vocab.json and merges.txt, as transformers before 5 wrote them."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    out.mkdir(parents=True)
    (out / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    shutil.copy(tokenizer / "tokenizer_config.json", out)
    return out


def cached(tokenizer: Path, hub: Path, name: str = "models--openai--clip-vit-large-patch14") -> Path:
    """The hub's cache with these files, as huggingface_hub lays it out."""
    repo = hub / name
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(REVISION)
    for i, file in enumerate(sorted(tokenizer.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return hub


SOURCES: dict[str, Callable[[Path, Path], Any]] = {
    "the tokenizer's folder": lambda folder, tmp: folder / "tokenizer",
    "a string": lambda folder, tmp: str(folder / "tokenizer"),
    "the model's folder": lambda folder, tmp: folder,
    "the old layout": lambda folder, tmp: old_layout(folder / "tokenizer", tmp / "old"),
    "a model's folder in the old layout": lambda folder, tmp: (
        old_layout(folder / "tokenizer", tmp / "model/tokenizer").parent
    ),
    "tokenizer.json alone": lambda folder, tmp: Path(
        shutil.copytree(folder / "tokenizer", tmp / "new", ignore=shutil.ignore_patterns("*config*"))
    ),
    "of transformers": lambda folder, tmp: CLIPTokenizer.from_pretrained(folder / "tokenizer"),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_it_is_passed(sample: Callable[..., Sample], tmp_path: Path, source: Callable[[Path, Path], Any]) -> None:
    made = sample()
    pipe = fastldm.Pipeline(made.file, config=bare(made, tmp_path), tokenizer=source(made.folder, tmp_path))
    assert torch.equal(pipe._tokenizer([CAT]), expected(made))
    assert torch.equal(image(pipe), painted(made))


def expected(made: Sample) -> torch.Tensor:
    return made.ref.tokenizer([CAT], padding="max_length", max_length=77, return_tensors="pt").input_ids


@pytest.mark.parametrize("layout", ["old", "new"])
def test_the_tokenizer_of_a_folder_in_both_layouts(sample: Callable[..., Sample], tmp_path: Path, layout: str) -> None:
    made = sample()
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    if layout == "old":
        shutil.rmtree(folder / "tokenizer")
        old_layout(made.folder / "tokenizer", folder / "tokenizer")
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == (
        ["merges.txt", "tokenizer_config.json", "vocab.json"]
        if layout == "old"
        else ["tokenizer.json", "tokenizer_config.json"]
    )
    assert torch.equal(fastldm.Pipeline(folder)._tokenizer([CAT]), expected(made))
    assert torch.equal(image(fastldm.Pipeline(made.file, config=folder)), painted(made))


def other_tokenizer(out: Path) -> Path:
    """With one merge less: another prompt to the model."""
    oracle.tokenizer().save_pretrained(out)
    data = json.loads((out / "tokenizer.json").read_text())
    data["model"]["merges"].pop()
    (out / "tokenizer.json").write_text(json.dumps(data))
    return out


def test_what_is_passed_overrides(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    other = other_tokenizer(tmp_path / "other")
    for pipe in (made.fast(tokenizer=other), fastldm.Pipeline(made.folder, tokenizer=other)):
        assert not torch.equal(pipe._tokenizer([CAT]), expected(made))


@pytest.mark.parametrize("layout", ["old", "new"])
def test_it_is_in_the_hubs_cache(sample: Callable[..., Sample], tmp_path: Path, layout: str) -> None:
    made = sample()
    files = made.folder / "tokenizer"
    hub = cached(files if layout == "new" else old_layout(files, tmp_path / "old"), tmp_path / "hub")
    pipe = fastldm.Pipeline(made.file, config=bare(made, tmp_path), cache_dir=hub)
    assert torch.equal(pipe._tokenizer([CAT]), expected(made))
    assert torch.equal(image(pipe), painted(made))


def test_the_cache_is_where_the_hubs_client_has_it(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    cached(made.folder / "tokenizer", tmp_path / "home/hub")
    pipe = "fastldm.Pipeline(sys.argv[1], config=sys.argv[2])"
    code = f"import sys, fastldm; print(*{pipe}._tokenizer([{CAT!r}])[0].tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(made.file), str(bare(made, tmp_path))],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home/hub")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(number) for number in done.stdout.split()] == expected(made)[0].tolist()


def test_what_config_has_comes_before_the_cache(sample: Callable[..., Sample], tmp_path: Path) -> None:
    hub = cached(other_tokenizer(tmp_path / "other"), tmp_path / "hub")
    assert torch.equal(sample().fast(cache_dir=hub)._tokenizer([CAT]), expected(sample()))


def test_without_one_the_error_says_exactly_what_to_pass(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    with pytest.raises(fastldm.Error, match=f"{ADVICE}$") as caught:
        fastldm.Pipeline(made.file, config=bare(made, tmp_path), cache_dir=tmp_path / "hub")
    assert caught.value.field == "tokenizer"


def test_a_cache_with_other_files_has_none(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """Of the whole CLIP model, without its tokenizer."""
    made = sample()
    hub = cached(made.folder / "vae", tmp_path / "hub")
    with pytest.raises(fastldm.Error, match=ADVICE):
        fastldm.Pipeline(made.file, config=bare(made, tmp_path), cache_dir=hub)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (3, "must be a folder or a tokenizer of transformers, not int"),
        ("unet", "has neither tokenizer.json nor vocab.json"),
        ("./nowhere", "is neither a folder nor a model id"),
        ("model.safetensors", "not a folder"),
    ],
)
def test_what_is_no_tokenizer_is_refused(sample: Callable[..., Sample], value: Any, match: str) -> None:
    made = sample()
    places = {"unet": made.folder / "unet", "model.safetensors": made.file}
    value = places.get(value, value) if isinstance(value, str) else value
    for pipe in (made.fast, lambda **options: fastldm.Pipeline(made.folder, **options)):
        with pytest.raises(fastldm.Error, match=match):
            pipe(tokenizer=value)


# ----------------------------------------------------------------------------------------------- what fills the window


@pytest.mark.parametrize("way", ["a folder", "of transformers", "the hub's cache"])
def test_open_clip_is_filled_with_zeros(sample: Callable[..., Sample], tmp_path: Path, way: str) -> None:
    """Whatever CLIP's own tokenizer says."""
    made = sample("sd2")
    files = made.folder / "tokenizer"
    config = bare(made, tmp_path)
    if way == "the hub's cache":
        pipe = fastldm.Pipeline(made.file, config=config, cache_dir=cached(files, tmp_path / "hub"))
    else:
        tokenizer = files if way == "a folder" else CLIPTokenizer.from_pretrained(files)
        pipe = fastldm.Pipeline(made.file, config=config, tokenizer=tokenizer)
    ids, eos = pipe._tokenizer([CAT])[0], made.ref.tokenizer.eos_token_id
    length = int((ids == eos).nonzero()[0]) + 1
    assert torch.equal(ids[:length], expected(made)[0][:length])
    assert ids[length:].tolist() == [0] * (77 - length)


def test_clip_is_filled_as_its_tokenizer_says(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    pipe = fastldm.Pipeline(made.file, config=bare(made, tmp_path), tokenizer=made.folder)
    assert pipe._tokenizer([CAT])[0, -1] == made.ref.tokenizer.pad_token_id != 0


def test_the_tokenizer_of_config_is_taken_as_it_is(sample: Callable[..., Sample]) -> None:
    """As diffusers does: that of a model's folder knows its own text encoder."""
    made = sample("sd2")
    assert torch.equal(made.fast()._tokenizer([CAT]), expected(made))
    assert theirs(made.file, made.folder).tokenizer.pad_token_id == made.ref.tokenizer.pad_token_id
