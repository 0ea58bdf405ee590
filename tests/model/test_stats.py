"""Statistics handed from a convolution to the next norm give the same networks: fused kernels will do so."""

from __future__ import annotations

import pytest
import torch

from fastldm import ops
from tests.model.loading import assert_close, unet_pair, vae_pair
from tests.model.test_unet import CONFIGS, channels_last
from tests.model.test_vae import TINY
from tests.ops.formulas import untouched


@pytest.mark.parametrize("name", [n for n in CONFIGS if "middle block" not in n])
@torch.no_grad()
def test_unet(name: str) -> None:
    ours, theirs = unet_pair(cross_attention_dim=24, **CONFIGS[name])
    x, states = torch.randn(2, theirs.config.in_channels, 13, 10), torch.randn(2, 7, 24)
    mods, context = ours.modulation(torch.tensor([500.0]))[0], ours.context(states)
    with untouched(x, mods, context), ops.using("reference", want_stats=True):
        out = ours(channels_last(x), mods, context)
    assert_close(out, theirs(x, torch.tensor(500), states).sample)


@torch.no_grad()
def test_vae() -> None:
    ours, theirs = vae_pair(**TINY | {"block_out_channels": (8, 16, 16, 24)})
    z, image = torch.randn(2, 4, 7, 5), torch.randn(2, 3, 48, 32)
    with untouched(z, image), ops.using("reference", want_stats=True):
        decoded, posterior = ours.decode(z), ours.encode(image)
    assert_close(decoded, theirs.decode(z).sample)
    assert_close(posterior.mean, theirs.encode(image).latent_dist.mean)


@torch.no_grad()
def test_the_statistics_arrive_at_the_norms() -> None:
    """Most norms of the U-Net get them; else the tests above would compare the same path twice."""
    ours, _ = unet_pair(cross_attention_dim=24, **CONFIGS["SD 1: convolutions around the transformers"])
    known: list[bool] = []
    original = ops.group_norm

    def spy(*args: object, **options: object) -> torch.Tensor:
        stats = options.get("stats")
        known.append(any(s is not None for s in stats) if isinstance(stats, tuple) else stats is not None)
        return original(*args, **options)  # type: ignore[arg-type]

    x, context = channels_last(torch.randn(1, 4, 8, 8)), ours.context(torch.randn(1, 7, 24))
    with pytest.MonkeyPatch.context() as patch, ops.using("reference", want_stats=True):
        patch.setattr(ops, "group_norm", spy)
        ours(x, ours.modulation(torch.tensor([1.0]))[0], context)
    assert sum(known) > len(known) / 2
