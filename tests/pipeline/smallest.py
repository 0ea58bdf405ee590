"""The smallest model that has every part: a row takes some milliseconds, so a test may paint hundreds of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from fastldm import Pipeline
from fastldm.model.unet import UNet
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
CALL: dict[str, Any] = {"prompt": "the red cat", "seed": 1, "num_inference_steps": 3, "output_type": "pt"}
NEXT: dict[str, Any] = {
    "prompt": "a",
    "seed": 2,
    "num_inference_steps": 1,
    "guidance_scale": 1,
    "output_type": "latent",
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


def quick(patch: pytest.MonkeyPatch) -> None:
    """A known function in place of the network, so that thousands of rows take seconds: the loop is what is tested."""
    patch.setattr(UNet, "forward", lambda self, x, modulation, context: 0.3 * x[:, :4] + 0.1)


def pictures(task: str) -> dict[str, Any]:
    """The arguments that make a call one of that task."""
    image, mask = PIL.Image.new("RGB", (8, 8), (9, 90, 200)), PIL.Image.new("L", (8, 8), 255)
    inpaint = {"image": image, "mask_image": mask}
    tasks: dict[str, dict[str, Any]] = {
        "text": {},
        "image": {"image": image},
        "inpaint": {**inpaint, "strength": 0.5},
        "inpaint from noise": inpaint,
    }
    return tasks[task]
