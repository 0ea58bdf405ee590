"""Models of the published shapes with random weights: time and memory do not depend on the values.

network("sdxl", "unet", torch.float16, device)        # in memory
write("sd15", folder, torch.float16, device)          # in diffusers' layout, for whoever reads that
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.assets import SHAPES
from fastldm.config import UNetConfig, unet_config
from fastldm.runtime.build import planned
from fastldm.runtime.engine import Engine
from fastldm.sampling import scheduler_config
from fastldm.save import save
from fastldm.tokenizer_files import TokenizerAt
from fastldm.weights.files import open_model
from fastldm.weights.header import TensorInfo
from fastldm.weights.keymap import addresses
from fastldm.weights.load import fill
from fastldm.weights.single import Part
from tests.model import full_size

# SD 1.5's published autoencoders do not say `force_upcast`. fastldm then decodes in float32 where float16 is asked for,
# diffusers in float16. Here both do the latter.
_VAE = {"force_upcast": False}
MODELS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {
        "unet": full_size.SD15_UNET,
        "vae": full_size.SD15_VAE | _VAE,
        "text_encoder": full_size.CLIP_L,
    },
    "sd21": {
        "unet": full_size.SD21_UNET,
        "vae": full_size.SD21_VAE | _VAE,
        "text_encoder": full_size.OPENCLIP_H,
    },
    "sdxl": {"unet": full_size.SDXL_UNET},
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


class Random:
    """Seeded tensors for every name of a network: normal with the variance of the inverse fan-in, norms 1, biases 0."""

    where = "random weights"

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator(device).manual_seed(0)
        self.infos = {}
        for name, at in addresses(network).items():
            shape = tuple(network.get_parameter(at.parameter)[at.start : at.stop].shape)
            self.infos[name] = TensorInfo(name, torch.float32, shape)

    def read(self, name: str) -> Tensor:
        shape = self.infos[name].shape
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), device=self._device)
        fan_in = math.prod(shape[1:])
        return torch.randn(shape, generator=self._generator, device=self._device) * fan_in**-0.5


def unet_config_of(model: str) -> UNetConfig | None:
    """None for what is no name of these models."""
    return unet_config(MODELS[model]["unet"]) if model in MODELS else None


def network(model: str, component: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A component of ours, ready to run. component: "unet", "vae" or "text_encoder"."""
    json = MODELS[model][component]
    empty = planned(component, Part(json, f"{model}'s {component}", _never_opened))
    return fill(empty, Random(empty, device), dtype=dtype, device=device)


def engine_of(model: str, dtype: torch.dtype, device: torch.device) -> Engine:
    unet, vae, text = (network(model, name, dtype, device) for name in ("unet", "vae", "text_encoder"))
    return Engine(unet=unet, vae=vae, text_encoder=text)


def write(model: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """A new folder in diffusers' layout, with the embedded model's tokenizer, which spells any text."""
    engine = engine_of(model, dtype, device)
    words = TokenizerAt(open_model(SHAPES), "tokenizer").made(engine.text_encoder.config)
    save(engine, words, scheduler_config(SCHEDULER), folder)


def _never_opened(*_: object) -> Any:
    raise AssertionError("random weights are read from no file")
