"""The size of what is painted: the picture's own, or what height and width say."""

from __future__ import annotations

from collections.abc import Callable

import PIL.Image
import pytest

from fastldm.errors import ArgumentError
from tests.pipeline.pairs import Pair, paint

CALL = {"prompt": "the red cat", "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["inpaint", "inpaint_9"])
def test_inpainting_keeps_the_size_of_the_picture(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, name: str
) -> None:
    """diffusers would squash it to the model's 32×32."""
    assert paint(task(name).fast, image=picture, mask_image=mask, **CALL)[0].size == picture.size
    asked = paint(task(name).fast, image=picture, mask_image=mask, height=24, width=40, **CALL)
    assert asked[0].size == (40, 24)


def test_image_to_image_resizes_pictures_only_when_asked(task: Callable[[str], Pair], picture: PIL.Image.Image) -> None:
    fast = task("image_to_image").fast
    assert paint(fast, image=picture, height=16, width=16, **CALL)[0].size == (16, 16)
    with pytest.raises(ArgumentError, match="multiple of 2") as error:
        paint(fast, image=picture.resize((47, 32)), **CALL)
    assert error.value.field == "image"
