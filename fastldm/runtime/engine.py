"""One model on one device: its networks, and who computes their ops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import ForkError, NonFiniteError
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
    process: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.unet.conv_in.weight.device)
        object.__setattr__(self, "dtype", self.unet.conv_in.weight.dtype)
        object.__setattr__(self, "process", os.getpid())

    def encode_text(self, ids: Tensor, *, clip_skip: int = 0) -> Tensor:
        """ids: (B, L) -> the last hidden states (B, L, width), `clip_skip` layers earlier, normalised."""
        self.check_process()
        with self.using():
            return self.text_encoder(ids.to(self.device), skip=clip_skip).states

    def begin(self, job: Job) -> Run:
        """The job on buffers of its own, before its first row."""
        self.check_process()
        return Run(self, job)

    def decode(self, latents: Tensor, *, tiling: bool = False) -> Tensor:
        """latents: (B, C, H, W) -> pixels (B, 3, factor·H, factor·W) in the VAE's dtype, about −1..1.

        Raises `NonFiniteError` where a pixel is NaN or infinite: a black picture is an error, not a result.
        """
        self.check_process()
        weight = self.vae.decoder.conv_in.weight
        z = self.vae.from_latents(latents).to(weight.dtype, memory_format=torch.channels_last)
        with self.using():
            pixels = self.vae.decode(z, tiling=tiling)
        if not bool(torch.isfinite(pixels).all()):
            raise NonFiniteError(f"the decoded image is not finite in {weight.dtype}; try a wider dtype", field="image")
        return pixels

    def encode_image(self, image: Tensor, *, slicing: bool = False, tiling: bool = False) -> Posterior:
        """image: (B, 3, H, W) in −1..1 -> the posterior of z, not yet scaled."""
        self.check_process()
        weight = self.vae.encoder.conv_in.weight
        with self.using():
            return self.vae.encode(image.to(weight, memory_format=torch.channels_last), slicing=slicing, tiling=tiling)

    def check_process(self) -> None:
        """Raises `ForkError` in a fork of the process that made the engine: OpenMP and CUDA hang or crash there."""
        if os.getpid() != self.process:
            advice = "start this process with spawn, or call torch.set_num_threads(1) in it and make the pipeline here"
            raise ForkError(f"the pipeline was made in process {self.process}, and this is a fork of it: {advice}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled engine belongs to the process that reads it."""
        self.__dict__.update(state, process=os.getpid())

    @contextmanager
    def using(self) -> Iterator[None]:
        """The context in which the networks are called; autocast around it would change what they compute."""
        with ops.using(self.backend), torch.autocast(self.device.type, enabled=False):
            yield


class Run:
    """A job under way. Iterate over it: after every row it yields the row's index. Not for two threads at once."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine, self.job = engine, job
        timesteps = torch.from_numpy(job.table.timesteps.astype(np.float32)).to(engine.device)
        with engine.using():
            self.modulation = engine.unet.modulation(timesteps, job.added)
        self.plan = self._started(job)
        self._next, self._changed = 0, False

    @property
    def latents(self) -> Tensor:
        """(B, C, H, W), float32: a view of what the next row reads. What is written into it, takes effect."""
        return self.plan.state[0]

    def __iter__(self) -> Iterator[int]:
        while self._next < self.job.table.rows:
            self._changed = False
            yield from self._unchanged()

    def change(self, **fields: Any) -> None:
        """`states`, `guidance`, `extra_channels` or `inpainting` of the job: for the rows to come."""
        state, job = self.plan.state, replace(self.job, **fields)
        self.plan, self.job, self._changed = self._started(job), job, True
        self.plan.state.copy_(state)

    def result(self) -> Tensor:
        """The latents (B, C, H, W) after the last row. Raises `NonFiniteError` where they hold NaN or infinity."""
        if not bool(torch.isfinite(self.latents).all()):
            raise NonFiniteError(
                f"the latents are not finite after the last step in {self.engine.dtype}; try a wider dtype",
                field="latents",
            )
        return self.latents.clone()  # the state is a larger buffer

    def _unchanged(self) -> Iterator[int]:
        """The rows until the job is changed."""
        job = self.job
        rows = self.plan.run(job.table, job.guidance, self.modulation, job.noise, begin=self._next)
        while not self._changed:
            with self.engine.using():  # not around the yield: the caller's context is the caller's
                row = next(rows, None)
            if row is None:
                return
            self._next = row + 1
            yield row

    def _started(self, job: Job) -> Plan:
        batch, _, height, width = job.x.shape
        shape = Shape(batch, len(job.states) // batch, height, width, job.states.shape[1])
        with self.engine.using():
            plan = Plan(self.engine.unet, shape, modulations=self.modulation.shape[1])
            plan.start(job.x, states=job.states, extra_channels=job.extra_channels, inpainting=job.inpainting)
        return plan
