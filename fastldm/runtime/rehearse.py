"""What a call does, on tensors without memory: to ask who would compute its ops, or which kernels it would launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from fastldm import ops
from fastldm.config import TextConfig, UNetConfig, VAEConfig
from fastldm.model.clip import TextEncoder
from fastldm.model.layers import derive
from fastldm.model.unet import Added, UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime.engine import Engine
from fastldm.runtime.plan import Plan, Shape
from fastldm.weights.load import skeleton

STEPS = 20  # for which the timesteps are embedded; of no influence on who does it
NUMBERS = 6  # of a sample, where there are added conditions: original size, crop, target size

PARTS = ("text", "steps", "row", "decode")


@dataclass(frozen=True)
class Networks:
    """The networks of an engine, without their weights. dtype: of the U-Net and the text encoder."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    dtype: torch.dtype
    vae_dtype: torch.dtype

    @classmethod
    def of(cls, engine: Engine) -> Self:
        configs = engine.unet.config, engine.vae.config, engine.text_encoder.config
        return cls(*configs, engine.dtype, engine.vae.decoder.conv_in.weight.dtype)


def parts(networks: Networks, shape: Shape, branches: int) -> dict[str, Callable[[], object]]:
    """What is done for the prompt (its context too), for all steps at once, in a row of the sampler, and at the end.

    shape: of the latents.
    """
    dtype = networks.dtype
    unet = skeleton(lambda: UNet(networks.unet)).to(dtype)
    vae = skeleton(lambda: AutoencoderKL(networks.vae)).to(networks.vae_dtype)
    text = skeleton(lambda: TextEncoder(networks.text)).to(dtype)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        derive(network)
    samples, added = branches * shape.batch, networks.unet.added
    plan = Plan(unet, replace(shape, shared=added is None))
    plan.of(branches)

    def new(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    ids = new(samples, shape.length, dtype=torch.int64)
    states = new(samples, shape.length, networks.unet.context_dim, dtype=dtype)
    timesteps = new(STEPS, dtype=ops.compute_dtype(dtype))
    conditions = None
    if added is not None:
        count = min(NUMBERS, (added.total_dim - 1) // added.number_dim)
        pooled = new(samples, added.total_dim - count * added.number_dim, dtype=dtype)
        conditions = Added(pooled, new(samples, count, dtype=torch.float32))
    latents = new(shape.batch, networks.vae.latent_channels, shape.height, shape.width, dtype=networks.vae_dtype)
    latents = latents.to(memory_format=torch.channels_last)
    return {
        "text": lambda: (text(ids), unet.context(states)),
        "steps": lambda: unet.modulation(timesteps, conditions),
        "row": lambda: plan.replay(branches),
        "decode": lambda: ops.to_uint8(vae.decode(latents)),
    }
