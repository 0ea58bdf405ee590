"""What a call returns, of each output type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch

from fastldm.errors import NonFiniteError
from tests.pipeline.pairs import Pair, generators, paint

CALL = {"prompt": ["a cat", "the dog"], "num_inference_steps": 2, "height": 24, "width": 40}


def test_pil(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair().both(**CALL)
    assert isinstance(mine, list)
    assert [(type(i), i.mode, i.size) for i in mine] == [(PIL.Image.Image, "RGB", (40, 24))] * 2
    for a, b in zip(mine, theirs, strict=True):
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
        assert difference.max() <= 1, "a last bit may round the other way"
        assert (difference > 0).mean() < 0.01


def test_np(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair().both(output_type="np", **CALL)
    assert isinstance(mine, np.ndarray)
    assert mine.dtype == theirs.dtype == np.float32
    assert mine.shape == theirs.shape == (2, 24, 40, 3)
    assert mine.min() >= 0
    assert mine.max() <= 1
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_pt(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair().both(output_type="pt", **CALL)
    assert isinstance(mine, torch.Tensor)
    assert mine.shape == (2, 3, 24, 40)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_latent(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair().both(output_type="latent", **CALL)
    assert mine.shape == theirs.shape == (2, 4, 12, 20)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_latents_of_one_call_are_not_written_by_the_next(pair: Callable[..., Pair]) -> None:
    first = paint(pair().fast, output_type="latent", **CALL)
    kept = first.clone()
    paint(pair().fast, output_type="latent", seed=99, **CALL)
    assert torch.equal(first, kept)


def test_a_call_builds_no_graph(pair: Callable[..., Pair]) -> None:
    with torch.enable_grad():
        assert not paint(pair().fast, output_type="pt", **CALL).requires_grad


def test_a_call_within_inference_mode(pair: Callable[..., Pair]) -> None:
    outside = paint(pair().fast, output_type="pt", **CALL)
    with torch.inference_mode():
        assert torch.equal(outside, paint(pair().fast, output_type="pt", **CALL))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_what_is_not_finite_is_an_error_and_never_a_black_picture(pair: Callable[..., Pair], part: str) -> None:
    fast = pair().fast
    engine = fast._engine
    weight = (engine.unet.conv_out if part == "unet" else engine.vae.decoder.conv_out).bias
    kept = weight.clone()
    try:
        weight[0] = torch.inf
        with pytest.raises(NonFiniteError) as caught:
            fast(generator=generators(0), **CALL)
    finally:
        weight.copy_(kept)
    assert caught.value.field == {"unet": "latents", "vae": "image"}[part]
    assert paint(fast, **CALL)
