"""Convergence orders on an analytic denoiser: one step from exact state and history errs by O(h^(order + 1)).

The data are Gaussian with standard deviation DATA, so the best x0 is linear in x and the flow's solution is known:
x grows as its own standard deviation, sqrt(α² DATA² + σ²). DPM-Solver's third multistep order, as everybody has it,
weighs the second derivative by half of what it should, so that its order is 2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastldm.sampling import SamplerTable, sampler_table, scheduler_config
from fastldm.sampling.samplers import phi

DATA = 0.7
STEPS = (100, 300)
RANGE = (0.15, 0.6)  # of σ / α; there SA-Solver adds no noise: t < 200
CORRECTING = ("UniPCMultistepScheduler", "SASolverScheduler")  # state[1] is the last x, corrected
LOG_SPACED = {"use_exponential_sigmas": True, "beta_start": 0.00085, "beta_end": 0.012}
FINE = {"num_train_timesteps": 10_000, "beta_start": 8.5e-5, "beta_end": 1.2e-3, "timestep_spacing": "leading"}
KEEP = {"final_sigmas_type": "sigma_min", "lower_order_final": True}

ORDERS = [
    ("DDIMScheduler", {**FINE, "clip_sample": False}, 1),
    ("PNDMScheduler", {**FINE, "skip_prk_steps": True}, 2),  # its weights are of order 4, its transfer of 2
    ("EulerDiscreteScheduler", LOG_SPACED, 1),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}, 1),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 2),
    ("HeunDiscreteScheduler", LOG_SPACED, 2),
    ("KDPM2DiscreteScheduler", LOG_SPACED, 2),
    ("LMSDiscreteScheduler", LOG_SPACED, 4),
    *(("DEISMultistepScheduler", {**LOG_SPACED, "solver_order": k}, k) for k in (1, 2, 3)),
    *(("UniPCMultistepScheduler", {**LOG_SPACED, "solver_order": k}, k) for k in (1, 2, 3)),
    *(("UniPCMultistepScheduler", {**LOG_SPACED, "solver_order": k, "solver_type": "bh1"}, k) for k in (2, 3)),
    *(("UniPCMultistepScheduler", {**LOG_SPACED, "solver_order": k, **KEEP, "predict_x0": False}, k) for k in (2, 3)),
    *(("DPMSolverMultistepScheduler", {**LOG_SPACED, "solver_order": k}, min(k, 2)) for k in (1, 2, 3)),
    ("DPMSolverMultistepScheduler", {**LOG_SPACED, "solver_type": "heun"}, 2),
    ("DPMSolverMultistepScheduler", {**LOG_SPACED, **KEEP, "algorithm_type": "dpmsolver", "solver_order": 3}, 2),
    ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "solver_order": 3}, 2),
    *(("DPMSolverSinglestepScheduler", {**LOG_SPACED, "solver_order": k}, k) for k in (1, 2, 3)),
    ("DPMSolverSinglestepScheduler", {**LOG_SPACED, "solver_order": 3, "solver_type": "heun"}, 3),
    ("DPMSolverSinglestepScheduler", {**LOG_SPACED, **KEEP, "algorithm_type": "dpmsolver", "solver_order": 2}, 2),
    *(("SASolverScheduler", {**LOG_SPACED, "predictor_order": k, "corrector_order": k}, k) for k in (1, 2, 3)),
]


def levels(name: str, table: SamplerTable) -> tuple[np.ndarray, np.ndarray]:
    """α and σ of x in each row, from how x0 follows from x and the network's output."""
    if name.startswith("Flow"):
        return 1 + table.q, -table.q
    if name.startswith("EDM"):
        return np.ones(table.rows), np.exp(4 * table.timesteps)
    return 1 / table.p, -table.q / table.p


def errors(name: str, table: SamplerTable, exact_above: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """σ/α at the beginning of each step, and the relative error of x at the end of each but the last.

    A step that begins at `exact_above` or more has the exact x and history; those below go on with what they are given.
    """
    alpha, sigma = levels(name, table)
    exact = np.sqrt(alpha**2 * DATA**2 + sigma**2)
    last = np.flatnonzero(table.ends_step)
    first = np.append(0, last[:-1] + 1)
    with np.errstate(divide="ignore"):  # a flow starts at α = 0
        ratio, found = (sigma / alpha)[first], []
    state = np.zeros(table.slots)
    for k in range(len(first) - 1):
        if k == 0 or ratio[k] >= exact_above:
            state[0] = exact[first[k]]
            if name in CORRECTING and k > 0:
                state[1] = exact[first[k - 1]]
        for r in range(first[k], last[k] + 1):
            clean = alpha[r] * DATA**2 / exact[r] ** 2 * state[0]
            e = (clean - table.p[r] * state[0]) / table.q[r]
            state = table.a[r] @ state + table.b[r] * e
        found.append(abs(state[0] / exact[first[k + 1]] - 1))
    return ratio, np.array(found)


def local_error(name: str, config: dict[str, Any], steps: int, phase: int) -> float:
    """The largest relative error of one step, over those in RANGE whose index is −1 modulo `phase`."""
    ratio, found = errors(name, sampler_table(scheduler_config({"_class_name": name, **config}), steps))
    ratio = ratio[:-1]
    counts = (RANGE[0] < ratio) & (ratio < RANGE[1]) & (np.arange(len(ratio)) % phase == phase - 1)
    assert counts.sum() >= 5
    return float(found[counts].max())


@pytest.mark.parametrize(("name", "config", "order"), ORDERS, ids=lambda v: str(v) if not isinstance(v, dict) else "")
def test_local_error_falls_with_the_order(name: str, config: dict[str, Any], order: int) -> None:
    phase = order if "Singlestep" in name else 1
    coarse, fine = (local_error(name, config, n, phase) for n in STEPS)
    slope = math.log(coarse / fine, STEPS[1] / STEPS[0])
    assert slope >= order + 0.8, f"{slope:.2f}: from {coarse:.1e} to {fine:.1e}"


@pytest.mark.parametrize("z", [-2.0, -1.1e-3, -9e-4, -1e-9, 1e-12, 5e-4, 9.99e-4, 1.01e-3, 0.3, 4.0])
def test_phi_is_its_series(z: float) -> None:
    """At small z the closed form loses all digits."""
    terms = [z**k / math.factorial(k) for k in range(60)]
    series = (sum(terms[1:]), sum(terms[2:]) / z, sum(terms[3:]) / z**2)
    assert phi(z) == pytest.approx(series, rel=1e-7)
