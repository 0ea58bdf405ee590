"""Pictures as people hand them over: every mode, kind and range, or an error that names the argument."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from fastldm import ops
from fastldm.errors import ArgumentError
from fastldm.image import (
    as_mask8,
    as_rgb8,
    crop_box,
    filled,
    numpy_to_pil,
    overlaid,
    read_images,
    resized,
    to_output,
    to_unit,
)
from fastldm.ops import auto
from fastldm.pipeline import _finished
from fastldm.source import Source

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


# --------------------------------------------------------------------------------------------------------- sixteen bits


def sixteen(values: np.ndarray, mode: str) -> PIL.Image.Image:
    if mode == "I":
        return PIL.Image.fromarray(values.astype(np.int32))
    order = ">u2" if mode == "I;16B" else "<u2"
    return PIL.Image.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_sixteen_bits_become_eight_by_rounding(mode: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (7, 9))
    image, eight = sixteen(values, mode), (values / 65535 * 255).round().astype(np.uint8)
    assert image.mode == mode
    assert torch.allclose(read(image)[0], torch.from_numpy(values / 65535).float(), atol=1e-7)
    assert (np.asarray(as_rgb8(image, "image")) == eight[..., None]).all()
    assert (np.asarray(as_mask8(image, "image")) == eight).all()
    expected = PIL.Image.fromarray(eight)
    assert resized(image, 5, 4, "image") == expected.resize((5, 4), PIL.Image.Resampling.LANCZOS)
    black = PIL.Image.new("L", (9, 7), 0)
    assert overlaid(image, RGB, black, (0, 0, 9, 7)) == expected.convert("RGB")
    mask = sixteen(np.pad(np.array([[200]]), ((2, 4), (3, 5))), mode)  # 0.8 of 255: black once rounded to 1
    assert crop_box(mask, 8, 8, 0) == (3, 2, 4, 3)


@pytest.mark.parametrize("values", [(-1, 5), (0, 65536), (-(2**31), 2**31 - 1)])
def test_mode_i_beyond_sixteen_bits_is_named(values: tuple[int, int]) -> None:
    image = PIL.Image.fromarray(np.array([values], np.int32))
    for use in (read, lambda i: as_rgb8(i, "image"), lambda i: resized(i, 8, 8, "image")):
        with pytest.raises(ArgumentError, match=r"0\.\.65535") as error:
            use(image)
        assert error.value.field == "image"


# -------------------------------------------------------------------------------------------------- as diffusers has it


@pytest.mark.parametrize("seed", range(300))
def test_a_random_crop_is_diffusers(seed: int) -> None:
    """Box, filled picture and filled mask to the bit; the overlay to its rounding of alpha, and no bit where black."""
    rng = np.random.default_rng(seed)
    theirs = VaeImageProcessor()
    (w, h), (width, height) = rng.integers(2, 90, 2).tolist(), (8 * rng.integers(1, 12, 2)).tolist()
    left, top = rng.integers(0, w), rng.integers(0, h)
    array = np.zeros((h, w), np.uint8)
    array[top : rng.integers(top, h) + 1, left : rng.integers(left, w) + 1] = (
        255 if seed % 2 else rng.integers(128, 256)
    )
    mask = PIL.Image.fromarray(array)
    mask = mask.convert("1") if seed % 5 == 0 else mask
    picture, painted = (
        PIL.Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((h, w), (height, width))
    )
    padding = int(rng.integers(0, 20))
    box = crop_box(mask, width, height, padding)
    assert box == theirs.get_crop_region(mask, width, height, padding)
    (inner_w, inner_h), ratio = (box[2] - box[0], box[3] - box[1]), width / height
    if min(inner_h * width // inner_w, inner_w * height // inner_h) == 0:  # where diffusers' resize raises
        assert inner_w / inner_h != ratio
        assert filled(picture.crop(box), width, height, "image").size == (width, height)
        return
    assert filled(picture.crop(box), width, height, "image") == theirs._resize_and_fill(
        picture.crop(box), width, height
    )
    assert filled(mask.crop(box), width, height, "mask_image") == theirs._resize_and_fill(mask.crop(box), width, height)
    mine, other = overlaid(picture, painted, mask, box), theirs.apply_overlay(mask, picture, painted, box)
    assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1
    black = np.asarray(mask.convert("L")) == 0
    assert (np.asarray(mine)[black] == np.asarray(picture)[black]).all()


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (4000, 1), (1, 4000)])
def test_a_box_of_one_row_is_filled(size: tuple[int, int]) -> None:
    picture, mask = PIL.Image.new("RGB", size, (9, 8, 7)), PIL.Image.new("L", size, 255)
    box = crop_box(mask, 64, 48, 0)
    assert box == (0, 0, *size)
    whole = filled(picture.crop(box), 64, 48, "image")
    assert whole == PIL.Image.new("RGB", (64, 48), (9, 8, 7))
    assert overlaid(picture, whole, mask, box) == picture


# ----------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("images", [UNIT, UNIT[None], np.stack([UNIT, 1 - UNIT]), UNIT[..., :1], UNIT.astype(float)])
def test_arrays_become_the_images_of_diffusers(images: np.ndarray) -> None:
    found, expected = numpy_to_pil(images), VaeImageProcessor.numpy_to_pil(images)
    assert [image.mode for image in found] == [image.mode for image in expected]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def finished(output_type: str, pixels: torch.Tensor, source: Source | None = None) -> tuple[Any, list[str]]:
    """-> what a call returns of decoded pixels, and the ops that its backend was asked for"""
    asked = SimpleNamespace(output_type=output_type, source=source)
    with auto.rehearsal("cpu") as choices:
        images = _finished(asked, SimpleNamespace(using=lambda: ops.using("auto")), pixels)  # type: ignore[arg-type]
    return images, [choice.op for choice in choices]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pictures_are_rounded_where_they_were_decoded_to_the_same_bits(dtype: torch.dtype, channels: int) -> None:
    pixels = torch.randn(2, channels, 33, 47).to(dtype, memory_format=torch.channels_last)
    pictures, asked_for = finished("pil", pixels)
    assert asked_for == ["to_uint8"]
    assert pictures == to_output(to_unit(pixels), "pil")
    array, asked_for = finished("np", pixels)
    assert asked_for == []
    assert pictures == numpy_to_pil(array)


def test_what_is_laid_over_a_picture_is_so_before_it_is_rounded() -> None:
    pixels, own = torch.randn(1, 3, 6, 5), read(RGB)[None]
    pictures, asked_for = finished("pil", pixels, Source(own, 1.0, torch.full((1, 1, 6, 5), 0.3), overlay=True))
    assert asked_for == []
    assert pictures == to_output(0.3 * to_unit(pixels) + 0.7 * own, "pil")


def test_bytes_are_kept() -> None:
    assert np.array_equal(numpy_to_pil(BYTES)[0], BYTES)


@pytest.mark.parametrize(
    "images",
    [
        [UNIT],
        torch.from_numpy(UNIT),
        UNIT[0],
        UNIT[..., :2],
        UNIT[:0],
        UNIT[None, None],
        UNIT + 0.1,
        UNIT - 0.1,
        UNIT * np.nan,
        np.full_like(UNIT, np.inf),
        BYTES.astype(np.int64),
        BYTES > 9,
    ],
    ids=range(12),
)
def test_arrays_that_are_no_images_are_named(images: object) -> None:
    with pytest.raises(ArgumentError, match=r"^images: ") as caught:
        numpy_to_pil(images)  # type: ignore[arg-type]
    assert caught.value.field == "images"
