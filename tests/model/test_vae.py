"""The autoencoder equals diffusers' AutoencoderKL, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.loading import assert_close, vae_pair
from tests.oracle import relative_error

TINY: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "two levels": TINY,
    "four levels, factor 8": TINY | {"block_out_channels": (8, 16, 16, 24)},
    "one level: no resampling at all": TINY | {"block_out_channels": (8,)},
    "three layers": TINY | {"layers_per_block": 3},
    "no attention in the middle": TINY | {"mid_block_add_attention": False},
    "no quant convolutions (SD 3)": TINY | {"use_quant_conv": False, "use_post_quant_conv": False},
    "16 latent channels": TINY | {"latent_channels": 16},
    "gray images": TINY | {"in_channels": 1, "out_channels": 1},
    "one group": TINY | {"norm_num_groups": 1},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_both_halves_equal_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = vae_pair(**config)
    z = torch.randn(2, theirs.config.latent_channels, 7, 11)
    assert_close(ours.decode(z), theirs.decode(z).sample)
    factor = ours.config.factor
    image = torch.randn(2, theirs.config.in_channels, 5 * factor, 3 * factor)
    mine, truth = ours.encode(image), theirs.encode(image).latent_dist
    assert_close(mine.mean, truth.mean)
    assert_close(mine.std, truth.std)


@torch.no_grad()
def test_log_variance_is_clamped() -> None:
    ours, theirs = vae_pair(**TINY)
    for sign in (1, -1):
        for model in (ours, theirs):
            model.quant_conv.bias[4:] = 100.0 * sign
        image = torch.randn(1, 3, 8, 8)
        assert_close(ours.encode(image).std, theirs.encode(image).latent_dist.std)
        assert torch.isfinite(ours.encode(image).std).all()


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (1.5035, 0.0609), (0.13025, -0.5)])
def test_scaling_and_shift(scale: float, shift: float | None) -> None:
    """latents = (z − shift) · scale, as diffusers' pipelines write it."""
    ours, _ = vae_pair(**TINY, scaling_factor=scale, shift_factor=shift)
    z = torch.randn(2, 4, 3, 5)
    latents = (z - (shift or 0.0)) * scale
    torch.testing.assert_close(ours.to_latents(z), latents)
    torch.testing.assert_close(ours.from_latents(latents), z)


# latent sizes around the tile of 16 latents, of which the first 12 are kept: what each does to the last tile
TILED = {
    (16, 16): "exactly one tile: not tiled",
    (17, 16): "one more row: a second row of tiles, of 5 latents",
    (27, 35): "tiles cut on both sides",
    (24, 12): "the last tile begins where the image ends",
    (40, 13): "three rows, the last a tile of 4",
}


@pytest.mark.parametrize(("height", "width"), TILED, ids=[f"{h}x{w}" for h, w in TILED])
@torch.no_grad()
def test_tiles_equal_diffusers(height: int, width: int) -> None:
    ours, theirs = vae_pair(**TINY)
    z, image = torch.randn(2, 4, height, width), torch.randn(1, 3, 2 * height, 2 * width)
    whole = theirs.decode(z).sample
    theirs.enable_tiling()
    decoded = ours.decode(z, tiling=True)
    assert_close(decoded, theirs.decode(z).sample)
    assert (relative_error(decoded, whole) > 1e-4) == (max(height, width) > 16), "tiled exactly where it must be"
    mine, truth = ours.encode(image, tiling=True), theirs.encode(image).latent_dist
    assert_close(mine.mean, truth.mean)
    assert_close(mine.std, truth.std)


@torch.no_grad()
def test_tiles_of_four_levels() -> None:
    ours, theirs = vae_pair(**TINY | {"block_out_channels": (8, 8, 16, 16), "sample_size": 64})
    theirs.enable_tiling()
    z, image = torch.randn(1, 4, 19, 9), torch.randn(1, 3, 88, 152)
    assert_close(ours.decode(z, tiling=True), theirs.decode(z).sample)
    assert_close(ours.encode(image, tiling=True).mean, theirs.encode(image).latent_dist.mean)


@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_slicing_changes_nothing(tiling: bool) -> None:
    ours, _ = vae_pair(**TINY)
    z, image = torch.randn(3, 4, 18, 9), torch.randn(3, 3, 36, 18)
    assert_close(ours.decode(z, slicing=True, tiling=tiling), ours.decode(z, tiling=tiling))
    for a, b in zip(ours.encode(image, slicing=True, tiling=tiling), ours.encode(image, tiling=tiling), strict=True):
        assert_close(a, b)


@torch.no_grad()
def test_slicing_decodes_one_sample_at_a_time() -> None:
    ours, _ = vae_pair(**TINY)
    seen = []
    ours.decoder.conv_in.register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0].x)))
    ours.decode(torch.randn(3, 4, 4, 4), slicing=True)
    assert seen == [1, 1, 1]


@torch.no_grad()
def test_inputs_stay_as_they_are() -> None:
    ours, _ = vae_pair(**TINY)
    z, image = torch.randn(1, 4, 18, 9), torch.randn(1, 3, 36, 18)
    kept = z.clone(), image.clone()
    for tiling in (False, True):
        ours.decode(z, tiling=tiling)
        ours.encode(image, tiling=tiling)
    assert torch.equal(z, kept[0])
    assert torch.equal(image, kept[1])
