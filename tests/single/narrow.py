"""A model that needs no configuration: all that shapes do not show is as Stable Diffusion 1 has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests import oracle
from tests.single.models import Sample, converted, randomised

WIDTH = 768
UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 32,
}


def text_encoder(layers: int = 1) -> transformers.CLIPTextModel:
    size = len(oracle.tokenizer())
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=WIDTH // 64,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )


def narrow(folder: Path, **unet: Any) -> Sample:
    """unet: other values of its configuration."""
    torch.manual_seed(0)
    parts = dict(oracle.stable_diffusion().components)
    parts["unet"] = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, cross_attention_dim=WIDTH, sample_size=64, **UNET | unet
    )
    parts["text_encoder"] = text_encoder()
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=512,
    )
    ref = randomised(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
    ref.scheduler = diffusers.PNDMScheduler.from_config(ref.scheduler.config, skip_prk_steps=True)
    oracle.saved(ref, folder / "model")
    return Sample(ref, folder / "model", converted(folder / "model", folder / "model.safetensors"))
