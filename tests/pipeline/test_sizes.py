"""Sizes, at the real factor 8: what a size does to the levels of the U-Net stands in each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.oracle import relative_error
from tests.pipeline.pairs import Pair, paint

SIZES = {
    (128, 128): "even at every level",
    (104, 72): "13×9 latents: odd at the first level, then 7×5, odd, then 4×3",
    (64, 160): "wide: height and width must not be exchanged",
    (200, 8): "a single column",
    (8, 8): "one latent pixel: nothing is left to downsample",
    (48, 80): "6×10, then 3×5: odd at the second level only",
}


@pytest.mark.parametrize(("height", "width"), SIZES, ids=[f"{h}x{w}" for h, w in SIZES])
@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_latents_and_images_equal_diffusers(pair: Callable[..., Pair], model: str, height: int, width: int) -> None:
    errors = pair(model, levels=4).errors(
        prompt="the cat", num_inference_steps=2, height=height, width=width, negative_prompt="red"
    )
    assert max(errors.values()) <= 1e-4, errors


def test_the_size_of_520(pair: Callable[..., Pair]) -> None:
    """65×65 latents, then 33, then 17."""
    errors = pair("sd1", levels=4).errors(prompt="the cat", num_inference_steps=2, height=520, width=520)
    assert max(errors.values()) <= 1e-4, errors


def test_the_default_size_is_the_models(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair("sd1", levels=4).both(prompt="a cat", num_inference_steps=1, output_type="np")
    assert mine.shape == theirs.shape == (1, 128, 128, 3)


def test_one_given_side_leaves_the_other_at_its_default(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    image = paint(fast, prompt="a cat", num_inference_steps=1, width=20)[0]
    assert image.size == (20, 32)


def test_sizes_follow_each_other_without_a_trace(pair: Callable[..., Pair]) -> None:
    """A call's result does not depend on the sizes that were painted before it."""
    fast = pair().fast
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    first = paint(fast, height=32, width=24, **call)
    paint(fast, height=48, width=64, num_images_per_prompt=2, **call)
    assert torch.equal(first, paint(fast, height=32, width=24, **call))
    assert relative_error(first, paint(fast, height=32, width=24, **call | {"prompt": "dog"})) > 0
