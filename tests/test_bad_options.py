"""Bad arguments of everything but a call: loading, moving, assigning, encoding. Each is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastldm
from fastldm.pipeline import Pipeline
from tests import oracle
from tests.test_request import NO_SAMPLER, Awkward, latents, nested


class PathOf:
    """A path-like object of anything."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __fspath__(self) -> Any:
        return self.value


NO_STRING: list[Any] = [1, True, 2.5, math.nan, b"x", [], ["a"], {}, (), object(), Awkward(), type, iter(["a"])]
NO_STRING += [np.ones(2), torch.ones(2), nested(2, 3)]
NO_PATH = [*NO_STRING, "\ud800", PathOf(b"x"), PathOf(3)]
NO_DTYPE = [*NO_STRING, "float16", "", float, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.device("cpu")]
NO_DEVICE: list[Any] = [*NO_STRING]
NO_DEVICE += ["", "gpu", "mps", "meta", "cpu:1"]
NO_DEVICE += [-1, 2**70, 10**5000, "cuda:-1", "cuda:4096", "cuda:9999999999999999999", "x" * 10**6, "\ud800", "cpu\0"]
NO_BOOL: list[Any] = [0, 1, "", "yes", 2.5, [], {}, object(), Awkward(), np.ones(2), torch.ones(2), torch.tensor(True)]
LOADING: dict[str, list[Any]] = {
    "torch_dtype": NO_DTYPE,
    "dtype": NO_DTYPE,
    "device": NO_DEVICE,
    "variant": [*NO_STRING, "../x", "a b", "x" * 10**6, "\ud800"],
    "revision": NO_STRING,
    "cache_dir": NO_PATH,
    "local_files_only": NO_BOOL,
    "token": [v for v in NO_STRING if v is not True],
    "config": NO_PATH,
    "original_config": NO_PATH,
    "prediction_type": [*NO_STRING, "", "sample_", "EPSILON"],
    "extract_ema": NO_BOOL,
    "use_safetensors": NO_BOOL,
    "unet": [*NO_PATH, "no/such/folder"],
    "vae": [*NO_PATH, "no/such/folder"],
    "text_encoder": [*NO_PATH, "no/such/folder"],
    "tokenizer": [*NO_PATH, "no/such/folder"],
    "scheduler": NO_SAMPLER,
    "hieght": [1, None],
    "safety_cheker": [None],
}
MOVING: dict[str, list[Any]] = {
    "device": NO_DEVICE,
    "dtype": NO_DTYPE,
    "memory_format": [*NO_STRING, torch.contiguous_format, torch.float16],
    "nope": [1],
}
ENCODING: dict[str, list[Any]] = {
    "prompt": [None, 7, b"a", [], [None], "x" * 65537, "\ud800", Awkward(), np.ones(2)],
    "negative_prompt": [7, b"a", [], [None], ["a", "b"], "x" * 65537, "\ud800", Awkward()],
    "num_images_per_prompt": [None, 0, -1, 17, 2.5, "1", True, np.ones(2)],
    "device": NO_DEVICE,
    "do_classifier_free_guidance": [None, *NO_BOOL],
    "prompt_embeds": [latents(1, 77, 24), 7, "x", nested(77, 24)],  # beside a prompt
    "negative_prompt_embeds": [7, "x", latents(1, 77, 25), latents(1, 76, 24), latents(1, 77, 24, value=math.nan)],
    "clip_skip": [-1, 3, 2.5, "1", True, np.ones(2)],
    "lora_scale": [1.0, "x"],
}


def cases(table: dict[str, list[Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flat = [(name, value) for name, values in table.items() for value in values]
    return pytest.mark.parametrize(("name", "value"), flat, ids=[f"{name}-{i}" for i, (name, _) in enumerate(flat)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.saved(oracle.stable_diffusion(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline(folder)


def refused(name: str, attempt: Callable[[], object]) -> None:
    with pytest.raises(fastldm.Error) as caught:
        attempt()
    assert str(caught.value.field).partition(":")[0] == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500


@cases(LOADING)
def test_a_bad_argument_of_loading_is_named(
    name: str, value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a network is built."""
    monkeypatch.setattr("fastldm.pipeline.engine_from", None)
    refused(name, lambda: Pipeline(folder, **{name: value}))


@pytest.mark.parametrize("value", [*NO_PATH, "\ud800.safetensors"], ids=range(len(NO_PATH) + 1))
def test_a_model_that_is_no_path_is_named(value: Any) -> None:
    for load in (Pipeline, Pipeline.from_pretrained, Pipeline.from_single_file):
        refused("model", lambda load=load: load(value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token", "hf_x"),
        ("token", True),
        ("local_files_only", True),
        ("cache_dir", "/x"),
        ("use_safetensors", True),
        ("variant", "fp16"),
    ],
)
def test_what_is_without_effect_on_components_in_memory_is_named(pipe: Pipeline, name: str, value: Any) -> None:
    refused(name, lambda: Pipeline(**pipe.components, **{name: value}))


def test_where_a_component_is_looked_for_may_be_said(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    parts = {**pipe.components, "vae": folder / "vae"}
    Pipeline(**parts, cache_dir=tmp_path, local_files_only=True, use_safetensors=True, token=False)


@pytest.mark.parametrize("value", [torch.float32, "x", 7, np.ones(2), torch.ones(2), Awkward()], ids=range(6))
def test_two_dtypes_at_odds_are_named(folder: Path, value: Any) -> None:
    refused("dtype", lambda: Pipeline(folder, torch_dtype=torch.float16, dtype=value))


@cases(MOVING)
def test_a_bad_argument_of_moving_is_named_and_nothing_moves(name: str, value: Any, pipe: Pipeline) -> None:
    refused(name, lambda: pipe.to(**{name: value}))
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("value", NO_SAMPLER, ids=range(len(NO_SAMPLER)))
def test_a_bad_sampler_is_named_and_the_old_one_stays(value: Any, pipe: Pipeline) -> None:
    before = pipe.scheduler
    refused("scheduler", lambda: setattr(pipe, "scheduler", value))
    assert pipe.scheduler is before


@cases(ENCODING)
def test_a_bad_argument_of_encoding_is_named(name: str, value: Any, pipe: Pipeline) -> None:
    refused(name, lambda: pipe.encode_prompt(**{"prompt": "a cat", name: value}))
