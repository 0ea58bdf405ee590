"""One model on one device: its networks, and who computes their ops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm import ops
from fastldm.errors import ForkError, NonFiniteError
from fastldm.model.clip import TextEncoder
from fastldm.model.layers import derive
from fastldm.model.unet import Added, UNet
from fastldm.model.vae import AutoencoderKL, Posterior
from fastldm.runtime.graph import CudaGraphs, Eager, Graphs, Stage
from fastldm.runtime.merge import Merged
from fastldm.runtime.plan import Guidance, Inpainting, Plan, Shape
from fastldm.runtime.pool import Pool
from fastldm.sampling import SamplerTable

NETWORKS = ("unet", "vae", "text_encoder")
Function = Callable[..., tuple[Tensor, ...]]
KEPT_BYTES = 2 << 30  # of plans and stages that no call uses, where making them anew would be capturing them anew


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
    """The networks of a latent diffusion model on a device; any number of threads may call it.

    backend: who computes the ops, see `fastldm.ops`. On a GPU all but "reference" is captured in graphs. pool: plans
    and stages from one call for the next. weights: of each network, to be changed in place while no call runs.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    backend: str = "reference"
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    process: int = field(init=False)
    graphs: Graphs = field(init=False, compare=False)
    pool: Pool = field(init=False, compare=False)
    weights: dict[str, Merged] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        weight = self.unet.conv_in.weight
        device = weight.device
        captures = device.type == "cuda" and self.backend != "reference"
        graphs: Graphs = CudaGraphs(device) if captures else Eager()
        made = {
            "device": device,
            "dtype": weight.dtype,
            "process": os.getpid(),
            "graphs": graphs,
            "pool": Pool(KEPT_BYTES if captures else 0),
            "weights": {name: Merged(getattr(self, name), graphs.turn) for name in NETWORKS},
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)
        if self.backend != "reference":
            with torch.inference_mode(False), torch.no_grad():
                for name in NETWORKS:
                    derive(getattr(self, name))

    def encode_text(self, ids: Tensor, *, clip_skip: int = 0) -> Tensor:
        """ids: (B, L) -> the last hidden states (B, L, width), `clip_skip` layers earlier, normalised."""
        self.check_process()
        (states,) = self._staged(
            ("text", ids.shape, clip_skip),
            lambda ids: (self.text_encoder(ids, skip=clip_skip).states,),
            ids.to(self.device),
        )
        return states

    @contextmanager
    def begin(self, job: Job) -> Iterator[Run]:
        """The job before its first row; in this context it has a plan of its own."""
        self.check_process()
        with ExitStack() as leases:
            yield Run(self, job, leases)

    @torch.no_grad()
    def prepare(self, shape: Shape, branches: int, *, decoded: int = 1, tiling: bool = False) -> None:
        """Captures what calls to come need, where that is done here: a prompt, a row, `decoded` images at once."""
        self.check_process()
        if not self.graphs.captures:
            return
        with self.using(), self.graphs.turn(), self.plan(shape) as plan:
            plan.of(branches)
        self.encode_text(torch.zeros(1, shape.length, dtype=torch.int64))
        latents = (decoded, self.vae.config.latent_channels, shape.height, shape.width)
        self._decoded(torch.zeros(latents, device=self.device), tiling)

    def plan(self, shape: Shape) -> AbstractContextManager[Plan]:
        """A plan that nobody else has in this context."""
        return self.pool.lease(shape, lambda: Plan(self.unet, shape, self.graphs))

    def decode(self, latents: Tensor, *, tiling: bool = False) -> Tensor:
        """latents: (B, C, H, W) -> pixels (B, 3, factor·H, factor·W) in the VAE's dtype, about −1..1.

        Raises `NonFiniteError` where a pixel is NaN or infinite: a black picture is an error, not a result.
        """
        self.check_process()
        pixels, finite = self._decoded(latents, tiling)
        if not bool(finite):
            reason = f"the decoded image is not finite in {pixels.dtype}; try a wider dtype"
            raise NonFiniteError(reason, field="image")
        return pixels

    def _decoded(self, latents: Tensor, tiling: bool) -> tuple[Tensor, ...]:
        """The pixels, and whether they are finite, which the host does not know yet."""
        weight = self.vae.decoder.conv_in.weight
        z = self.vae.from_latents(latents).to(weight.dtype, memory_format=torch.channels_last)

        def decoded(z: Tensor) -> tuple[Tensor, Tensor]:
            pixels = self.vae.decode(z, tiling=tiling)
            return pixels, torch.isfinite(pixels).all()

        return self._staged(("decode", z.shape, tiling), decoded, z)

    def encode_image(self, image: Tensor, *, slicing: bool = False, tiling: bool = False) -> Posterior:
        """image: (B, 3, H, W) in −1..1 -> the posterior of z, not yet scaled."""
        self.check_process()
        weight = self.vae.encoder.conv_in.weight
        with self.using():
            return self.vae.encode(image.to(weight, memory_format=torch.channels_last), slicing=slicing, tiling=tiling)

    def _staged(self, key: tuple[object, ...], function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(*inputs), captured where that is done here. key: all that its work depends on but the numbers."""
        with self.using():
            if not self.graphs.captures:
                return function(*inputs)
            with self.graphs.turn(), self.pool.lease(key, lambda: Stage(self.graphs, function, inputs)) as stage:
                return stage(*inputs)

    def check_process(self) -> None:
        """Raises `ForkError` in a fork of the process that made the engine: OpenMP and CUDA hang or crash there."""
        if os.getpid() != self.process:
            advice = "start this process with spawn, or call torch.set_num_threads(1) in it and make the pipeline here"
            raise ForkError(f"the pipeline was made in process {self.process}, and this is a fork of it: {advice}")

    def __getstate__(self) -> dict[str, Any]:
        """A pickled engine belongs to the process that reads it."""
        return {name: getattr(self, name) for name in (*NETWORKS, "backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @contextmanager
    def using(self) -> Iterator[None]:
        """The context in which the networks are called; autocast around it would change what they compute."""
        with ops.using(self.backend), torch.autocast(self.device.type, enabled=False):
            yield


class Run:
    """A job under way. Iterate over it: after every row it yields the row's index. Not for two threads at once.

    leases: holds the plan as long as the run may use it.
    """

    def __init__(self, engine: Engine, job: Job, leases: ExitStack) -> None:
        self.engine, self.job, self._leases = engine, job, leases
        timesteps = torch.from_numpy(job.table.timesteps.astype(np.float32)).to(engine.device)
        with engine.using():
            self.modulation = engine.unet.modulation(timesteps, job.added)
        self.plan = self._started(job, None)
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
        state, job = self.plan.state.clone(), replace(self.job, **fields)
        self.plan, self.job, self._changed = self._started(job, self.plan), job, True
        self.plan.state.copy_(state)

    def result(self) -> Tensor:
        """The latents (B, C, H, W) after the last row. Raises `NonFiniteError` where they hold NaN or infinity."""
        latents = self.latents.clone()  # the state is a larger buffer, and the next run's
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteError(
                f"the latents are not finite after the last step in {self.engine.dtype}; try a wider dtype",
                field="latents",
            )
        return latents

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

    def _started(self, job: Job, present: Plan | None) -> Plan:
        """present: its plan, which stays where it fits."""
        batch, _, height, width = job.x.shape
        shape = Shape(batch, height, width, job.states.shape[1], shared=self.modulation.shape[1] == 1)
        engine, on = self.engine, job.guidance.on
        with engine.using(), engine.graphs.turn():
            if present is not None and present.shape == shape:
                plan = present
            else:
                self._leases.close()
                plan = self._leases.enter_context(engine.plan(shape))
            plan.start(
                job.x,
                states=job.states,
                extra_channels=job.extra_channels,
                inpainting=job.inpainting,
                alone=on is not None and not on.all(),
            )
        return plan
