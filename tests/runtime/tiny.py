"""A tiny U-Net and tables for the loop's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.model.unet import UNet
from fastldm.runtime.graph import Graphs
from fastldm.runtime.plan import Guidance, Plan, Shape
from fastldm.sampling import SamplerTable, sampler_table, scheduler_config
from tests.model.loading import unet_pair
from tests.oracle import SD1, SD_BETAS

SIZE = (8, 6)


def unet(**config: Any) -> UNet:
    return unet_pair(cross_attention_dim=24, **{**SD1, "layers_per_block": 1, **config})[0]


def table(steps: int, kind: str = "DDIMScheduler", *, eta: float = 0.0, **config: Any) -> SamplerTable:
    data = {"_class_name": kind, **SD_BETAS, "prediction_type": "epsilon", **config}
    if kind == "DDIMScheduler":
        data |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return sampler_table(scheduler_config(data), steps, eta=eta)


def guidance(rows: int, *weights: float, rescale: float = 0.0) -> Guidance:
    return Guidance(np.tile(weights or (1.0,), (rows, 1)), np.full(rows, rescale))


def plan_for(model: UNet, batch: int = 1, length: int = 5, graphs: Graphs | None = None) -> Plan:
    return Plan(model, Shape(batch, *SIZE, length), graphs)


def modulations(model: UNet, t: SamplerTable) -> Tensor:
    return model.modulation(torch.from_numpy(t.timesteps.astype(np.float32)))


def with_history(t: SamplerTable, slots: int, seed: int = 0) -> SamplerTable:
    """The same rows with made-up coefficients over several slots of state, a draw now and then, and clipping."""
    g = np.random.default_rng(seed)
    rows = t.rows
    return replace(
        t,
        in_scale=g.uniform(0.5, 1.0, rows),
        a=g.uniform(-0.5, 0.5, (rows, slots, slots)),
        b=g.uniform(-0.5, 0.5, (rows, slots)),
        c=g.uniform(-0.5, 0.5, (rows, slots)),
        d=g.uniform(-0.5, 0.5, (rows, slots)),
        p=g.uniform(-1, 1, rows),
        q=g.uniform(-1, 1, rows),
        limit=np.where(g.random(rows) < 0.5, np.inf, 0.7),
        draws=g.random(rows) < 0.4,
        ends_step=(g.random(rows) < 0.6) | (np.arange(rows) == rows - 1),
    )


@torch.no_grad()
def by_hand(model: UNet, t: SamplerTable, g: Guidance, x: Tensor, states: Tensor, noises: dict[int, Tensor]) -> Tensor:
    """The run as the sampler's table says, in Python: no plan, no buffers, no refill."""
    mods, context, batch = modulations(model, t), model.context(states), len(x)
    state = torch.zeros(t.slots, *x.shape)
    state[0], noise = x, torch.zeros_like(x)
    for r in range(t.rows):
        noise = noises.get(r, noise)
        rows = (float(t.in_scale[r]) * state[0]).repeat(g.weights.shape[1], 1, 1, 1)
        e = model(rows.contiguous(memory_format=torch.channels_last), mods[r], context)
        e = sum(float(w) * part for w, part in zip(g.weights[r], e.split(batch), strict=True))
        limit = float(t.limit[r])
        x0 = (float(t.p[r]) * state[0] + float(t.q[r]) * e).clamp(-limit, limit)
        old = state.clone()
        for i in range(t.slots):
            state[i] = sum(float(t.a[r, i, j]) * old[j] for j in range(t.slots))
            state[i] += float(t.b[r, i]) * e + float(t.c[r, i]) * noise + float(t.d[r, i]) * x0
    return state
