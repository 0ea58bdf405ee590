"""Tiny pipelines of each task, and pictures to start from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest

from tests import oracle
from tests.pipeline import pairs
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
    return cache(lambda name: pairs.of_task(*CLASSES[name], oracle.SD1, tmp_path_factory.mktemp(name)))


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
