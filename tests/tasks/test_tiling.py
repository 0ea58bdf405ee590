"""The encoder saves memory as the decoder does: the pipeline's switches are for both."""

from __future__ import annotations

from collections.abc import Callable

import PIL.Image
import pytest

from tests.oracle import relative_error
from tests.pipeline.pairs import Pair, paint


@pytest.mark.parametrize("name", ["image_to_image", "inpaint_9", "instruct"])
def test_the_encoder_has_diffusers_tiles(
    task: Callable[[str], Pair], picture: PIL.Image.Image, mask: PIL.Image.Image, name: str
) -> None:
    """48×32 pixels are more than the tile of 32."""
    both, call = task(name), {"prompt": "a cat", "image": picture, "num_inference_steps": 4, "output_type": "latent"}
    if name == "inpaint_9":
        call["mask_image"] = mask
    sizes = {"height": 32, "width": 48} if name == "inpaint_9" else {}  # diffusers would take the model's own
    plain = paint(both.fast, **call)
    both.fast.enable_vae_tiling()
    both.ref.vae.enable_tiling()
    try:
        tiled, theirs = paint(both.fast, **call), paint(both.ref, **call, **sizes)
    finally:
        both.fast.disable_vae_tiling()
        both.ref.vae.disable_tiling()
    assert relative_error(tiled, theirs) <= 1e-4
    assert relative_error(tiled, plain) > 1e-3
