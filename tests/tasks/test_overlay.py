"""What is not painted stays: overlays, crops and canvases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch

import fastldm
from fastldm import Error
from tests.oracle import relative_error
from tests.pipeline.pairs import Pair, paint
from tests.tasks.conftest import HEIGHT, WIDTH, shown

CALL = {"prompt": "the red cat", "num_inference_steps": 2}
SIZE = {"height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize("name", ["inpaint", "inpaint_9"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_overlay_keeps_unmasked_pixels_bit_for_bit(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, name: str, output_type: str
) -> None:
    painted = paint(
        task(name).fast, image=picture, mask_image=mask, overlay=True, output_type=output_type, **SIZE, **CALL
    )
    if output_type == "pil":
        result, original = np.asarray(painted[0]), np.asarray(picture)
    else:
        result = painted[0].permute(1, 2, 0).numpy() if output_type == "pt" else painted[0]
        original = np.asarray(picture, dtype=np.float32) / 255
    black, white = np.asarray(mask) == 0, np.asarray(mask) == 255
    assert (result[black] == original[black]).all()
    assert (result[white] != original[white]).mean() > 0.9


def test_without_overlay_the_decoder_changes_everything(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image
) -> None:
    """What the option is for, and what diffusers does: https://github.com/huggingface/diffusers/issues/4782."""
    painted = np.asarray(paint(task("inpaint").fast, image=picture, mask_image=mask, **SIZE, **CALL)[0])
    black = np.asarray(mask) == 0
    assert (painted[black] != np.asarray(picture)[black]).mean() > 0.9


@pytest.mark.parametrize("padding", [0, 4, 100])
def test_padding_mask_crop_is_diffusers(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, padding: int
) -> None:
    pair = task("inpaint")
    call = {"image": picture, "mask_image": mask, "height": 32, "width": 32, "padding_mask_crop": padding, **CALL}
    mine, theirs = (shown(paint(side, **call)) for side in (pair.fast, pair.ref))
    assert relative_error(torch.from_numpy(mine), torch.from_numpy(theirs)) <= 2e-3
    black = np.asarray(mask) == 0
    assert (mine[0][black] == np.asarray(picture)[black]).all()


@pytest.mark.parametrize("box", [(3, 2, 9, 30), (2, 20, 46, 26), (30, 5, 45, 31)], ids=["tall", "wide", "corner"])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=["square", "wide"])
def test_padding_mask_crop_is_diffusers_whatever_the_mask(
    task: Callable[[str], Pair], picture: PIL.Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    """The box reaches the picture's edges, so that bars fill the model's size."""
    mask = PIL.Image.new("L", picture.size, 0)
    mask.paste(255, box)
    call = {"image": picture, "mask_image": mask, "height": size[0], "width": size[1], "padding_mask_crop": 2, **CALL}
    mine, theirs = (shown(side) for side in task("inpaint").both(**call))
    assert relative_error(torch.from_numpy(mine), torch.from_numpy(theirs)) <= 2e-3


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_kept_as_eight(task: Callable[[str], Pair], mask: PIL.Image.Image, mode: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (mask.height, mask.width))
    picture = PIL.Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    eight, black = (values / 65535 * 255).round()[..., None], np.asarray(mask) == 0
    for kind in ({"overlay": True, **SIZE}, {"padding_mask_crop": 4, "height": 32, "width": 32}):
        painted = np.asarray(paint(task("inpaint").fast, image=picture, mask_image=mask, **kind, **CALL)[0])
        assert (painted == eight)[black].all()


def test_outpainting_keeps_the_picture_and_fills_the_canvas(
    task: Callable[[str], Pair], picture: PIL.Image.Image
) -> None:
    canvas, mask = fastldm.outpaint_canvas(picture, left=8, top=0, right=16, bottom=8)
    assert canvas.size == mask.size == (picture.width + 24, picture.height + 8)
    inside = np.asarray(mask) == 0
    assert inside.sum() == picture.width * picture.height
    assert (np.asarray(canvas)[: picture.height, 8 : 8 + picture.width] == np.asarray(picture)).all()
    painted = paint(
        task("inpaint").fast,
        image=canvas,
        mask_image=mask,
        overlay=True,
        height=canvas.height,
        width=canvas.width,
        **CALL,
    )[0]
    assert (np.asarray(painted)[inside] == np.asarray(canvas)[inside]).all()


def test_outpainting_takes_every_kind_of_picture(picture: PIL.Image.Image) -> None:
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sixteen = PIL.Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    for value in (array, array.astype(np.float32) / 255, tensor, tensor[None], [picture], picture.convert("RGBA")):
        canvas, _ = fastldm.outpaint_canvas(value, left=np.int64(8))
        assert (np.asarray(canvas)[:, 8:] == array).all()
    assert (np.asarray(fastldm.outpaint_canvas(sixteen, top=8)[0])[8:] == array[..., :1]).all()


@pytest.mark.parametrize("value", [None, "x", 3, [], PIL.Image.new("F", (8, 8)), PIL.Image.new("RGB", (0, 8))])
def test_outpainting_names_a_bad_picture(value: object) -> None:
    with pytest.raises(Error) as error:
        fastldm.outpaint_canvas(value, left=8)  # type: ignore[arg-type]
    assert error.value.field == "image"


def test_outpainting_takes_one_picture_of_at_most_4096_pixels(picture: PIL.Image.Image) -> None:
    for value, left in (([picture, picture], 8), (picture, 4096)):
        with pytest.raises(Error) as error:
            fastldm.outpaint_canvas(value, left=left)  # type: ignore[arg-type]
        assert error.value.field == "image"


@pytest.mark.parametrize(
    ("side", "value"), [("left", -1), ("top", 2.5), ("right", True), ("bottom", 5000), ("left", 2**70)]
)
def test_outpainting_names_a_bad_side(picture: PIL.Image.Image, side: str, value: object) -> None:
    with pytest.raises(Error) as error:
        fastldm.outpaint_canvas(picture, **{side: value})  # type: ignore[arg-type]
    assert error.value.field == side


def test_the_kept_part_of_the_latents_ends_as_the_picture(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image
) -> None:
    """The blend of the last row puts the clean latents back, a sample of the encoded picture, drawn first."""
    fast = task("inpaint").fast
    sampled = [
        paint(fast, image=picture, mask_image=mask, output_type="latent", seed=s, **SIZE, **CALL) for s in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1])
    painted = (torch.nn.functional.interpolate(torch.from_numpy(np.array(mask))[None, None].float(), (16, 24)) >= 128)[
        0
    ]
    assert (sampled[0] - sampled[2]).abs()[0][painted.expand_as(sampled[0][0])].min() > 0
    for latents, seed in zip(sampled, (1, 1, 2), strict=True):
        kept = ~painted.expand_as(latents[0])
        assert relative_error(latents[0][kept], encoded(fast, picture, seed)[0][kept]) <= 1e-5


@torch.no_grad()
def encoded(pipe: fastldm.Pipeline, picture: PIL.Image.Image, seed: int) -> torch.Tensor:
    """The scaled latents of a picture, from the seed's first draw."""
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    posterior = pipe._engine.encode_image(pixels)
    epsilon = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
    return pipe._engine.vae.to_latents(posterior.mean + posterior.std * epsilon)
