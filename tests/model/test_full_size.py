"""Every tensor of the full-size models has its place: nothing missing, nothing left over, every shape fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from fastldm import config
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.weights.keymap import addresses, fits, present_name
from tests.model import full_size

Shapes = dict[str, tuple[int, ...]]


def places(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return {k: parameters[a.parameter][a.start : a.stop] for k, a in addresses(model).items()}


def assert_all_placed(model: nn.Module, checkpoint: Shapes) -> None:
    target = places(model)
    found = {present_name(name): shape for name, shape in checkpoint.items()}
    found.pop(None, None)
    assert sorted(found.keys() ^ target.keys()) == []
    assert [name for name, shape in found.items() if not fits(shape, target[name])] == []
    total = sum(p.numel() for p in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in found.values()) == total


def shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def hub_unet(data: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        return shapes(diffusers.UNet2DConditionModel.from_config(data))


def hub_vae(data: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        return shapes(diffusers.AutoencoderKL.from_config(data))


def hub_text(data: dict[str, Any]) -> Shapes:
    model = getattr(transformers, data["architectures"][0])
    with torch.device("meta"):
        return shapes(model(transformers.CLIPTextConfig(**{k: v for k, v in data.items() if k != "architectures"})))


UNETS = {
    "SD 1.5": full_size.SD15_UNET,
    "SD 1.5 inpainting": full_size.SD15_INPAINTING_UNET,
    "SD 2.1": full_size.SD21_UNET,
    "SDXL": full_size.SDXL_UNET,
}
VAES = {"SD 1.5": full_size.SD15_VAE, "SD 2.1": full_size.SD21_VAE, "SDXL": full_size.SDXL_VAE}
TEXTS = {
    "CLIP ViT-L": full_size.CLIP_L,
    "OpenCLIP ViT-H": full_size.OPENCLIP_H,
    "OpenCLIP ViT-bigG": full_size.OPENCLIP_BIGG,
}


@pytest.mark.parametrize("data", UNETS.values(), ids=UNETS.keys())
def test_unet(data: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = UNet(config.unet_config(data))
    assert_all_placed(model, hub_unet(data))


@pytest.mark.parametrize("data", VAES.values(), ids=VAES.keys())
def test_vae(data: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoencoderKL(config.vae_config(data))
    assert_all_placed(model, hub_vae(data))


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("spelling", ["as installed", "transformers 4", "transformers 5.6"])
def test_text_encoder(data: dict[str, Any], spelling: str) -> None:
    """transformers 4 has `text_model.` everywhere but before the projection, and once kept the positions, too."""
    with torch.device("meta"):
        model = TextEncoder(config.text_config(data))
    found = hub_text(data)
    if spelling != "as installed":
        found = {name.removeprefix("text_model."): shape for name, shape in found.items()}
    if spelling == "transformers 4":
        prefix = {k: "" if k.startswith("text_projection") else "text_model." for k in found}
        found = {prefix[k] + k: shape for k, shape in found.items()}
        found["text_model.embeddings.position_ids"] = (1, 77)
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in found
    assert_all_placed(model, found)


def test_old_names_of_the_vaes_attention() -> None:
    """diffusers before 0.17 wrote query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found, renamed = {}, 0
    for name, shape in hub_vae(full_size.SD15_VAE).items():
        for new, former in old.items():
            if f"attentions.0.{new}." in name:
                name, renamed = name.replace(f".{new}.", f".{former}."), renamed + 1
        found[name] = shape
    assert renamed == 16
    with torch.device("meta"):
        model = AutoencoderKL(config.vae_config(full_size.SD15_VAE))
    assert_all_placed(model, found)


def test_presets_are_the_published_configurations() -> None:
    assert config.unet_config(full_size.SD15_UNET) == config.SD15_UNET
    assert config.unet_config(full_size.SD21_UNET) == config.SD21_UNET
    assert config.unet_config(full_size.SDXL_UNET) == config.SDXL_UNET
    assert config.vae_config(full_size.SD15_VAE) == config.SD_VAE
    assert config.vae_config(full_size.SDXL_VAE) == config.SDXL_VAE
    for data, preset in (
        (full_size.CLIP_L, config.CLIP_L),
        (full_size.OPENCLIP_H, config.OPENCLIP_H),
        (full_size.OPENCLIP_BIGG, config.OPENCLIP_BIGG),
    ):
        assert config.text_config(data) == replace(preset, eos_token_id=2), "the hub's files still say 2"
        assert config.text_config({**data, "eos_token_id": 49407}) == preset
    assert config.SD_VAE.factor == config.SDXL_VAE.factor == 8
