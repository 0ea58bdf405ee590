"""`fastldm.info` tells what a file or folder is, what it lacks and what is wrong with it, and reads no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastldm
from fastldm.assemble import Asked
from fastldm.info import info
from fastldm.weights import files
from tests.single import models
from tests.single.models import KINDS, Sample, as_ckpt, converted, rewritten
from tests.single.narrow import narrow as make_narrow


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sample]:
    made: dict[str, Sample] = {}

    def get(kind: str) -> Sample:
        if kind not in made:
            made[kind] = models.sample(KINDS[kind], tmp_path_factory.mktemp("info"))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_narrow(tmp_path_factory.mktemp("narrow"))


def about(path: Path, **asked: Any) -> dict[str, Any]:
    """As a program gets it."""
    found = info(Asked(path, **asked))
    assert json.loads(json.dumps(found)) == found
    return found


def parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_file_without_a_configuration(narrow: Sample) -> None:
    found = about(narrow.file)
    tensors = load_file(narrow.file)
    assert found | {"components": None} == {
        "path": str(narrow.file),
        "layout": "original",
        "kind": None,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": {"float32": len(tensors)},
        "family": "Stable Diffusion 1.x",
        "task": "text-to-image",
        "pipeline": "StableDiffusionPipeline",
        "runs": True,
        "prediction_type": "epsilon",
        "averaged_weights": False,
        "missing": ["tokenizer"],
        "components": None,
        "problems": [],
    }
    assert found["components"]["unet"] == {
        "in_channels": 4,
        "block_out_channels": [32, 64],
        "layers_per_block": [1, 1],
        "cross_attention_dim": 768,
        "sample_size": 64,
        "parameters": parameters(narrow.ref.unet),
        "dtypes": {"float32": len(narrow.ref.unet.state_dict())},
    }
    assert found["components"]["vae"]["parameters"] == parameters(narrow.ref.vae)
    assert found["components"]["text_encoder"]["hidden_size"] == 768


TOLD = {
    "sd1": ("Stable Diffusion 1.x", "text-to-image", "StableDiffusionPipeline", "epsilon"),
    "sd1 v": ("Stable Diffusion 1.x", "text-to-image", "StableDiffusionPipeline", "v_prediction"),
    "sd2": ("Stable Diffusion 2.x", "text-to-image", "StableDiffusionPipeline", "v_prediction"),
    "sd2 epsilon": ("Stable Diffusion 2.x", "text-to-image", "StableDiffusionPipeline", "epsilon"),
    "inpainting": ("Stable Diffusion 1.x", "inpainting", "StableDiffusionInpaintPipeline", "epsilon"),
    "instruct": ("Stable Diffusion 1.x", "instruct-pix2pix", "StableDiffusionInstructPix2PixPipeline", "epsilon"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_family_task_and_prediction_type(sample: Callable[[str], Sample], kind: str) -> None:
    made = sample(kind)
    found = about(made.file, config=made.folder)
    assert tuple(found[key] for key in ("family", "task", "pipeline", "prediction_type")) == TOLD[kind]
    folder = about(made.folder)
    assert (folder["pipeline"], folder["prediction_type"]) == TOLD[kind][2:]
    for name in ("unet", "vae", "text_encoder"):
        assert folder["components"][name] == found["components"][name]
        assert folder["components"][name]["parameters"] == parameters(getattr(made.ref, name))


def test_a_folder(sample: Callable[[str], Sample]) -> None:
    made = sample("sd1")
    found = about(made.folder)
    assert found["layout"] == "diffusers"
    assert found["missing"] == found["problems"] == []
    assert found["runs"]
    assert list(found["components"]) == ["unet", "vae", "text_encoder"]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_what_a_folder_lacks(sample: Callable[[str], Sample], tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(sample("sd1").folder, tmp_path / "model"))
    shutil.rmtree(folder / part)
    assert about(folder)["missing"] == [part]


@pytest.mark.parametrize(("prefix", "part"), [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_what_a_file_lacks(narrow: Sample, tmp_path: Path, prefix: str, part: str) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    found = about(rewritten(narrow.file, tmp_path / "half.safetensors", drop))
    assert found["missing"] == [part, "tokenizer"]
    assert part not in found["components"]


def test_dtypes_are_counted(sample: Callable[[str], Sample], tmp_path: Path) -> None:
    made = sample("sd1")
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    found = about(converted(folder, tmp_path / "mixed.safetensors"), config=folder)
    assert list(found["dtypes"]) == ["float32", "float16"]
    assert found["components"]["vae"]["dtypes"] == {"float16": len(made.ref.vae.state_dict())}
    assert about(folder)["components"]["vae"]["dtypes"] == {"float16": len(made.ref.vae.state_dict())}


def test_a_pickle(narrow: Sample, tmp_path: Path) -> None:
    found, safe = about(as_ckpt(narrow.file, tmp_path / "model.ckpt")), about(narrow.file)
    assert {**found, "path": None} == {**safe, "path": None}


def test_averaged_weights_are_told(narrow: Sample, tmp_path: Path) -> None:
    def average(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name].clone()

    assert about(rewritten(narrow.file, tmp_path / "ema.safetensors", average))["averaged_weights"]


KIND = {
    "a LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "a LoRA: an addition to a model"),
    "a word": ({"emb_params": (2, 768)}, "a textual inversion"),
    "a VAE": ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "an autoencoder alone: pass it as vae="),
    "nothing known": ({"x": (2,), "y": (3,)}, "nothing that fastldm knows: 2 tensors, such as 'x', 'y'"),
}


@pytest.mark.parametrize(("shapes", "kind"), KIND.values(), ids=KIND.keys())
def test_other_files_are_described_by_what_they_are(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str
) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "other.safetensors")
    found = about(tmp_path / "other.safetensors")
    assert found["kind"].startswith(kind)
    assert found["layout"] is None
    assert found["tensors"] == len(shapes)
    assert "components" not in found


def test_what_is_wrong_with_a_model_is_said(narrow: Sample, tmp_path: Path) -> None:
    name = "model.diffusion_model.out.2.bias"
    file = rewritten(narrow.file, tmp_path / "damaged.safetensors", lambda tensors: tensors.pop(name))
    found = about(file)
    assert len(found["problems"]) == 1
    assert name in found["problems"][0]
    assert list(found["components"]) == ["unet", "vae", "text_encoder"]


def test_a_configuration_that_we_do_not_serve_is_a_problem(sample: Callable[[str], Sample], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sample("sd1").folder, tmp_path / "model"))
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dual_cross_attention": True}))
    found = about(folder)
    assert ["dual_cross_attention" in problem for problem in found["problems"]] == [True]
    assert "parameters" not in found["components"]["unet"]
    assert found["components"]["vae"]["parameters"]


@pytest.mark.parametrize("content", [b"", b"{}", b"not a model at all", b"\x00" * 100])
def test_what_is_no_file_of_tensors_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(fastldm.Error, match=r"x\.safetensors"):
        info(Asked(tmp_path / "x.safetensors"))


def test_a_file_of_unusual_dimensions_asks_for_config(sample: Callable[[str], Sample]) -> None:
    (problem,) = info(Asked(sample("sd1").file))["problems"]
    assert "pass config=" in problem


def test_no_weights_are_read(narrow: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it takes no time, whatever the size."""

    def refuse(self: Any, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(files.TensorFiles, "read", refuse)
    about(narrow.file)
    about(narrow.folder)
