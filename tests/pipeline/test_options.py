"""What is set on a Pipeline, and what it hands back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastldm
from fastldm.errors import ArgumentError
from tests.oracle import relative_error
from tests.pipeline.pairs import Pair, paint

CALL = {"prompt": "the red cat", "num_inference_steps": 2}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"torch_dtype": "bfloat16"}, "torch_dtype"),
        ({"torch_dtype": torch.int32}, "torch_dtype"),
        ({"torch_dtype": torch.complex64}, "torch_dtype"),
        ({"dtype": torch.float8_e4m3fn}, "dtype"),
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, "dtype"),
        ({"device": "nonsense"}, "device"),
        ({"device": "meta"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"device": 1.5}, "device"),
    ],
)
def test_a_bad_option_is_named_before_a_file_is_opened(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as error:
        fastldm.Pipeline(tmp_path / "absent", **options)
    assert error.value.field == field


def test_dtype_is_torch_dtype(folder: Path) -> None:
    assert fastldm.Pipeline(folder, dtype=torch.bfloat16)._engine.dtype == torch.bfloat16
    assert fastldm.Pipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)._engine.dtype == torch.bfloat16


@pytest.mark.parametrize(("force", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_an_autoencoder_that_overflows_float16_runs_in_float32(
    folder: Path, tmp_path: Path, force: bool, expected: torch.dtype
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps({**config, "force_upcast": force}))
    engine = fastldm.Pipeline(copy, torch_dtype=torch.float16)._engine
    assert engine.vae.decoder.conv_in.weight.dtype == expected
    assert engine.unet.conv_in.weight.dtype == torch.float16


def test_latents_are_the_callers_own(pair: Callable[..., Pair]) -> None:
    latents = paint(pair().fast, output_type="latent", **CALL)
    assert latents.untyped_storage().nbytes() == latents.nbytes


def test_tiling_is_diffusers_tiling(pair: Callable[..., Pair]) -> None:
    """48 pixels a side are more than the tile of 32."""
    both, call = pair(), {**CALL, "height": 48, "width": 40, "output_type": "pt"}
    plain = paint(both.fast, **call)
    both.fast.enable_vae_tiling()
    both.ref.vae.enable_tiling()
    try:
        tiled, theirs = paint(both.fast, **call), paint(both.ref, **call)
    finally:
        both.fast.disable_vae_tiling()
        both.ref.vae.disable_tiling()
    assert relative_error(tiled, theirs) <= 1e-4
    assert relative_error(tiled, plain) > 1e-3


def test_slicing_changes_nothing(pair: Callable[..., Pair]) -> None:
    fast, call = pair().fast, {**CALL, "num_images_per_prompt": 3, "output_type": "pt"}
    sliced = paint(fast, **call)
    fast.disable_vae_slicing()
    try:
        assert relative_error(paint(fast, **call), sliced) <= 1e-6
    finally:
        fast.enable_vae_slicing()


def test_a_progress_bar_on_a_terminal_only(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False), (None, None)):
        monkeypatch.setattr(sys, "stderr", stream)
        paint(pair().fast, **CALL)
        if stream is not None:
            assert ("0/2" in stream.getvalue()) is shown


@pytest.mark.parametrize(("scheduler", "strength"), [("euler", 0.5), ("euler", 0.75), ("ddpm", 0.5)])
def test_strength_is_a_share_of_the_callers_own_steps(
    pair: Callable[..., Pair], scheduler: str, strength: float
) -> None:
    import diffusers
    import numpy as np
    import PIL.Image

    both = pair()
    name = {"euler": diffusers.EulerDiscreteScheduler, "ddpm": diffusers.DDPMScheduler}[scheduler]
    own: dict[str, Any] = {"timesteps": [901, 700, 403, 102]}
    if scheduler == "euler":
        own = {"sigmas": [12.0, 5.0, 2.0, 0.6, 0.0]}
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    parts = {**both.ref.components, "scheduler": name.from_config(both.ref.scheduler.config)}
    parts.pop("image_encoder", None)
    ref = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    ref.set_progress_bar_config(disable=True)
    kept = both.fast.scheduler
    try:
        both.fast.scheduler = ref.scheduler
        call = {"prompt": "a cat", "image": picture, "strength": strength, "output_type": "latent", **own}
        assert relative_error(paint(both.fast, **call), paint(ref, **call)) <= 2e-4
    finally:
        both.fast.scheduler = kept


def test_a_sampler_that_lacks_its_package_says_so_before_any_work(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    fast = pair().fast
    kept = fast.scheduler
    monkeypatch.setitem(sys.modules, "torchsde", None)
    monkeypatch.setattr("fastldm.text.states", lambda *_: pytest.fail("the text was encoded"))
    fast.scheduler = "dpmpp_sde"
    try:
        with pytest.raises(ArgumentError, match="torchsde") as error:
            fast("a cat", num_inference_steps=3)
    finally:
        fast.scheduler = kept
    assert error.value.field == "scheduler"
