"""`pipe.to(...)`: another dtype, another device, while calls run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastldm
from fastldm.runtime.build import moved
from fastldm.runtime.place import destination
from tests import oracle
from tests.pipeline import pairs
from tests.pipeline.pairs import paint

CALL = {"prompt": "the red cat", "num_inference_steps": 2, "output_type": "pt"}
CPU, HALF = torch.device("cpu"), torch.float16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.saved(oracle.stable_diffusion(), tmp_path_factory.mktemp("moving"))


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {}, (None, None)),
        (("cpu",), {}, (CPU, None)),
        ((torch.device("cpu"),), {}, (CPU, None)),
        ((HALF,), {}, (None, HALF)),
        (("cpu", HALF), {}, (CPU, HALF)),
        ((HALF, "cpu"), {}, (CPU, HALF)),
        ((), {"dtype": HALF, "device": "cpu"}, (CPU, HALF)),
        (("cpu",), {"dtype": HALF}, (CPU, HALF)),
        ((None, HALF), {}, (None, HALF)),
        ((HALF,), {"silence_dtype_warnings": True, "non_blocking": True}, (None, HALF)),
        ((), {"memory_format": torch.channels_last}, (None, None)),
    ],
)
def test_arguments_are_read_as_torch_and_diffusers_do(args: Any, kwargs: Any, expected: Any) -> None:
    assert destination(*args, **kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "field"),
    [
        (("nowhere",), {}, "device"),
        ((b"cpu",), {}, "device"),
        ((), {"non_blocking": "x"}, "non_blocking"),
        ((), {"copy": 1}, "copy"),
        ((), {"memory_format": np.zeros(2)}, "memory_format"),
        (("mps",), {}, "device"),
        (("cuda:99",), {}, "device"),
        ((3.5,), {}, "device"),
        ((torch.zeros(1),), {}, "device"),
        (("float16",), {}, "device"),
        ((torch.int8,), {}, "dtype"),
        ((), {"dtype": "float16"}, "dtype"),
        (("cpu", "cpu"), {}, "device"),
        ((HALF, HALF), {}, "dtype"),
        (("cpu",), {"device": "cpu"}, "device"),
        ((HALF,), {"dtype": torch.float32}, "dtype"),
        ((), {"memory_format": torch.contiguous_format}, "memory_format"),
        (("cpu",), {"dtpye": HALF}, "dtpye"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, args: Any, kwargs: Any, field: str) -> None:
    fast = fastldm.Pipeline(folder)
    with pytest.raises(fastldm.Error, match=field) as caught:
        fast.to(*args, **kwargs)
    assert caught.value.field == field
    assert fast.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_moved_pipeline_is_one_that_was_loaded_so(folder: Path, dtype: torch.dtype) -> None:
    fast = fastldm.Pipeline(folder)
    assert fast.to("cpu", dtype) is fast
    loaded = fastldm.Pipeline(folder, torch_dtype=dtype)
    assert fast.dtype == dtype
    for name in ("unet", "vae", "text_encoder"):
        mine, other = getattr(fast, name), getattr(loaded, name)
        assert mine.dtype == other.dtype
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
        assert [p.stride() for p in mine.parameters()] == [p.stride() for p in other.parameters()]
        assert mine.config == other.config
    assert torch.equal(paint(fast, **CALL), paint(loaded, **CALL))


def test_the_autoencoder_that_overflows_stays_in_float32(folder: Path) -> None:
    fast = fastldm.Pipeline(folder)
    assert fast.vae.config.force_upcast
    before = fast.vae.network
    fast.to(torch.float16)
    assert (fast.unet.dtype, fast.text_encoder.dtype, fast.vae.dtype) == (HALF, HALF, torch.float32)
    assert fast.vae.network is before
    fast.to(torch.bfloat16)
    assert fast.vae.dtype == torch.bfloat16


def test_nothing_to_change_changes_nothing(folder: Path) -> None:
    engine = fastldm.Pipeline(folder)._engine
    assert moved(engine) is engine
    assert moved(engine, torch.float32, CPU) is engine


def test_the_old_engine_is_left_as_it_was(folder: Path) -> None:
    fast = fastldm.Pipeline(folder)
    old, before = fast._engine, paint(fast, **CALL)
    unet = fast.unet
    fast.to(torch.bfloat16)
    assert old.unet.conv_in.weight.dtype == torch.float32
    assert unet.dtype == torch.bfloat16  # a view shows what runs now
    assert not torch.equal(paint(fast, **CALL), before)
    fast._engine = old
    assert torch.equal(paint(fast, **CALL), before)


def test_a_call_that_runs_goes_on_as_it_began(folder: Path) -> None:
    fast = fastldm.Pipeline(folder)
    expected = paint(fast, **CALL)
    found: list[Any] = []
    started, go = threading.Event(), threading.Event()

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        started.set()
        assert go.wait(30)
        return tensors

    caller = threading.Thread(target=lambda: found.append(paint(fast, callback_on_step_end=wait, **CALL)))
    caller.start()
    assert started.wait(30)
    fast.to(torch.bfloat16)
    go.set()
    caller.join(30)
    assert torch.equal(found[0], expected)


def test_a_value_that_half_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    ref = oracle.stable_diffusion()
    with torch.no_grad():
        ref.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight[1, 2] = 1e6
    fast = fastldm.Pipeline(oracle.saved(ref, tmp_path))
    with pytest.raises(
        fastldm.Error, match=r"attn1\.to_k\.weight reaches 1e\+06, too large for torch.float16"
    ) as caught:
        fast.to(torch.float16)
    assert caught.value.field == "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert fast.dtype == torch.float32
    paint(fast, **CALL)


def test_a_moved_pipeline_equals_a_moved_one_of_diffusers(folder: Path) -> None:
    """Widened from half precision, as people do to work on a CPU."""
    ref = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(torch.float32)
    ref.set_progress_bar_config(disable=True)
    fast = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16).to(torch.float32)
    call = {"prompt": "the red cat", "num_inference_steps": 4, "output_type": "latent"}
    assert oracle.relative_error(*pairs.Pair(ref, fast, folder).both(**call)) < 1e-4
