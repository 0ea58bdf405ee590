"""The arguments of one run, checked by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastldm.errors import ArgumentError
from fastldm.sampling.config import MAX_STEPS, SchedulerConfig

TAKE_TIMESTEPS = ("ddpm", "euler", "heun", "dpm_multistep", "dpm_singlestep", "lcm", "tcd", "flow_euler")
# Not edm_euler: what its set_timesteps calls sigmas are places in 0..1 on its own curve, in a tensor.
TAKE_SIGMAS = ("euler", "unipc", "flow_euler")


@dataclass(frozen=True)
class Run:
    """The arguments of `sampler_table`, which has their meaning."""

    config: SchedulerConfig
    steps: int
    eta: float = 0.0
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    begin: int = 0
    mu: float | None = None

    def check(self) -> None:
        """Raises `ArgumentError` for what can be seen before the schedule is known."""
        config, most = self.config, min(MAX_STEPS, self.config.num_train_timesteps)
        if self.timesteps is not None and self.sigmas is not None:
            raise ArgumentError("timesteps and sigmas cannot be given together", field="timesteps")
        if self.timesteps is None and self.sigmas is None and not (_whole(self.steps) and 1 <= self.steps <= most):
            raise steps_error(self.steps, f"must be an integer from 1 to {most}")
        for name, kinds in (("timesteps", TAKE_TIMESTEPS), ("sigmas", TAKE_SIGMAS)):
            if getattr(self, name) is not None and config.kind not in kinds:
                raise ArgumentError(f"{name}: {config.kind} does not take them; {', '.join(kinds)} do", field=name)
        for name, low, high in (("eta", 0.0, 1.0), ("mu", -100.0, 100.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            if not number and (name, value) != ("mu", None):
                raise ArgumentError(f"{name} = {value!r}: must be from {low:g} to {high:g}", field=name)
        curves = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if self.timesteps is not None and any(getattr(config, curve) for curve in curves):
            raise ArgumentError("timesteps: the configuration spaces the steps by sigma", field="timesteps")

    def first(self, count: int) -> range:
        """The steps of the run: begin, ..., count − 1."""
        if not (_whole(self.begin) and 0 <= self.begin < count):
            raise ArgumentError(f"begin = {self.begin!r}: must be from 0 to {count - 1}", field="begin")
        return range(self.begin, count)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def steps_error(steps: int, reason: str) -> ArgumentError:
    return ArgumentError(f"num_inference_steps = {steps!r}: {reason}", field="num_inference_steps")


def given(
    name: str, values: Sequence[float], low: float, high: float, *, integers: bool = False
) -> NDArray[np.float64]:
    """The caller's own timesteps or sigmas: at most 1000 finite, strictly falling numbers in low..high."""
    try:
        out = np.asarray(list(values)[: MAX_STEPS + 2], np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: must be a list of numbers", field=name) from None
    if out.ndim != 1 or not 1 <= len(out) <= MAX_STEPS + 1:
        raise ArgumentError(f"{name}: must hold 1 to {MAX_STEPS} numbers", field=name)
    if not np.isfinite(out).all() or out.min() < low or out.max() > high:
        raise ArgumentError(f"{name}: must be numbers from {low:g} to {high:g}", field=name)
    if integers and (out != np.round(out)).any():
        raise ArgumentError(f"{name}: must be integers", field=name)
    if (np.diff(out) >= 0).any():
        raise ArgumentError(f"{name}: must fall from each to the next", field=name)
    return out
