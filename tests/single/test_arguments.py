"""Where a model comes from, said wrongly: an error of ours that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import fastldm
from tests import oracle
from tests.single.models import Sample

WRONG = [5, b"bytes", [], 2.5, object(), torch.nn.Linear(1, 1)]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("argument", ["model", "config", "original_config", "cache_dir"])
def test_what_is_no_path(sample: Callable[..., Sample], argument: str, value: Any) -> None:
    call = {"model": sample().file, "config": sample().folder} | {argument: value}
    with pytest.raises(fastldm.Error, match="must be a path") as caught:
        fastldm.Pipeline(call.pop("model"), **call)
    assert caught.value.field == argument


@pytest.mark.parametrize("argument", ["config", "vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("value", ["nowhere", "no where", "../nowhere", "a" * 5000, "a\0b", "/dev/null"])
def test_what_leads_nowhere_is_named(sample: Callable[..., Sample], argument: str, value: str) -> None:
    made = sample()
    call = {"config": made.folder} | {argument: value}
    with pytest.raises(fastldm.Error) as caught:
        fastldm.Pipeline(made.file, **call)
    assert value == "/dev/null" or caught.value.field == argument


@pytest.mark.parametrize("argument", ["model", "vae", "original_config"])
def test_a_path_that_no_file_can_have(sample: Callable[..., Sample], argument: str) -> None:
    call: dict[str, Any] = {"model": sample().file} | {argument: "a\0b.safetensors"}
    with pytest.raises(fastldm.Error, match=r"cannot be opened|pass config="):
        fastldm.Pipeline(call.pop("model"), **call)


def test_only_files_of_the_hub_are_fetched() -> None:
    with pytest.raises(fastldm.Error, match="only files of the hub") as caught:
        fastldm.Pipeline("https://example.com/model.safetensors")
    assert caught.value.field == "model"


def test_a_module_without_values_is_refused(sample: Callable[..., Sample]) -> None:
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(oracle.autoencoder().config)
    with pytest.raises(fastldm.Error, match="meta device"):
        sample().fast(vae=vae)
