"""The parts of a model as an engine: the index, the configurations, then the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastldm import config
from fastldm.errors import ArgumentError, ConfigError, WeightsError, brief
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime.engine import Engine
from fastldm.runtime.merge import Merged
from fastldm.runtime.place import check_backend
from fastldm.sampling.config import CLASSES
from fastldm.weights.files import ModelFolder
from fastldm.weights.header import TensorInfo
from fastldm.weights.keymap import addresses
from fastldm.weights.load import Tensors, fill, matched, skeleton
from fastldm.weights.single import Part

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
XL_PIPELINES = tuple(name.replace("StableDiffusion", "StableDiffusionXL") for name in PIPELINES)
XL_COMPONENTS = COMPONENTS | {
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": COMPONENTS["tokenizer"],
}
NETWORKS: Mapping[str, tuple[Callable[..., Any], type[nn.Module]]] = {
    "unet": (config.unet_config, UNet),
    "vae": (config.vae_config, AutoencoderKL),
    "text_encoder": (config.text_config, TextEncoder),
    "text_encoder_2": (config.text_config, TextEncoder),
}
RUN = ("unet", "vae", "text_encoder")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def engine_from(
    parts: Mapping[str, Part | nn.Module], *, dtype: torch.dtype, device: torch.device, backend: str = "reference"
) -> Engine:
    """parts: of "unet", "vae" and "text_encoder"; a module of ours in place of a part is shared.

    Raises `FileError`, `ConfigError` or `WeightsError`; every configuration, name and shape is checked before a weight
    is read.
    """
    check_backend(backend, device)
    unet, vae, text = (planned(name, parts[name]) for name in RUN)
    check_together(unet.config, vae.config, text.config, [_where(parts[name], name) for name in RUN])
    if unet.config.added is not None:
        where = _where(parts["unet"], "unet")
        raise ConfigError(f"{where}: addition_embed_type: SDXL cannot be painted yet", field=where)
    tensors = [opened(network, parts[name]) for name, network in zip(RUN, (unet, vae, text), strict=True)]
    filled = partial(_filled, device=device)
    return Engine(
        unet=filled(unet, tensors[0], dtype=dtype),
        vae=filled(vae, tensors[1], dtype=vae_dtype(vae.config, dtype)),
        text_encoder=filled(text, tensors[2], dtype=dtype),
        backend=backend,
    )


def planned(component: str, part: Part | nn.Module) -> Any:
    """The network of a part, without weights; a module as it is."""
    translate, network = NETWORKS[component]
    if isinstance(part, Part):
        translated = translate(part.json, part.where)
        return _remembering(skeleton(lambda: network(translated)), part.json)
    if not isinstance(part, network):
        reason = f"is of class {type(part).__name__}, and must be of {network.__name__}"
        raise ArgumentError(f"{component}: {reason}", field=component)
    return part


def hub_json(network: nn.Module) -> Mapping[str, Any]:
    """The configuration that a network was made from, in the hub's keys."""
    found: Mapping[str, Any] = vars(network)["hub_json"]
    return found


def _remembering(network: Any, json: Mapping[str, Any]) -> Any:
    network.hub_json = json
    return network


def opened(network: nn.Module, part: Part | nn.Module) -> Tensors | None:
    """The tensors of a part, which are just those that the network needs; None for a module."""
    if not isinstance(part, Part):
        return None
    tensors = part.open(network.config, addresses(network))
    matched(network, tensors)
    return tensors


def _filled(network: Any, tensors: Tensors | None, *, dtype: torch.dtype, device: torch.device) -> Any:
    if tensors is not None:
        return fill(network, tensors, dtype=dtype, device=device)
    weight = next(network.parameters())
    if (weight.dtype, weight.device) != (dtype, device):
        reason = f"is {weight.dtype} on {weight.device}, and shared as it is: {dtype} on {device} is needed"
        raise ArgumentError(f"the {type(network).__name__} {reason}", field="torch_dtype")
    return network


