"""One model on one device: its networks, and who computes their ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import NonFiniteError
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import Added, UNet
from fastldm.model.vae import AutoencoderKL, Posterior
from fastldm.runtime.plan import Guidance, Inpainting, Plan, Shape
from fastldm.sampling import SamplerTable


@dataclass(frozen=True)
class Job:
    """What one sampling run needs.

    x: (B, C, H, W), the state before the first row. states: (G·B, L, context_dim), branch by branch, the fully
    conditioned one last. noise: gives row r's, (B, C, H, W), or None; called for r = 0, 1, ...
    """

    table: SamplerTable
    guidance: Guidance
    x: Tensor
    states: Tensor
    noise: Callable[[int], Tensor | None]
    added: Added | None = None
    extra_channels: Tensor | None = None
    inpainting: Inpainting | None = None


@dataclass(frozen=True)
class Engine:
    """The networks of a latent diffusion model on a device. All methods are free of side effects on the engine."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    backend: str = "reference"
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.unet.conv_in.weight.device)
        object.__setattr__(self, "dtype", self.unet.conv_in.weight.dtype)

    def encode_text(self, ids: Tensor, *, clip_skip: int = 0) -> Tensor:
        """ids: (B, L) -> the last hidden states (B, L, width), `clip_skip` layers earlier, normalised."""
        with self._using():
            return self.text_encoder(ids.to(self.device), skip=clip_skip).states

    def sample(self, job: Job) -> Iterator[Tensor]:
        """Runs the job on buffers of its own; yields the latents after every step, (B, C, H, W) float32, a view.

        Raises `NonFiniteError` after the last step where the latents hold NaN or infinity.
        """
        batch, _, height, width = job.x.shape
        shape = Shape(batch, len(job.states) // batch, height, width, job.states.shape[1])
        timesteps = torch.from_numpy(job.table.timesteps.astype(np.float32)).to(self.device)
        with self._using():
            modulation = self.unet.modulation(timesteps, job.added)
            plan = Plan(self.unet, shape, modulations=modulation.shape[1])
            plan.start(
                job.x,
                states=job.states,
                extra_channels=job.extra_channels,
                inpainting=job.inpainting,
            )
        steps = plan.run(job.table, job.guidance, modulation, job.noise)
        while True:
            with self._using():  # not around the yield: the caller's context is the caller's
                if next(steps, None) is None:
                    break
            yield plan.state[0]
        if not bool(torch.isfinite(plan.state[0]).all()):
            raise NonFiniteError(
                f"the latents are not finite after the last step in {self.dtype}; try a wider dtype",
                field="latents",
            )

    def decode(self, latents: Tensor, *, slicing: bool = False, tiling: bool = False) -> Tensor:
        """latents: (B, C, H, W) -> pixels (B, 3, factor·H, factor·W) in the VAE's dtype, about −1..1.

        Raises `NonFiniteError` where a pixel is NaN or infinite: a black picture is an error, not a result.
        """
        weight = self.vae.decoder.conv_in.weight
        z = self.vae.from_latents(latents).to(weight.dtype, memory_format=torch.channels_last)
        with self._using():
            pixels = self.vae.decode(z, slicing=slicing, tiling=tiling)
        if not bool(torch.isfinite(pixels).all()):
            raise NonFiniteError(f"the decoded image is not finite in {weight.dtype}; try a wider dtype", field="image")
        return pixels

    def encode_image(self, image: Tensor, *, slicing: bool = False, tiling: bool = False) -> Posterior:
        """image: (B, 3, H, W) in −1..1 -> the posterior of z, not yet scaled."""
        weight = self.vae.encoder.conv_in.weight
        with self._using():
            return self.vae.encode(image.to(weight, memory_format=torch.channels_last), slicing=slicing, tiling=tiling)

    def _using(self) -> AbstractContextManager[object]:
        return ops.using(self.backend)
