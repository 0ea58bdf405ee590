"""Checkpoints in memory: what `load` asks of the tensors on disk, over a dictionary."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from fastldm.config import text_config, unet_config, vae_config
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.weights.load import load
from tests import oracle

CPU = torch.device("cpu")


class Dictionary:
    """A state dict that `load` can read."""

    where = "memory"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.infos: Any = {k: SimpleNamespace(name=k, shape=tuple(v.shape), dtype=v.dtype) for k, v in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].contiguous()


def loaded(build: Callable[[], nn.Module], tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    return load(build, Dictionary(tensors), dtype=dtype, device=CPU)


# ------------------------------------------------------------------------------------ one tiny model of each kind


def unet() -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    ref = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=24, **oracle.SD1)
    config = unet_config(dict(ref.config))
    return lambda: UNet(config), ref.state_dict()


def vae() -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    ref = oracle.autoencoder()
    config = vae_config(dict(ref.config))
    return lambda: AutoencoderKL(config), ref.state_dict()


def text_encoder() -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    size = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    ref = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(vocab_size=50, projection_dim=12, **size)
    )
    config = text_config({**ref.config.to_dict(), "architectures": ["CLIPTextModelWithProjection"]})
    return lambda: TextEncoder(config), ref.state_dict()


KINDS = {"unet": unet, "vae": vae, "text encoder": text_encoder}
