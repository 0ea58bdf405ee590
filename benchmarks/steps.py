"""One denoising step of a U-Net with random weights: the guided network and the sampler, fastldm's and its peers'.

What is done once for an image is outside: for fastldm the text's keys and values and the time embeddings, for both
the sampler's timesteps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import painters, random_models
from benchmarks.cells import COMPILED, Cell
from benchmarks.harness import between, mark, synchronize
from fastldm import ops
from fastldm.config import UNetConfig
from fastldm.model.layers import derive
from fastldm.model.unet import Added, UNet
from fastldm.runtime.build import Held
from fastldm.runtime.graph import CudaGraphs, Eager
from fastldm.runtime.plan import Guidance, Plan, Shape
from fastldm.sampling import sampler_table, scheduler_config
from fastldm.weights.load import skeleton

TOKENS, NUMBERS = 77, 6
STEPS = 20  # of the sampler's table
SCHEDULER = {**random_models.SCHEDULER, "_class_name": "DDIMScheduler", "clip_sample": False}
ENQUEUED = 100  # rows for the host's time
WARM = 0.5  # seconds of products before the one that is timed
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Job:
    """unet: ours, whose weights all arms have. x: (B, 4, H, W), the latents. states: (G·B, 77, context).

    added: of SDXL. backend: of fastldm.
    """

    cell: Cell
    unet: UNet
    x: Tensor
    states: Tensor
    added: Added | None
    backend: str

    @classmethod
    def random(cls, cell: Cell, device: torch.device, backend: str) -> Self:
        dtype = getattr(torch, cell.dtype)
        unet = random_models.network(cell.model, "unet", dtype, device)
        generator, config = torch.Generator().manual_seed(1), unet.config

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        rows, added = cell.batch * cell.branches, None
        if config.added is not None:
            pooled = normal(rows, config.added.total_dim - NUMBERS * config.added.number_dim)
            numbers = [cell.height, cell.width, 0, 0, cell.height, cell.width]
            added = Added(pooled, torch.tensor([numbers] * rows, dtype=torch.float32, device=device))
        x = normal(cell.batch, config.out_channels, cell.height // 8, cell.width // 8)
        return cls(cell, unet, x, normal(rows, TOKENS, config.context_dim), added, backend)


# ----------------------------------------------------------------------------------------------------------------- arms


def ours(job: Job) -> Step:
    return _row(job, job.backend)


def reference(job: Job) -> Step:
    return _row(job, "reference")


def _row(job: Job, backend: str) -> Step:
    """A row of the plan, as the loop runs it; captured where it would be."""
    plan = planned(job, backend)

    @torch.no_grad()
    def step() -> Tensor:
        plan.state[0] = job.x
        plan.row.zero_()
        with ops.using(backend):
            plan.replay(job.cell.branches)
        return plan.state[0]

    return step


@torch.no_grad()
def planned(job: Job, backend: str) -> Plan:
    """Before its first row."""
    unet, scale = job.unet, job.cell.guidance
    table, device = sampler_table(scheduler_config(SCHEDULER), STEPS), unet.conv_in.weight.device
    weights = [1 - scale, scale] if job.cell.branches == 2 else [1.0]
    guidance = Guidance(np.tile(weights, (table.rows, 1)), np.zeros(table.rows))
    batch, _, height, width = job.x.shape
    captures = device.type == "cuda" and backend != "reference"
    if backend != "reference":
        derive(unet)
    shape = Shape(batch, height, width, TOKENS, shared=job.added is None)
    plan = Plan(unet, shape, CudaGraphs(device) if captures else Eager())
    with ops.using(backend):
        timesteps = torch.from_numpy(table.timesteps.astype(np.float32)).to(device)
        modulation = unet.modulation(timesteps, job.added)
        plan.start(job.x.to(plan.state.dtype), states=job.states)
        plan.fill(slice(0, table.rows), table, guidance, modulation)
    return plan


def theirs(job: Job) -> Step:
    return _their_step(_their_unet(job), job)


def theirs_compiled(job: Job) -> Step:
    peer = _their_unet(job).to(memory_format=torch.channels_last)
    peer.fuse_qkv_projections()
    return _their_step(painters.compiled(peer), job)


ARMS: Mapping[str, Callable[[Job], Step]] = {
    "fastldm": ours,
    "fastldm-reference": reference,
    "diffusers": theirs,
    COMPILED: theirs_compiled,
}


def _their_unet(job: Job) -> Any:
    """diffusers' U-Net with the same weights."""
    library = painters.quiet_diffusers()
    weight, held = job.unet.conv_in.weight, Held(job.cell.model, job.unet)
    config = {k: v for k, v in random_models.MODELS[job.cell.model]["unet"].items() if not k.startswith("_")}
    with torch.device("meta"):
        peer = library.UNet2DConditionModel(**config)
    peer = peer.to(weight.dtype).to_empty(device=weight.device).eval().requires_grad_(False)
    with torch.no_grad():
        for name, target in peer.named_parameters():
            target.copy_(held.read(name).view(target.shape))
    return peer


