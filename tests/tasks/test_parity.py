"""Image to image, inpainting and instruct-pix2pix give what diffusers' pipelines give, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch

from tests.pipeline.pairs import Pair
from tests.tasks.conftest import noise_picture

LATENTS, IMAGES = 2e-4, 2e-3
PROMPTS = ["the red cat", "a table"]


def errors(pair: Pair, **call: Any) -> tuple[float, float]:
    found = pair.errors(**call)
    return found["latents"], found["images"]


@pytest.mark.parametrize(("strength", "steps"), [(0.02, 50), (0.3, 10), (0.75, 7), (1.0, 5)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_to_image(
    task: Callable[[str], Pair], picture: PIL.Image.Image, strength: float, steps: int, eta: float
) -> None:
    call = {"image": picture, "strength": strength, "num_inference_steps": steps, "eta": eta}
    latents, images = errors(task("image_to_image"), prompt=PROMPTS[0], **call)
    assert latents <= LATENTS
    assert images <= IMAGES


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"num_images_per_prompt": 2}, id="two images"),
        pytest.param({"num_images_per_prompt": 2, "seed": [4, 5]}, id="a generator for each"),
        pytest.param({"prompt": PROMPTS, "negative_prompt": ["x", "y"]}, id="two prompts, one picture"),
        pytest.param({"prompt": PROMPTS, "image": [noise_picture(1), noise_picture(2)]}, id="two of both"),
    ],
)
def test_image_to_image_in_batches(task: Callable[[str], Pair], picture: PIL.Image.Image, call: dict[str, Any]) -> None:
    call = {"prompt": PROMPTS[0], "image": picture, "strength": 0.6, "num_inference_steps": 5, "eta": 0.5, **call}
    latents, images = errors(task("image_to_image"), **call)
    assert latents <= LATENTS
    assert images <= IMAGES


def test_the_default_strength_is_diffusers(task: Callable[[str], Pair], picture: PIL.Image.Image) -> None:
    call = {"prompt": PROMPTS[0], "image": picture, "num_inference_steps": 6}
    assert errors(task("image_to_image"), **call)[0] <= LATENTS


@pytest.mark.parametrize("name", ["inpaint", "inpaint_9"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="plain"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"eta": 1.0}, id="stochastic"),
        pytest.param({"eta": 1.0, "num_images_per_prompt": 2, "seed": [4, 5]}, id="a generator for each"),
        pytest.param({"prompt": PROMPTS}, id="two prompts"),
    ],
)
def test_inpainting(
    task: Callable[[str], Pair],
    picture: PIL.Image.Image,
    mask: PIL.Image.Image,
    name: str,
    strength: float,
    call: dict[str, Any],
) -> None:
    call = {"prompt": PROMPTS[0], "strength": strength, "num_inference_steps": 5, **call}
    call |= {"image": picture, "mask_image": mask, "height": picture.height, "width": picture.width}
    latents, images = errors(task(name), **call)
    assert latents <= LATENTS
    assert images <= IMAGES


def test_inpainting_resizes_to_height_and_width(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image
) -> None:
    call = {"image": picture, "mask_image": mask, "height": 24, "width": 24, "num_inference_steps": 2}
    assert errors(task("inpaint"), prompt=PROMPTS[0], **call)[0] <= LATENTS


def test_inpainting_with_masked_image_latents(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image
) -> None:
    given = torch.randn(1, 4, 16, 24)
    call = {"image": picture, "mask_image": mask, "height": 32, "width": 48, "num_inference_steps": 2}
    assert errors(task("inpaint_9"), prompt=PROMPTS[0], masked_image_latents=given, **call)[0] <= LATENTS


@pytest.mark.parametrize("guidance", [(7.5, 1.5), (3.0, 1.0), (1.0, 1.5), (3.0, 0.5)])
def test_instruct_pix2pix(task: Callable[[str], Pair], picture: PIL.Image.Image, guidance: tuple[float, float]) -> None:
    call = {"guidance_scale": guidance[0], "image_guidance_scale": guidance[1], "num_inference_steps": 4}
    latents, images = errors(task("instruct"), prompt=PROMPTS, image=picture, negative_prompt=["x", "y"], **call)
    assert latents <= LATENTS
    assert images <= IMAGES


@pytest.mark.parametrize("name", ["instruct", "inpaint_9"])
def test_models_that_see_the_picture_with_a_stochastic_sampler(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, name: str
) -> None:
    """Scaled inputs, noise in every step, two images of a prompt, a generator for each."""
    pair, kept = task(name), (task(name).ref.scheduler, task(name).fast.scheduler)
    extra = {"mask_image": mask, "height": 32, "width": 48} if name == "inpaint_9" else {}
    try:
        pair.ref.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pair.ref.scheduler.config)
        pair.fast.scheduler = pair.ref.scheduler
        call = {"num_images_per_prompt": 2, "seed": [4, 5], "num_inference_steps": 4, **extra}
        assert errors(pair, prompt=PROMPTS[0], image=picture, **call)[0] <= LATENTS
    finally:
        pair.ref.scheduler, pair.fast.scheduler = kept


@pytest.mark.parametrize("sampler", ["DPMSolverSDEScheduler", "IPNDMScheduler", "EDMEulerScheduler"])
def test_samplers_of_other_habits(task: Callable[[str], Pair], sampler: str) -> None:
    """Brownian noise from torchsde, a history of four, and another preconditioning."""
    pair, kind = task("image_to_image"), getattr(diffusers, sampler)
    extra = {"noise_sampler_seed": 0} if sampler == "DPMSolverSDEScheduler" else {}
    scheduler = kind.from_config(pair.ref.scheduler.config, **extra)
    text = diffusers.StableDiffusionPipeline(
        **{**pair.ref.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    text.set_progress_bar_config(disable=True)
    kept = pair.fast.scheduler
    try:
        pair.fast.scheduler = scheduler
        call = {"prompt": PROMPTS[0], "num_inference_steps": 6, "height": 16, "width": 24}
        assert errors(Pair(text, pair.fast, pair.folder), **call)[0] <= LATENTS
    finally:
        pair.fast.scheduler = kept


SAMPLERS = [
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_paints_what_diffusers_paints(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, sampler: str
) -> None:
    """Text to image, image to image and inpainting, through `pipe.scheduler = X.from_config(pipe.scheduler.config)`."""
    kind = getattr(diffusers, sampler)
    for name, extra in (
        ("image_to_image", {"image": picture, "strength": 0.75}),
        ("inpaint", {"image": picture, "mask_image": mask, "height": 32, "width": 48, "strength": 0.6}),
    ):
        pair = task(name)
        kept = pair.ref.scheduler, pair.fast.scheduler
        try:
            pair.fast.scheduler = kind.from_config(pair.fast.scheduler.config)
            pair.ref.scheduler = kind.from_config(pair.ref.scheduler.config)
            assert errors(pair, prompt=PROMPTS[0], num_inference_steps=6, **extra)[0] <= LATENTS
            if name == "image_to_image":
                text = diffusers.StableDiffusionPipeline(**pair.ref.components, requires_safety_checker=False)
                text.set_progress_bar_config(disable=True)
                both = Pair(text, pair.fast, pair.folder)
                call = {"prompt": PROMPTS[0], "num_inference_steps": 5, "height": 16, "width": 24}
                assert errors(both, **call)[0] <= LATENTS
        finally:
            pair.ref.scheduler, pair.fast.scheduler = kept
