"""Rows of each kind of call, by a plan and by hand. Needs no diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from examples.tiny_model import SCHEDULER, UNET, random_weights
from fastldm import ops
from fastldm.config import unet_config
from fastldm.model.unet import UNet
from fastldm.ops import reference
from fastldm.request import Scales
from fastldm.runtime.graph import Graphs
from fastldm.runtime.plan import Guidance, Inpainting, Plan, Shape
from fastldm.sampling import SamplerTable, sampler_table, scheduler_config
from fastldm.tasks import guidance
from fastldm.weights.load import StateDict, fill, skeleton
from tests.numerics import assert_within_twice

SIZE, TOKENS = (8, 6), 5
SMALLEST: Mapping[str, Any] = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "norm_num_groups": 1,
    "attention_head_dim": 2,
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Given:
    """Where a run starts, by name as in `Plan.start`, and the noise of each row."""

    x: Tensor
    states: Tensor
    extra_channels: Tensor | None
    inpainting: Inpainting | None
    noise: Tensor


@dataclass(frozen=True)
class Case:
    """A kind of call. extra_channels: that the network reads behind the latents. masked: blended after every row."""

    scales: Scales
    sampler: str
    extra_channels: int = 0
    masked: bool = False
    batch: int = 1
    steps: int = 4

    @property
    def table(self) -> SamplerTable:
        betas = {name: value for name, value in SCHEDULER.items() if name.startswith("beta")}
        return sampler_table(scheduler_config({"_class_name": self.sampler, **betas}), self.steps)

    @property
    def guidance(self) -> Guidance:
        return guidance(self.scales, self.table)

    def network(self, dtype: torch.dtype, device: torch.device = CPU, **config: Any) -> UNet:
        """config: what differs from the tiny model. The weights are numbers of float16, whatever the dtype."""
        json = {**UNET, "in_channels": 4 + self.extra_channels, **config}
        model = skeleton(lambda: UNet(unet_config(json)))
        generator = torch.Generator().manual_seed(0)
        weights = random_weights(model, generator)
        for name, weight in weights.items():
            if weight.ndim == 1:  # norms and biases, which would do nothing
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
            weights[name] = weight.half().float()
        return fill(model, StateDict("random weights", weights), dtype=dtype, device=device)

    def given(self, device: torch.device = CPU) -> Given:
        """Numbers of float16 where the network reads them."""
        g, (height, width) = torch.Generator().manual_seed(1), SIZE

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).half().float().to(device)

        latents, samples = (self.batch, 4, height, width), self.scales.branches * self.batch
        seen = random(samples, self.extra_channels, height, width) if self.extra_channels else None
        blend = Inpainting((random(self.batch, 1, height, width) > 0).float(), random(*latents), random(*latents))
        return Given(
            x=self.table.start[1] * random(*latents),
            states=random(samples, TOKENS, UNET["cross_attention_dim"]),
            extra_channels=seen,
            inpainting=blend if self.masked else None,
            noise=random(self.table.rows, *latents),
        )


CASES = {
    "text to image": Case(Scales("text_to_image", 7.5, 1.0, rescale=0.7), "DPMSolverMultistepScheduler"),
    "inpainting": Case(Scales("inpaint", 7.5, 1.0, rescale=0.0), "EulerAncestralDiscreteScheduler", masked=True),
    "9 channels, one branch": Case(Scales("inpaint", 1.0, 1.0, rescale=0.0), "HeunDiscreteScheduler", extra_channels=5),
    "three branches": Case(Scales("instruct", 7.5, 1.5, rescale=0.0), "DDPMScheduler", extra_channels=4),
    "a row without guidance": Case(
        Scales("text_to_image", 7.5, 1.0, rescale=0.0, interval=(0.25, 1.0)), "DPMSolverMultistepScheduler"
    ),
}


@torch.no_grad()
def by_plan(case: Case, model: UNet, rows: int) -> Tensor:
    """The state after so many rows, (K, B, C, H, W), float32; by whoever computes the ops in this context."""
    plan, run = begun(case, model)
    assert list(islice(run, rows)) == list(range(rows))
    assert not plan.state[case.table.slots :].any(), "unused history stays zero"
    return plan.state[: case.table.slots].clone()


def begun(case: Case, model: UNet, graphs: Graphs | None = None) -> tuple[Plan, Iterator[int]]:
    """A plan, and its rows to come."""
    t, g, weight = case.table, case.guidance, model.conv_in.weight
    given, plan = case.given(weight.device), Plan(model, Shape(case.batch, *SIZE, TOKENS), graphs)
    plan.start(
        given.x,
        states=given.states.to(weight.dtype),
        extra_channels=given.extra_channels,
        inpainting=given.inpainting,
        alone=g.on is not None and not g.on.all(),
    )
    mods = model.modulation(torch.from_numpy(t.timesteps).float().to(weight.device))
    return plan, plan.run(t, g, mods, lambda r: given.noise[r] if t.draws[r] else None)


@torch.no_grad()
def by_hand(case: Case, model: UNet, rows: int) -> Tensor:
    """The same by the formulas of the papers and of `SamplerTable`: no plan, no tables on a device."""
    t, on, weight = case.table, case.guidance.on, model.conv_in.weight
    given = case.given(weight.device)
    mods = model.modulation(torch.from_numpy(t.timesteps).float().to(weight.device))
    state, noise = given.x.new_zeros(t.slots, *given.x.shape), torch.zeros_like(given.x)
    state[0] = given.x
    for r in range(rows):
        branches = case.scales.branches if on is None or on[r] else 1
        seen = (float(t.in_scale[r]) * state[0]).repeat(branches, 1, 1, 1)
        if given.extra_channels is not None:
            seen = torch.cat((seen, given.extra_channels[-len(seen) :]), dim=1)
        context = model.context(given.states[-len(seen) :].to(weight.dtype))
        e = model(seen.to(weight.dtype, memory_format=torch.channels_last), mods[r], context).to(state.dtype)
        e = guided(e.split(case.batch), case.scales)
        noise = given.noise[r] if t.draws[r] else noise
        x0 = float(t.p[r]) * state[0] + float(t.q[r]) * e
        x0 = x0.clamp(-float(t.limit[r]), float(t.limit[r]))
        old = state.clone()
        for i in range(t.slots):
            state[i] = float(t.b[r, i]) * e + float(t.c[r, i]) * noise + float(t.d[r, i]) * x0
            state[i] += sum(float(t.a[r, i, j]) * old[j] for j in range(t.slots))
        if given.inpainting is not None:
            mask, z0, n0 = (getattr(given.inpainting, name) for name in ("mask", "z0", "n0"))
            state[0] = torch.where(mask == 1, state[0], float(t.u[r]) * z0 + float(t.v[r]) * n0)
    return state


def guided(e: tuple[Tensor, ...], scales: Scales) -> Tensor:
    """arXiv 2207.12598, equation 6; 2211.09800, equation 3; 2305.08891, equations 15 and 16."""
    if len(e) == 1:
        return e[0]
    out = e[-2] + scales.text * (e[-1] - e[-2])
    if len(e) == 3:
        out = e[0] + scales.image * (e[1] - e[0]) + scales.text * (e[2] - e[1])
    deviation, of_last = (t.flatten(1).std(1)[:, None, None, None] for t in (out, e[-1]))
    return scales.rescale * out * of_last / deviation + (1 - scales.rescale) * out


def held(out: Tensor, case: Case, truth: UNet, yardstick: UNet, rows: int) -> None:
    """The 2× rule, slot by slot. truth, yardstick: the network in float32 and in half precision."""
    with ops.using("reference"):
        true, plain = (by_hand(case, model, rows).to(out.device) for model in (truth, yardstick))
    for each in zip(out, true, plain, strict=True):
        assert_within_twice(*each, rms=True)


@contextmanager
def kernels_alone() -> Iterator[None]:
    """Every op by its kernel; the reference may compute none."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("an op was computed by the reference")

    with ops.using("fused"), patch.multiple(reference, **dict.fromkeys(ops.OPS, never)):
        yield