def _their_step(unet: Any, job: Job) -> Step:
    scheduler = painters.quiet_diffusers().DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(STEPS)
    t, added, scale = scheduler.timesteps[0], None, job.cell.guidance
    on_device = t.to(job.x.device)  # for the network; the scheduler's table is on the host
    if job.added is not None:
        added = {"text_embeds": job.added.text, "time_ids": job.added.numbers}

    @torch.no_grad()
    def step() -> Tensor:
        x = torch.cat([job.x] * job.cell.branches)
        e = unet(x, on_device, encoder_hidden_states=job.states, added_cond_kwargs=added, return_dict=False)[0]
        if job.cell.branches == 2:
            uncond, cond = e.chunk(2)
            e = uncond + scale * (cond - uncond)
        result: Tensor = scheduler.step(e, t, job.x).prev_sample
        return result

    return step


# ------------------------------------------------------------------------------------------------------- what they take


def intervals(step: Step, device: str, count: int) -> list[float]:
    """Seconds of each of so many steps in a row."""
    marks = [mark(device)]
    for _ in range(count):
        step()
        marks.append(mark(device))
    synchronize(device)
    return [between(a, b) for a, b in pairwise(marks)]


def host_time(job: Job) -> float:
    """Seconds that the host takes to ask a GPU for a row, which it does not wait for."""
    plan = planned(job, job.backend)
    with torch.no_grad(), ops.using(job.backend):
        synchronize("cuda")
        start = time.perf_counter()
        for _ in range(ENQUEUED):
            plan.replay(job.cell.branches)
        seconds = time.perf_counter() - start
        synchronize("cuda")
    return seconds / ENQUEUED


def flops(config: UNetConfig, cell: Cell) -> float:
    """Of a step's products and convolutions in their plain form, 2 for a multiplication and addition.

    The text's keys and values are not among them, as they are the same in every step.
    """
    unet, rows = skeleton(lambda: UNet(config)), cell.batch * cell.branches
    with torch.device("meta"), ops.using("reference"), FlopCounterMode(display=False) as counter:
        x = torch.empty(rows, config.in_channels, cell.height // 8, cell.width // 8)
        context = unet.split_context(torch.empty(rows, TOKENS, len(unet.context_projections.weight)))
        unet(x, torch.empty(rows, len(unet.time_projections.weight)), context)
    return float(counter.get_total_flops())


@cache
def peak(dtype: str, device: str) -> float:
    """TFLOP/s of a large product: on a GPU the median after a while of them, on a CPU the best, also of float32's.

    A CPU without instructions for a dtype is faster in float32, which fastldm makes use of.
    """
    if device == "cpu":
        return max(_products(2048, kind, device, 3) for kind in {dtype, "float32"})
    return _products(8192, dtype, device, 51)


def _products(side: int, dtype: str, device: str, count: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in "ab")
    end = time.perf_counter() + (WARM if device == "cuda" else 0)
    while time.perf_counter() < end:
        torch.mm(a, b)
        synchronize(device)
    times = sorted(intervals(lambda: torch.mm(a, b), device, count))
    return 2 * side**3 / (times[0] if device == "cpu" else times[len(times) // 2]) / 1e12
