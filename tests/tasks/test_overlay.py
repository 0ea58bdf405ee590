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
from tests.tasks.conftest import shown

CALL = {"prompt": "the red cat", "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["inpaint", "inpaint_9"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_overlay_keeps_unmasked_pixels_bit_for_bit(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, name: str, output_type: str
) -> None:
    painted = paint(task(name).fast, image=picture, mask_image=mask, overlay=True, output_type=output_type, **CALL)
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
    painted = np.asarray(paint(task("inpaint").fast, image=picture, mask_image=mask, **CALL)[0])
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


def test_outpainting_keeps_the_picture_and_fills_the_canvas(
    task: Callable[[str], Pair], picture: PIL.Image.Image
) -> None:
    canvas, mask = fastldm.outpaint_canvas(picture, left=8, top=0, right=16, bottom=8)
    assert canvas.size == mask.size == (picture.width + 24, picture.height + 8)
    inside = np.asarray(mask) == 0
    assert inside.sum() == picture.width * picture.height
    assert (np.asarray(canvas)[: picture.height, 8 : 8 + picture.width] == np.asarray(picture)).all()
    painted = paint(task("inpaint").fast, image=canvas, mask_image=mask, overlay=True, **CALL)[0]
    assert (np.asarray(painted)[inside] == np.asarray(canvas)[inside]).all()


@pytest.mark.parametrize(("side", "value"), [("left", -1), ("top", 2.5), ("right", True), ("bottom", 5000)])
def test_outpainting_names_a_bad_side(picture: PIL.Image.Image, side: str, value: object) -> None:
    with pytest.raises(Error) as error:
        fastldm.outpaint_canvas(picture, **{side: value})  # type: ignore[arg-type]
    assert error.value.field == side


def test_the_kept_part_of_the_latents_ends_as_the_picture(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image
) -> None:
    """The blend of the last row puts the clean latents back: two seeds differ where the mask paints, nowhere else."""
    fast = task("inpaint").fast
    sampled = [paint(fast, image=picture, mask_image=mask, output_type="latent", seed=s, **CALL) for s in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1])
    painted = torch.nn.functional.interpolate(torch.from_numpy(np.array(mask))[None, None].float(), (16, 24)) >= 128
    assert (sampled[0] - sampled[2]).abs()[painted.expand_as(sampled[0])].min() > 0
