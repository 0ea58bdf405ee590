"""Our model with the weights of a module of diffusers or transformers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from fastldm.config import text_config, unet_config, vae_config
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from tests.oracle import relative_error
from tests.weights.memory_tensors import loaded

TOLERANCE = 1e-5


def unet_pair(dtype: torch.dtype = torch.float32, **data: Any) -> tuple[UNet, diffusers.UNet2DConditionModel]:
    ref = diffusers.UNet2DConditionModel(**{"in_channels": 4, "out_channels": 4, "sample_size": 16, **data}).eval()
    config = unet_config(dict(ref.config))
    return loaded(lambda: UNet(config), randomised(ref).state_dict(), dtype), ref


def vae_pair(**data: Any) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    levels = len(data["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    ref = diffusers.AutoencoderKL(**types, **data).eval()
    config = vae_config(dict(ref.config))
    return loaded(lambda: AutoencoderKL(config), randomised(ref).state_dict()), ref


def text_pair(model: type, **data: Any) -> tuple[TextEncoder, Any]:
    ref = model(transformers.CLIPTextConfig(**data)).eval()
    config = text_config({**ref.config.to_dict(), "architectures": [model.__name__]})
    return loaded(lambda: TextEncoder(config), randomised(ref).state_dict()), ref


def randomised(model: nn.Module) -> nn.Module:
    """Norms and biases start as ones and zeros: an exchanged or forgotten one would not show."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= TOLERANCE
