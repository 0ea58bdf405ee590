"""Tiny random pipelines built by diffusers, the oracle of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# SD 1.x: heads given by number (under the hub's misnamed key), 1×1 convolutions around the transformers, epsilon.
SD1 = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
# SD 2.x: one number of heads for each level, so that the head dim is the same; linear projections; v-prediction.
SD2 = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
# One level with attention in the middle of three, unequal layers, deeper transformers, a single group.
UNEVEN = {
    "block_out_channels": (8, 24, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 3, 2),
    "layers_per_block": (1, 2, 3),
    "transformer_layers_per_block": (1, 2, 1),
    "norm_num_groups": 1,
    "use_linear_projection": True,
}


def tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer, any string encodes: the bytes, a few merges, and the two special tokens last."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def text_encoder(width: int = 24) -> CLIPTextModel:
    size = len(tokenizer())
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )


def autoencoder(levels: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16, 16, 16][:levels],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def stable_diffusion(
    unet: dict[str, Any] = SD1, *, prediction_type: str = "epsilon", levels: int = 2, seed: int = 0
) -> StableDiffusionPipeline:
    """A tiny Stable Diffusion with random weights; the U-Net's are scaled up so that the prompt matters."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=24, sample_size=16, **unet)
    return StableDiffusionPipeline(
        vae=autoencoder(levels),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=model,
        scheduler=DDIMScheduler(
            **SD_BETAS,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def saved(pipe: StableDiffusionPipeline, folder: Path) -> Path:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return folder


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
