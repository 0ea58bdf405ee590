"""Whole models on the kernels, under the interpreter: as near to the truth as the reference, by the root mean
square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from fastldm import ops
from fastldm.kernels.launch import DTYPES
from tests.kernels.holding import exact_products
from tests.model.loading import text_pair, unet_pair, vae_pair
from tests.model.test_clip import TINY as TEXT
from tests.model.test_clip import ids
from tests.numerics import assert_within_twice, wider
from tests.ops.formulas import image, random
from tests.runtime.test_plan import run as walk
from tests.runtime.tiny import plan_for, table, with_history

# Head dims of 8: kernels take none below.
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
}
SMALLEST: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}


def held(model: nn.Module, run: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    """run: the model's output from inputs of that dtype, whose values are numbers of `dtype` each time."""
    model.to(dtype)
    with ops.using("fused"), exact_products():
        out = run(dtype)
    yardstick = run(dtype)
    model.to(wider(dtype))
    assert_within_twice(out, run(wider(dtype)), yardstick, rms=True)


@pytest.mark.parametrize(
    ("linear", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float16)], ids=str
)
@torch.no_grad()
def test_unet(linear: bool, dtype: torch.dtype) -> None:
    """linear: projections as in SD 2."""
    unet, _ = unet_pair(**UNET, use_linear_projection=linear)
    x, states = image(2, 4, 7, 6, dtype=dtype), random(2, 77, 24, dtype=dtype)

    def run(working: torch.dtype) -> Tensor:
        mods = unet.modulation(torch.tensor([431.0], dtype=ops.compute_dtype(working)))
        return unet(x.to(working), mods[0], unet.context(states.to(working)))

    held(unet, run, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_autoencoder(dtype: torch.dtype) -> None:
    vae, _ = vae_pair(**VAE)
    z, pixels = image(1, 4, 5, 4, dtype=dtype), image(1, 3, 10, 6, dtype=dtype)
    held(vae, lambda working: vae.decode(z.to(working)), dtype)
    held(vae, lambda working: vae.encode(pixels.to(working)).mean, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_text_encoder(dtype: torch.dtype) -> None:
    encoder, _ = text_pair(CLIPTextModel, **TEXT)
    text = ids()
    held(encoder, lambda working: encoder(text).states, dtype)


def test_a_run_of_the_sampler() -> None:
    """Two branches of guidance, a state of three slots, new noise now and then; then the latents."""
    unet, _ = unet_pair(**SMALLEST)

    def run(working: torch.dtype) -> Tensor:
        plan = plan_for(unet)
        walk(plan, unet, with_history(table(2), slots=3), (-6.5, 7.5))
        return plan.state[0].clone()

    held(unet, run, torch.float16)
