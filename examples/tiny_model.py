"""Writes a tiny Stable Diffusion with seeded random weights, in the folder layout of diffusers.

    python examples/tiny_model.py FOLDER [--seed 0]

It paints no picture of anything. It is there to see the whole way from a folder to an image in seconds, and to test
it: every part of a real model is present, only narrow. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from fastldm import config
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.weights.keymap import addresses

WORDS = ("cat", "red", "the")  # each becomes a token of its own; all other text is spelled in bytes
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,  # the number of heads, whatever the name says
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Writes the model as `folder`, which must not exist yet; it is there as a whole or not at all. -> `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".tiny-model-", dir=folder.parent))
    try:
        _write(unfinished, seed)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = write_tokenizer(folder / "tokenizer")
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(vocab),
        "hidden_size": UNET["cross_attention_dim"],
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": vocab[START],
        "eos_token_id": vocab[END],
        "pad_token_id": vocab[END],
    }
    with torch.device("meta"):
        unet = UNet(config.unet_config(UNET))
        vae = AutoencoderKL(config.vae_config(VAE))
        text = TextEncoder(config.text_config(text_encoder))
    weights = "diffusion_pytorch_model.safetensors"
    _write_part(folder / "unet", UNET, weights, random_weights(unet, generator))
    _write_part(folder / "vae", VAE, weights, random_weights(vae, generator))
    named = {f"text_model.{name}": tensor for name, tensor in random_weights(text, generator).items()}
    _write_part(folder / "text_encoder", text_encoder, "model.safetensors", named)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)


def random_weights(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """{the hub's name: a tensor}: each keeps the variance of its input, norms and biases do nothing."""
    tensors = {}
    for name, place in addresses(model).items():
        shape = model.get_parameter(place.parameter)[place.start : place.stop].shape
        if len(shape) > 1:
            tensors[name] = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        else:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return tensors


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level CLIP tokenizer: any text encodes. -> {token: id}."""
    merges = [pair for word in WORDS for pair in spelling(word)]
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, **special},
    )
    return vocab


def spelling(word: str) -> list[tuple[str, str]]:
    """The merges that build a word from its letters, the first letter first: cat -> (c, a), (ca, t</w>)."""
    ends = [*word[1:-1], f"{word[-1]}</w>"]
    return [(word[: i + 1], end) for i, end in enumerate(ends)]


def _write_part(folder: Path, settings: Mapping[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    _write_json(folder / "config.json", settings)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny Stable Diffusion with random weights.")
    parser.add_argument("folder", type=Path, help="where to write it; must not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already")
    print(write_tiny_model(options.folder, options.seed))


if __name__ == "__main__":
    main()
