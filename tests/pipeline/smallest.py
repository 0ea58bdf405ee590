"""The smallest model that has every part: a row takes some milliseconds, so a test may paint hundreds of images."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from fastldm import Pipeline
from tests import oracle

WIDTH = 24  # of a token's embedding
UNET = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def reference(channels: int = 4) -> StableDiffusionPipeline:
    """Diffusers' pipeline. channels: that the U-Net reads; 9 for inpainting, 8 for instruct-pix2pix."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=channels, out_channels=4, cross_attention_dim=WIDTH, sample_size=4, **UNET)
    return StableDiffusionPipeline(
        vae=oracle.autoencoder(levels=2),
        text_encoder=oracle.text_encoder(WIDTH),
        tokenizer=oracle.tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**oracle.SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make(folder: Path, channels: int = 4) -> Pipeline:
    """Of 8 × 8 pixels, where nobody says otherwise."""
    return Pipeline(oracle.saved(reference(channels), folder))
