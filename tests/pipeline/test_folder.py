"""From a folder: sharded, a variant, a safety checker, and an index that names what we do not have."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastldm
from tests.pipeline.pairs import Pair, paint

CALL = {"prompt": "the red cat", "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "a model with spaces"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sharded_folder_is_the_same_model(pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair().ref.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 2
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(paint(fastldm.Pipeline(tmp_path), **CALL), paint(pair().fast, **CALL))


def test_a_variant_is_read_where_it_is_asked_for(pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair().ref.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(paint(fastldm.Pipeline(tmp_path, variant="fp16"), **CALL), paint(pair().fast, **CALL))
    with pytest.raises(fastldm.Error, match="variant") as caught:
        fastldm.Pipeline(tmp_path)
    assert caught.value.field == "variant"


def test_from_pretrained_is_the_same_and_takes_a_string(pair: Callable[..., Pair], folder: Path) -> None:
    pipe = fastldm.Pipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    assert torch.equal(paint(pipe, **CALL), paint(pair().fast, **CALL))


def test_the_folder_may_go_after_loading(pair: Callable[..., Pair], copied: Path) -> None:
    pipe = fastldm.Pipeline(copied)
    shutil.rmtree(copied)
    assert torch.equal(paint(pipe, **CALL), paint(pair().fast, **CALL))


def test_old_tokenizer_files(pair: Callable[..., Pair], copied: Path) -> None:
    """transformers before 5 wrote vocab.json and merges.txt."""
    tokenizer = json.loads((copied / "tokenizer/tokenizer.json").read_text())["model"]
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    (copied / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"])
    (copied / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (copied / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    assert torch.equal(paint(fastldm.Pipeline(copied), **CALL), paint(pair().fast, **CALL))


def test_a_safety_checker_is_named_once_and_not_run(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(
        copied / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    with caplog.at_level(logging.WARNING):
        pipe = fastldm.Pipeline(copied)
        for _ in range(2):
            paint(pipe, **CALL)
    assert ["safety checker" in r.getMessage() for r in caplog.records] == [True]


def test_no_safety_checker_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fastldm.Pipeline(folder)
    assert not caplog.records


BAD_INDEXES = {
    "another pipeline": ({"_class_name": "StableDiffusion3Pipeline"}, "_class_name"),
    "no class": ({"_class_name": None}, "_class_name"),
    "a class that is a list": ({"_class_name": ["StableDiffusionPipeline"]}, "_class_name"),
    "an unknown component": ({"prior": ["diffusers", "PriorTransformer"]}, "prior"),
    "a second text encoder": ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
}


@pytest.mark.parametrize(("change", "field"), BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_an_index_that_we_do_not_serve_is_refused_by_name(copied: Path, change: dict[str, Any], field: str) -> None:
    edit(copied / "model_index.json", **change)
    with pytest.raises(fastldm.Error, match=field) as caught:
        fastldm.Pipeline(copied)
    assert caught.value.field == field


def test_an_unknown_component_that_is_off_is_no_matter(copied: Path) -> None:
    edit(copied / "model_index.json", prior=[None, None], image_encoder=[None, None])
    fastldm.Pipeline(copied)


BAD_CONFIGS = {
    "another U-Net": ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "_class_name"),
    "another VAE": ("vae/config.json", {"_class_name": "VQModel"}, "_class_name"),
    "another text encoder": ("text_encoder/config.json", {"model_type": "t5"}, "model_type"),
    "another scheduler": ("scheduler/scheduler_config.json", {"_class_name": "MyScheduler"}, "_class_name"),
    "text of another width": ("unet/config.json", {"cross_attention_dim": 25}, "cross_attention_dim"),
    "latents of another depth": ("unet/config.json", {"out_channels": 8}, "out_channels"),
    "fewer channels in than out": ("unet/config.json", {"in_channels": 3}, "in_channels"),
}


@pytest.mark.parametrize(("file", "change", "key"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configurations_that_we_do_not_serve_are_refused_by_name(
    copied: Path, file: str, change: dict[str, Any], key: str
) -> None:
    edit(copied / file, **change)
    with pytest.raises(fastldm.Error, match=key) as caught:
        fastldm.Pipeline(copied)
    assert key in str(caught.value.field)


MISSING = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(fastldm.Error, match=path.name.partition(".")[0]):
        fastldm.Pipeline(copied)


def test_no_such_folder() -> None:
    with pytest.raises(fastldm.Error, match="nowhere"):
        fastldm.Pipeline("./nowhere/at/all")
