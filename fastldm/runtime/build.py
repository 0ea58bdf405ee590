"""A model's folder as an engine: the index, the configurations, then the weights."""

from __future__ import annotations

import logging

import torch

from fastldm import config
from fastldm.errors import ConfigError, brief
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime.engine import Engine
from fastldm.sampling.config import CLASSES
from fastldm.weights.files import ModelFolder
from fastldm.weights.load import load

log = logging.getLogger("fastldm")

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
)
COMPONENTS: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(CLASSES),
}
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def engine_from(folder: ModelFolder, *, dtype: torch.dtype, device: torch.device) -> Engine:
    """Raises `FileError`, `ConfigError` or `WeightsError`; every configuration is checked before a weight is read."""
    unet = config.unet_config(folder.read_json("unet/config.json"))
    vae = config.vae_config(folder.read_json("vae/config.json"))
    text = config.text_config(folder.read_json("text_encoder/config.json"))
    _check_together(unet, vae, text)
    with (
        folder.tensors("unet") as unet_tensors,
        folder.tensors("vae") as vae_tensors,
        folder.tensors("text_encoder") as text_tensors,
    ):
        return Engine(
            unet=load(lambda: UNet(unet), unet_tensors, dtype=dtype, device=device),
            vae=load(lambda: AutoencoderKL(vae), vae_tensors, dtype=vae_dtype(vae, dtype), device=device),
            text_encoder=load(lambda: TextEncoder(text), text_tensors, dtype=dtype, device=device),
        )


def vae_dtype(vae: config.VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """float32 instead of float16 for an autoencoder whose activations leave float16's range (`force_upcast`)."""
    return torch.float32 if dtype == torch.float16 and vae.force_upcast else dtype


def check_index(folder: ModelFolder) -> None:
    """model_index.json must name a pipeline and components that we have."""
    where = "model_index.json"
    index = folder.read_json(where)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(
            f"{where}: _class_name = {name!r} is not supported; supported: {', '.join(PIPELINES)}",
            field="_class_name",
        )
    for key, value in index.items():
        if not isinstance(value, list) or value[:1] == [None]:
            continue
        if key not in COMPONENTS and key not in UNUSED:
            raise ConfigError(f"{where}: {brief(key)} is no component of {name}", field=key)
        if key in COMPONENTS and (len(value) != 2 or value[1] not in COMPONENTS[key]):
            raise ConfigError(
                f"{where}: {key} = {brief(value)} is not supported; supported: {', '.join(COMPONENTS[key])}",
                field=key,
            )
        if key in ("safety_checker", "image_encoder"):
            log.warning("%s: the model's %s is not run", folder.root, key.replace("_", " "))


def _check_together(unet: config.UNetConfig, vae: config.VAEConfig, text: config.TextConfig) -> None:
    latent = vae.latent_channels
    inputs = (latent, 2 * latent, 2 * latent + 1)
    checks = (
        ("cross_attention_dim", unet.context_dim, "the text encoder's hidden_size", (text.width,)),
        ("out_channels", unet.out_channels, "the VAE's latent_channels", (latent,)),
        ("in_channels", unet.in_channels, "the latents, with an image, or with an image and a mask", inputs),
    )
    for key, value, what, allowed in checks:
        if value not in allowed:
            field = f"unet/config.json: {key}"
            raise ConfigError(f"{field} = {value} must be {' or '.join(map(str, allowed))}: {what}", field=field)
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise ConfigError(
            f"vae/config.json: in_channels = {vae.in_channels}, out_channels = {vae.out_channels}: images have 3",
            field="vae/config.json: out_channels",
        )
    if unet.added is not None:
        raise ConfigError("unet/config.json: addition_embed_type: SDXL cannot be painted yet", field="unet/config.json")
