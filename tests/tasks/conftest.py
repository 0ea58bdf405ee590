"""Tiny pipelines of each task, and pictures to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import fastldm
from tests import oracle
from tests.pipeline.pairs import Pair

WIDTH, HEIGHT = 48, 32
CLASSES = {
    "image_to_image": (4, diffusers.StableDiffusionImg2ImgPipeline),
    "inpaint": (4, diffusers.StableDiffusionInpaintPipeline),
    "inpaint_9": (9, diffusers.StableDiffusionInpaintPipeline),
    "instruct": (8, diffusers.StableDiffusionInstructPix2PixPipeline),
}


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """task(name): diffusers' pipeline of that task and ours, from one folder, made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            channels, kind = CLASSES[name]
            parts = dict(oracle.stable_diffusion().components)
            parts.pop("image_encoder")
            torch.manual_seed(1)
            parts["unet"] = diffusers.UNet2DConditionModel(
                in_channels=channels, out_channels=4, cross_attention_dim=24, sample_size=16, **oracle.SD1
            )
            ref = kind(**parts, requires_safety_checker=False)
            folder = oracle.saved(ref, tmp_path_factory.mktemp(name))
            ref = kind.from_pretrained(folder, safety_checker=None)  # so that both read the same scheduler_config.json
            ref.set_progress_bar_config(disable=True)
            made[name] = Pair(ref, fastldm.Pipeline(folder), folder)
        return made[name]

    return get


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    return noise_picture(0)


@pytest.fixture(scope="session")
def mask() -> PIL.Image.Image:
    """White, with soft edges, in a rectangle off the middle."""
    array = np.zeros((HEIGHT, WIDTH), np.uint8)
    array[7:21, 9:31] = 90
    array[8:20, 10:30] = 255
    return PIL.Image.fromarray(array)


def noise_picture(seed: int) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def shown(images: Any) -> Any:
    """PIL images as one array of floats."""
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])