def moved(engine: Engine, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Engine:
    """The engine in another dtype, on another device, or both; None: as it is. `engine` itself where nothing changes.

    `engine` is not changed, so that calls that run on it go on; networks that need not change are shared with it. Until
    it is let go, both are in memory: the changed networks twice.
    Raises `WeightsError` naming a tensor that is too large for `dtype`.
    """
    engine.check_process()
    dtype, device = dtype or engine.dtype, device or engine.device
    check_backend(engine.backend, device)
    networks: dict[str, Any] = {name: getattr(engine, name) for name in RUN}
    dtypes = dict.fromkeys(RUN, dtype) | {"vae": vae_dtype(engine.vae.config, dtype)}
    found = {name: _converted(name, network, dtypes[name], device) for name, network in networks.items()}
    same = all(found[name] is network for name, network in networks.items())
    return engine if same else replace(engine, **found)


def _converted(name: str, network: Any, dtype: torch.dtype, device: torch.device) -> Any:
    weight = next(network.parameters())
    if (weight.dtype, weight.device) == (dtype, device):
        return network
    if Merged(network).touched:
        raise WeightsError(f"{name}: its weights are merged with others: restore them, then move it", field=name)
    empty = _remembering(skeleton(lambda: type(network)(network.config)), hub_json(network))
    return fill(empty, Held(name, network), dtype=dtype, device=device)


class Held:
    """The tensors of a network in memory, under the hub's names; `read` gives views."""

    def __init__(self, where: str, network: nn.Module) -> None:
        self.where, self._network, self._addresses = where, network, addresses(network)
        tensors = {name: self.read(name) for name in self._addresses}
        self.infos = {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        address = self._addresses[name]
        return self._network.get_parameter(address.parameter).detach()[address.start : address.stop]


def vae_dtype(vae: config.VAEConfig, dtype: torch.dtype) -> torch.dtype:
    """float32 instead of float16 for an autoencoder whose activations leave float16's range (`force_upcast`)."""
    return torch.float32 if dtype == torch.float16 and vae.force_upcast else dtype


def check_index(folder: ModelFolder, *, xl: bool = False) -> str:
    """The pipeline that model_index.json names, which must be one that we have, as its components. xl: SDXL's, too."""
    where = "model_index.json"
    index = folder.read_json(where)
    name = index.get("_class_name")
    if name not in PIPELINES + (XL_PIPELINES if xl else ()):
        kind = "Stable Diffusion XL is recognised, and not painted yet" if name in XL_PIPELINES else "is not supported"
        raise ConfigError(
            f"{where}: _class_name = {brief(name)}: {kind}; supported: {', '.join(PIPELINES)}", field="_class_name"
        )
    components = XL_COMPONENTS if name in XL_PIPELINES else COMPONENTS
    for key, value in index.items():
        absent = value in (None, [None, None])
        if key in components and not (absent and name in XL_PIPELINES):
            _check_component(where, key, value, components[key])
        elif isinstance(value, list | dict) and not absent and key not in (*components, *UNUSED):
            raise ConfigError(f"{where}: {brief(key)} is no component of {name}", field=key)
        elif key in ("safety_checker", "image_encoder") and not absent:
            log.warning("%s: the model's %s is not run", folder.root, key.replace("_", " "))
    return str(name)


def _check_component(where: str, key: str, value: object, classes: Sequence[str]) -> None:
    library = "transformers" if key.startswith(("text_encoder", "tokenizer")) else "diffusers"
    if not isinstance(value, list) or value not in ([library, name] for name in classes):
        supported = ", ".join(f"{library}.{name}" for name in classes)
        raise ConfigError(f"{where}: {key} = {brief(value)} is not supported; supported: {supported}", field=key)


def _where(part: Part | nn.Module, component: str) -> str:
    return part.where if isinstance(part, Part) else component


def check_together(
    unet: config.UNetConfig, vae: config.VAEConfig, text: config.TextConfig, where: Sequence[str]
) -> None:
    """Raises `ConfigError` if the networks are of different models. where: the names of their configurations."""
    latent = vae.latent_channels
    inputs = (latent, 2 * latent, 2 * latent + 1)
    checks = (
        ("cross_attention_dim", unet.context_dim, "the text encoder's hidden_size", (text.width,)),
        ("out_channels", unet.out_channels, "the VAE's latent_channels", (latent,)),
        ("in_channels", unet.in_channels, "the latents, with an image, or with an image and a mask", inputs),
    )
    for key, value, what, allowed in checks:
        if value not in allowed:
            field = f"{where[0]}: {key}"
            raise ConfigError(f"{field} = {value} must be {' or '.join(map(str, allowed))}: {what}", field=field)
    if (vae.in_channels, vae.out_channels) != (3, 3):
        field = f"{where[1]}: out_channels"
        reason = f"= {vae.out_channels}, in_channels = {vae.in_channels}: images have 3"
        raise ConfigError(f"{field} {reason}", field=field)
