"""Pictures as people hand them over: every mode, kind and range, or an error that names the argument."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from fastldm.errors import ArgumentError
from fastldm.image import read_images

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGB = PIL.Image.fromarray(BYTES)
UNIT = BYTES.astype(np.float32) / 255


def read(value: object, channels: int = 3) -> torch.Tensor:
    return read_images(value, "image", channels=channels)[0]


@pytest.mark.parametrize(
    "value",
    [
        RGB,
        [RGB],
        BYTES,
        UNIT,
        UNIT.astype(np.float64),
        UNIT[None],
        torch.from_numpy(UNIT).permute(2, 0, 1),
        torch.from_numpy(UNIT).permute(2, 0, 1)[None],
        torch.from_numpy(BYTES).permute(2, 0, 1),
    ],
    ids=["pil", "list", "uint8", "float32", "float64", "batch", "tensor", "tensor batch", "uint8 tensor"],
)
def test_every_kind_is_the_same_picture(value: object) -> None:
    assert torch.equal(read(value), torch.from_numpy(UNIT).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pil_becomes_three_channels(mode: str) -> None:
    image = PIL.Image.new("LAB", (5, 6), (128, 100, 90)) if mode == "LAB" else RGB.convert(mode)
    picture = read(image)
    assert picture.shape == (3, 6, 5)
    assert torch.equal(picture, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_keep_their_precision(mode: str) -> None:
    values = np.array([[0, 1, 256], [1000, 40000, 65535]], np.uint16 if mode == "I;16" else np.int32)
    image = PIL.Image.fromarray(values)
    assert image.mode == mode
    assert torch.allclose(read(image)[1], torch.from_numpy(values.astype(np.float32)) / 65535, atol=1e-7)


def test_colours_become_a_mask_by_luma() -> None:
    assert torch.allclose(
        read(UNIT, channels=1)[0], torch.from_numpy(UNIT @ np.array([0.299, 0.587, 0.114], np.float32)), atol=1e-6
    )
    assert read(RGB, channels=1).shape == (1, 6, 5)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(UNIT * 255, id="floats to 255"),
        pytest.param(UNIT * 2 - 1, id="floats from -1"),
        pytest.param(np.full((4, 4, 3), np.nan, np.float32), id="NaN"),
        pytest.param(BYTES.astype(np.int32), id="int32"),
        pytest.param(np.zeros((4, 4, 4), np.float32), id="four channels"),
        pytest.param(torch.zeros(1, 4, 8, 8), id="latents"),
        pytest.param(np.zeros((0, 4, 3), np.float32), id="empty"),
        pytest.param(np.zeros((2, 2, 2, 2, 3), np.float32), id="five dimensions"),
        pytest.param(torch.zeros(3), id="one dimension"),
        pytest.param(PIL.Image.new("F", (4, 4)), id="mode F"),
        pytest.param([], id="empty list"),
        pytest.param([RGB, RGB.resize((8, 8))], id="two sizes"),
        pytest.param("cat.png", id="a path"),
        pytest.param(None, id="nothing"),
        pytest.param(np.array(["a"]), id="strings"),
    ],
)
def test_what_is_no_picture_is_named(value: object) -> None:
    with pytest.raises(ArgumentError) as error:
        read_images(value, "mask_image", channels=3)
    assert error.value.field == "mask_image"
