"""Latents and images equal those of diffusers' StableDiffusionPipeline, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.pipeline.pairs import MODELS, SCHEDULERS, Pair

TOLERANCE = 1e-4
CAT, DOG = "the red cat", "a dog in the snow, oil on canvas"

# Each row changes one thing that the loop, the guidance or the batch must get right.
CALLS: dict[str, dict[str, Any]] = {
    "defaults but for the steps": {"prompt": CAT, "num_inference_steps": 4},
    "one step": {"prompt": CAT, "num_inference_steps": 1},
    "no guidance": {"prompt": CAT, "num_inference_steps": 3, "guidance_scale": 1.0},
    "guidance below 1 is none": {"prompt": CAT, "num_inference_steps": 2, "guidance_scale": 0.3},
    "much guidance": {"prompt": CAT, "num_inference_steps": 3, "guidance_scale": 20.0},
    "negative prompt": {"prompt": CAT, "num_inference_steps": 3, "negative_prompt": DOG},
    "list of prompts": {"prompt": [CAT, DOG], "num_inference_steps": 3},
    "list of negative prompts": {"prompt": [CAT, DOG], "num_inference_steps": 2, "negative_prompt": ["", CAT]},
    "several images a prompt": {"prompt": [CAT, DOG], "num_inference_steps": 2, "num_images_per_prompt": 3},
    "list of generators": {"prompt": [CAT, DOG], "num_inference_steps": 2, "seed": [7, 8]},
    "list of generators, several images": {
        "prompt": [CAT, DOG],
        "negative_prompt": [DOG, ""],
        "num_inference_steps": 2,
        "num_images_per_prompt": 2,
        "seed": [7, 8, 9, 10],
    },
    "rescale": {"prompt": [CAT, DOG], "num_inference_steps": 4, "guidance_rescale": 0.7},
    "full rescale of much guidance": {
        "prompt": CAT,
        "num_inference_steps": 3,
        "guidance_scale": 15.0,
        "guidance_rescale": 1.0,
    },
    "rescale without guidance": {
        "prompt": CAT,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "guidance_rescale": 0.7,
    },
    "wide": {"prompt": CAT, "num_inference_steps": 2, "height": 16, "width": 56},
    "tall, odd at the last level": {"prompt": CAT, "num_inference_steps": 2, "height": 40, "width": 24},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("model", MODELS)
def test_latents_and_images_equal_diffusers(
    pair: Callable[..., Pair], model: str, scheduler: str, call: dict[str, Any]
) -> None:
    errors = pair(model, scheduler).errors(**call)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("seed", [3, [5, 6]], ids=["one generator", "a list"])
@pytest.mark.parametrize("model", MODELS)
def test_ddim_draws_its_noise_in_the_same_order(
    pair: Callable[..., Pair], model: str, seed: int | list[int], eta: float
) -> None:
    errors = pair(model).errors(prompt=[CAT, DOG], num_inference_steps=4, eta=eta, seed=seed)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("steps", [2, 3, 7, 13, 49])
def test_any_number_of_steps(pair: Callable[..., Pair], steps: int) -> None:
    """Alternately by DDIM and Euler, over the three models; the other combinations run a few steps above."""
    models = list(MODELS)
    errors = pair(models[steps % 3], list(SCHEDULERS)[steps % 2]).errors(
        prompt=CAT, num_inference_steps=steps, height=16, width=16
    )
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(("model", "scheduler"), [("sd1", "euler"), ("uneven", "ddim")])
def test_fifty_steps_are_the_default(pair: Callable[..., Pair], model: str, scheduler: str) -> None:
    errors = pair(model, scheduler).errors(prompt=CAT, guidance_scale=5.0, height=16, width=16)
    assert max(errors.values()) <= TOLERANCE, errors


def test_the_oracle_notices_prompts_and_guidance(pair: Callable[..., Pair]) -> None:
    """The tests above would say nothing if the text did not reach the latents of these random models."""
    from tests.oracle import relative_error
    from tests.pipeline.pairs import paint

    for model in MODELS:
        fast = pair(model).fast
        call = {"num_inference_steps": 3, "output_type": "latent"}
        cat, dog = paint(fast, prompt=CAT, **call), paint(fast, prompt=DOG, **call)
        unguided = paint(fast, prompt=CAT, guidance_scale=1.0, **call)
        assert relative_error(cat, dog) > 0.01, model
        assert relative_error(cat, unguided) > 0.01, model
