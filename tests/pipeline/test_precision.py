"""Half precision: as near to the truth as diffusers in the same dtype is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastldm
from tests.numerics import assert_within_twice
from tests.oracle import SD1, SD2, saved, stable_diffusion
from tests.pipeline.pairs import Pair, decoded, paint

CALL = {"prompt": ["the red cat", "a dog"], "num_inference_steps": 4, "height": 40, "width": 24, "seed": [1, 2]}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_bfloat16(
    pair: Callable[..., Pair], tmp_path_factory: pytest.TempPathFactory, model: str, guidance: float
) -> None:
    """Truth: the float32 run. Our state is float32 where diffusers' is bfloat16: its noise is brought there, too."""
    truth = paint(pair(model).ref, output_type="latent", guidance_scale=guidance, **CALL)
    kind = "epsilon" if model == "sd1" else "v_prediction"
    ref = stable_diffusion({"sd1": SD1, "sd2": SD2}[model], prediction_type=kind)
    saved(ref, folder := tmp_path_factory.mktemp("half"))
    fast = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)
    ref.to(dtype=torch.bfloat16)
    mine, theirs = (paint(p, output_type="latent", guidance_scale=guidance, **CALL) for p in (fast, ref))
    assert mine.dtype == torch.float32
    assert theirs.dtype == torch.bfloat16
    assert_within_twice(mine.bfloat16(), truth, theirs, rms=True)
    image = decoded(pair(model).ref, truth)
    assert_within_twice(decoded(fast, truth), image, decoded(ref, truth.bfloat16()), rms=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_output_type_in_every_dtype(folder: object, dtype: torch.dtype) -> None:
    fast = fastldm.Pipeline(folder, torch_dtype=dtype)
    call = {"prompt": "a cat", "num_inference_steps": 2, "height": 16, "width": 16}
    assert paint(fast, **call)[0].size == (16, 16)
    assert paint(fast, output_type="np", **call).dtype == "float32"
    assert paint(fast, output_type="pt", **call).dtype == (torch.float32 if dtype == torch.float16 else dtype)  # upcast
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert paint(fast, output_type="latent", **call).dtype == state
