"""Checkpoints by names and shapes alone, without the gigabytes: values are made up when one is read."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastldm.config import text_config, unet_config, vae_config
from fastldm.errors import Error
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.weights.header import DTYPES, TensorInfo
from fastldm.weights.keymap import addresses
from fastldm.weights.load import Tensors, matched, skeleton
from fastldm.weights.single import Checkpoint
from tests.weights import originals

FILE = "model.safetensors"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
V_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"  # tells the v-models of SD 2
NETWORKS: dict[str, tuple[Callable[..., Any], type[nn.Module]]] = {
    "unet": (unet_config, UNet),
    "vae": (vae_config, AutoencoderKL),
    "text_encoder": (text_config, TextEncoder),
    "text_encoder_2": (text_config, TextEncoder),
}


class Named:
    """What a file of these tensors would be. Values differ by name and spread as the standard deviation says."""

    where = FILE

    def __init__(self, tensors: originals.Tensors, spread: float = 0.05) -> None:
        self.spread = spread
        self.infos = {k: TensorInfo(k, DTYPES[dtype], shape) for k, (shape, dtype) in tensors.items()}
        self.read_names: list[str] = []

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        info = self.infos[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return (self.spread * torch.randn(info.shape, generator=generator)).to(info.dtype)


def checkpoint(tensors: originals.Tensors, *, spread: float = 0.05, **options: Any) -> Checkpoint:
    return Checkpoint(Named(tensors, spread), **options)


def parsed(found: Checkpoint, component: str) -> Any:
    """The configuration of a component, as the model is built from it."""
    part = found.part(component)
    return NETWORKS[component][0](part.json, part.where)


@functools.lru_cache(maxsize=64)
def network(component: str, config: Any) -> nn.Module:
    return skeleton(lambda: NETWORKS[component][1](config))


@functools.lru_cache(maxsize=64)
def hub_names(component: str, config: Any) -> tuple[str, ...]:
    return tuple(addresses(network(component, config)))


def opened(found: Checkpoint, component: str) -> Tensors:
    """The tensors of a component under the hub's names, after every name was checked."""
    part = found.part(component)
    config = NETWORKS[component][0](part.json, part.where)
    return part.open(config, hub_names(component, config))


def placed(found: Checkpoint, component: str) -> nn.Module:
    """The model of a component, after every name and shape was checked."""
    model = network(component, parsed(found, component))
    matched(model, opened(found, component))
    return model


def read_all(tensors: originals.Tensors, **options: Any) -> dict[str, nn.Module]:
    found = checkpoint(tensors, **options)
    return {component: placed(found, component) for component in found.found.sections}


def refused(tensors: originals.Tensors, component: str = "unet", **options: Any) -> Error:
    """The error that reading this component of a file ends in."""
    with pytest.raises(Error) as caught:
        placed(checkpoint(tensors, **options), component)
    return caught.value


def without(tensors: originals.Tensors, *names: str) -> originals.Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def under(tensors: originals.Tensors, prefix: str) -> originals.Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
