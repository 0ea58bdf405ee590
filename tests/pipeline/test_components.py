"""Components: model_index.json names only what we have, and a pipeline is built from them without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastldm
from tests.pipeline.pairs import Pair, paint

CALL = {"prompt": "the red cat", "num_inference_steps": 2, "output_type": "pt"}
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("component", "classes"),
    [
        ("unet", ["diffusers", "UNet3DConditionModel"]),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"]),
        ("text_encoder", ["subprocess", "Popen"]),
        ("tokenizer", ["transformers", "T5Tokenizer"]),
        ("scheduler", ["diffusers", "CosineDPMSolverMultistepScheduler"]),
        ("unet", []),
        ("unet", [["x"]]),
    ],
)
def test_another_class_is_refused_by_name(folder: Path, tmp_path: Path, component: str, classes: list[object]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, component: classes}))
    with pytest.raises(fastldm.Error) as error:
        fastldm.Pipeline(copy)
    assert error.value.field == component


def test_a_pipeline_of_anothers_components_shares_them(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    second = fastldm.Pipeline(**fast.components)
    for name in NETWORKS:
        assert getattr(second, name).network is getattr(fast, name).network
    assert torch.equal(paint(second, **CALL), paint(fast, **CALL))
    second.scheduler = "euler"
    assert not torch.equal(paint(second, **CALL), paint(fast, **CALL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_their_dtype(folder: Path, dtype: torch.dtype) -> None:
    fast = fastldm.Pipeline(folder, torch_dtype=dtype)
    second = fastldm.Pipeline(**fast.components)
    assert [getattr(second, name).dtype for name in NETWORKS] == [getattr(fast, name).dtype for name in NETWORKS]
    assert torch.equal(paint(second, **CALL), paint(fast, **CALL))


def test_moving_one_of_two_that_share_leaves_the_other(folder: Path) -> None:
    fast = fastldm.Pipeline(folder)
    before = paint(fast, **CALL)
    second = fastldm.Pipeline(**fast.components).to(torch.bfloat16)
    assert second.dtype == torch.bfloat16
    assert fast.dtype == torch.float32
    assert torch.equal(paint(fast, **CALL), before)


def test_a_pipeline_of_diffusers_components(pair: Callable[..., Pair], folder: Path) -> None:
    made = pair()
    fast = fastldm.Pipeline(**made.ref.components)
    assert torch.equal(paint(fast, **CALL), paint(made.fast, **CALL))
    half = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    fast = fastldm.Pipeline(**half.components)
    assert fast.dtype == torch.bfloat16
    assert torch.equal(paint(fast, **CALL), paint(fastldm.Pipeline(folder, torch_dtype=torch.bfloat16), **CALL))
    assert fastldm.Pipeline(**half.components, torch_dtype=torch.float32).dtype == torch.float32


def test_a_pipeline_of_folders(pair: Callable[..., Pair], folder: Path) -> None:
    parts: dict[str, Any] = dict.fromkeys((*NETWORKS, "tokenizer"), folder)
    fast = fastldm.Pipeline(**parts, scheduler=pair().ref.scheduler)
    assert torch.equal(paint(fast, **CALL), paint(pair().fast, **CALL))


def test_a_pipeline_from_another(pair: Callable[..., Pair]) -> None:
    made = pair()
    for pipe in (made.ref, made.fast):
        assert torch.equal(paint(fastldm.Pipeline.from_pipe(pipe), **CALL), paint(made.fast, **CALL))


@pytest.mark.parametrize("name", [*NETWORKS, "tokenizer", "scheduler"])
def test_a_component_that_is_missing_is_named_with_what_it_may_be(pair: Callable[..., Pair], name: str) -> None:
    with pytest.raises(
        fastldm.Error, match=f"{name}: is missing, as there is no model: pass .*of another Pipeline"
    ) as e:
        fastldm.Pipeline(**{**pair().fast.components, name: None})
    assert e.value.field == name


def test_a_samplers_name_needs_a_model(pair: Callable[..., Pair]) -> None:
    with pytest.raises(fastldm.Error, match="there is no model") as caught:
        fastldm.Pipeline(**{**pair().fast.components, "scheduler": "euler"})
    assert caught.value.field == "scheduler"


@pytest.mark.parametrize("option", ["config", "variant", "revision", "prediction_type", "original_config"])
def test_what_belongs_to_a_model_is_refused_without_one(pair: Callable[..., Pair], option: str) -> None:
    with pytest.raises(fastldm.Error, match="is for a model, and none is given") as caught:
        fastldm.Pipeline(**pair().fast.components, **{option: "x"})
    assert caught.value.field == option
