"""A fake network, diffusers' loop around one of its schedulers, and the interpreter of a table: both in float64."""

from __future__ import annotations

import importlib
import inspect
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from fastldm.sampling import SamplerTable

SHAPE = (2, 3, 2, 2)
_rng = np.random.default_rng(20240611)
_MIX = np.linalg.qr(_rng.standard_normal((12, 12)))[0] * 0.9
_PHASE = _rng.uniform(0, 6.28, 12)
logging.getLogger("diffusers").setLevel(logging.ERROR)


def net(x: np.ndarray, t: float) -> np.ndarray:
    """A bounded, smooth function of x and t that mixes all elements of a sample."""
    flat = x.reshape(len(x), -1)
    return np.tanh(flat @ _MIX + np.sin(t / 300 + _PHASE)).reshape(x.shape)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, *SHAPE))


def run_table(
    table: SamplerTable,
    network: Any,
    x: np.ndarray,
    noises: np.ndarray,
    mask: float = 1.0,
    z0: Any = 0.0,
    n0: Any = 0.0,
) -> np.ndarray:
    """The formula of a table, in NumPy. noises: one for each row."""
    state = np.zeros((table.slots, *x.shape))
    state[0] = x
    for r in range(table.rows):
        e = network(table.in_scale[r] * state[0], table.timesteps[r])
        x0 = np.clip(table.p[r] * state[0] + table.q[r] * e, -table.limit[r], table.limit[r])
        state = (
            np.tensordot(table.a[r], state, 1)
            + np.multiply.outer(table.b[r], e)
            + np.multiply.outer(table.c[r], noises[r])
            + np.multiply.outer(table.d[r], x0)
        )
        state[0] = mask * state[0] + (1 - mask) * (table.u[r] * z0 + table.v[r] * n0)
    return state[0]


class _Double:
    """torch, where float32 means float64: schedulers cast their state to float32 by that name."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@dataclass
class Trace:
    """What a scheduler's loop did."""

    x: np.ndarray
    timesteps: list[float]
    draws: list[bool]
    start: float
    scheduler: Any


def scheduler_of(name: str, config: dict[str, Any]) -> Any:
    """The scheduler. Several build a schedule of 1000 steps on construction, in a second; here that is left empty."""
    kind = getattr(diffusers, name)
    quick = {
        "_sigma_to_t": lambda self, sigma, *rest: np.zeros(np.shape(sigma)),
        "_convert_to_beta": lambda self, in_sigmas, **rest: in_sigmas,
    }
    with entered([mock.patch.object(kind, k, v) for k, v in quick.items() if hasattr(kind, k) and "Flow" not in name]):
        return kind(**config)


def run_diffusers(
    name: str,
    config: dict[str, Any],
    steps: int,
    *,
    seed: int = 0,
    begin: int = 0,
    eta: float = 0.0,
    x: np.ndarray | None = None,
    exact: bool = True,
    **schedule: Any,
) -> Trace:
    """diffusers' own loop. x: the state to start from, else scaled noise.

    exact: in float64; else as it is, in float32.
    """
    scheduler = scheduler_of(name, config)
    arguments = schedule if schedule.keys() & {"timesteps", "sigmas"} else {"num_inference_steps": steps, **schedule}
    scheduler.set_timesteps(**arguments)
    order = scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * order)
    if exact:
        widen(scheduler)
    ts = scheduler.timesteps[begin * order :]
    noises, draws = normal(seed + 1, len(ts)), [False] * len(ts)
    row = 0
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    dtype = torch.float64 if exact else torch.float32
    state = torch.from_numpy(normal(seed) * start if x is None else x).to(dtype)

    def noise(*args: Any, **kwargs: Any) -> torch.Tensor:
        draws[row] = True
        return torch.from_numpy(noises[row]).to(dtype)

    accepted = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta} if "eta" in accepted else {}
    module = importlib.import_module(type(scheduler).__module__)
    patches = [mock.patch.object(module, "torch", _Double())] if exact else []
    if hasattr(module, "randn_tensor"):
        patches.append(mock.patch.object(module, "randn_tensor", noise))
    with entered(patches):
        for t in ts:
            scaled = scheduler.scale_model_input(state, t) if hasattr(scheduler, "scale_model_input") else state
            e = torch.from_numpy(net(scaled.numpy(), float(t))).to(dtype)
            state = scheduler.step(e, t, state, **extra).prev_sample
            row += 1
    return Trace(state.numpy(), [float(t) for t in ts], draws, start, scheduler)


def widen(scheduler: Any) -> None:
    """The scheduler's float32 tables as float64, with the same values."""
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and key != "timesteps":
            setattr(scheduler, key, value.double())
    if isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler):
        _exact_ancestral(scheduler)
    if isinstance(scheduler, diffusers.LMSDiscreteScheduler):
        scheduler.sigmas = scheduler.sigmas.numpy()  # its quadrature takes seconds on tensors


def _exact_ancestral(scheduler: Any) -> None:
    """KDPM2Ancestral's tables by its own formula, but in float64: its sigma_down is a difference of nearly equals."""
    now = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    then = torch.cat([now[1:], now[:1] * 0])
    up = (then**2 * (now**2 - then**2) / now**2) ** 0.5
    down = (then**2 - up**2) ** 0.5
    middle = (now * down) ** 0.5
    up[-1], down[-1], middle[-2:] = 0.0, 0.0, 0.0
    for key, table in (("up", up), ("down", down), ("interpol", middle)):
        spread = torch.cat([table[:1], table[1:].repeat_interleave(2), table[-1:]])
        setattr(scheduler, f"sigmas_{key}", spread)


@contextmanager
def entered(patches: list[Any]) -> Any:
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest element, or to 1 where there are only zeros."""
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))
