"""A seed means an image: the same one every time, alone or in a batch, whatever else runs."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.oracle import relative_error
from tests.pipeline.pairs import Pair, generators, paint

CALL = {"prompt": "the red cat", "num_inference_steps": 3, "height": 24, "width": 16, "output_type": "latent"}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_same_seed_gives_the_same_bits(pair: Callable[..., Pair], eta: float) -> None:
    first, second = (paint(pair().fast, seed=11, eta=eta, **CALL) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, paint(pair().fast, seed=12, eta=eta, **CALL))


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_image_k_of_a_batch_is_the_image_of_its_generator(pair: Callable[..., Pair], scheduler: str) -> None:
    fast, seeds = pair("sd2", scheduler).fast, [11, 12, 13]
    batch = paint(fast, seed=seeds, num_images_per_prompt=3, **CALL)
    for row, seed in zip(batch, seeds, strict=True):
        assert relative_error(row, paint(fast, seed=seed, **CALL)[0]) <= 1e-5


def test_noise_of_every_step_comes_from_the_images_own_generator(pair: Callable[..., Pair]) -> None:
    fast, seeds = pair().fast, [11, 12]
    batch = paint(fast, seed=seeds, num_images_per_prompt=2, eta=1.0, **CALL)
    for row, seed in zip(batch, seeds, strict=True):
        assert relative_error(row, paint(fast, seed=seed, eta=1.0, **CALL)[0]) <= 1e-5


def test_a_list_of_one_generator_is_that_generator(pair: Callable[..., Pair]) -> None:
    one, many = (paint(pair().fast, seed=s, num_images_per_prompt=2, **CALL) for s in (4, [4]))
    assert torch.equal(one, many)


def test_a_generator_goes_on_where_the_last_call_left_it(pair: Callable[..., Pair]) -> None:
    """Two calls with one generator differ, and equal diffusers' two calls."""
    both = pair()
    mine, theirs = generators(5), generators(5)
    for _ in range(2):
        a = both.fast(generator=mine, eta=1.0, **CALL).images
        b = both.ref(generator=theirs, eta=1.0, **CALL).images
        assert relative_error(a, b) <= 1e-4
    assert torch.equal(mine.get_state(), theirs.get_state())


def test_given_latents_are_the_first_noise(pair: Callable[..., Pair]) -> None:
    latents = torch.randn(2, 4, 12, 8)
    kept = latents.clone()
    for scheduler in ("ddim", "euler"):
        errors = pair("sd2", scheduler).errors(latents=latents, num_images_per_prompt=2, **without_type())
        assert max(errors.values()) <= 1e-4, errors
    assert torch.equal(latents, kept)


def test_given_latents_of_a_seed_give_the_seeds_image(pair: Callable[..., Pair]) -> None:
    latents = torch.randn(1, 4, 12, 8, generator=generators(9))
    assert torch.equal(paint(pair().fast, latents=latents, **CALL), paint(pair().fast, seed=9, **CALL))


def test_no_generator_draws_afresh_and_leaves_the_global_state_alone(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, second = (fast(eta=1.0, **CALL).images for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert not torch.equal(first, second)


def test_no_generator_does_not_depend_on_the_global_seed(pair: Callable[..., Pair]) -> None:
    images = []
    for _ in range(2):
        torch.manual_seed(0)
        images.append(pair().fast(**CALL).images)
    assert not torch.equal(*images)


def without_type() -> dict[str, object]:
    return {key: value for key, value in CALL.items() if key != "output_type"}
