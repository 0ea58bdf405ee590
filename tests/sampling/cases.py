"""Which schedulers, settings and step counts are compared with diffusers.

The full product of a scheduler's settings would be thousands; a fixed random sample of it is run, large enough that
almost any two values of two settings meet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 4, 9, 20, 50)
SPACING = {"timestep_spacing": ("leading", "linspace", "trailing")}
PREDICTION = {"prediction_type": ("epsilon", "v_prediction", "sample")}
NOISE_OR_V = {"prediction_type": ("epsilon", "v_prediction")}
CURVE = {"curve": (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")}
OFFSET = {"steps_offset": (0, 1)}
SCHEDULE = {"beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2")}
FINAL = {"final_sigmas_type": ("zero", "sigma_min")}
ZERO_SNR = {"rescale_betas_zero_snr": (False, True)}
BOTH = (True, False)
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


@dataclass(frozen=True)
class Case:
    """One run of one scheduler. begin: the first step."""

    name: str
    config: tuple[tuple[str, Any], ...]
    steps: int
    begin: int = 0
    eta: float = 0.0

    def __str__(self) -> str:
        short = self.name.removesuffix("Scheduler").removesuffix("Discrete")
        values = ",".join(f"{k}={v}" for k, v in self.config if LDM.get(k) != v)
        tail = (f"-begin{self.begin}" if self.begin else "") + (f"-eta{self.eta}" if self.eta else "")
        return f"{short}-{self.steps}{tail}-{values}"


def sample(name: str, count: int, options: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`count` settings out of the product of `options`: the same ones in each run."""
    product = list(itertools.product(*options.values()))
    chosen = random.Random(name).sample(product, min(count, len(product)))
    return [dict(zip(options, values, strict=True)) for values in chosen]


def settings() -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """(class, configuration with "curve" for the sigmas' shape, step counts)."""
    schedule = {**SPACING, **SCHEDULE, **OFFSET}
    discrete = {**SPACING, **OFFSET, **ZERO_SNR}
    yield from _each(
        "DDIMScheduler",
        60,
        **discrete,
        **PREDICTION,
        clip_sample=BOTH,
        set_alpha_to_one=BOTH,
        eta=(0.0, 0.7, 1.0),
    )
    variance = ("fixed_small", "fixed_small_log", "fixed_large")
    yield from _each("DDPMScheduler", 40, **discrete, **PREDICTION, clip_sample=BOTH, variance_type=variance)
    yield from _each("PNDMScheduler", 40, **SPACING, **NOISE_OR_V, **OFFSET, skip_prk_steps=BOTH, set_alpha_to_one=BOTH)
    yield from _each("LMSDiscreteScheduler", 20, **schedule, **PREDICTION, **CURVE)
    yield from _each("EulerDiscreteScheduler", 60, **schedule, **PREDICTION, **CURVE, **FINAL, **ZERO_SNR)
    for extra in (
        {"interpolation_type": "log_linear"},
        {"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    ):
        yield "EulerDiscreteScheduler", {**LDM, **extra}, STEPS
    yield from _each("EulerAncestralDiscreteScheduler", 30, **schedule, **NOISE_OR_V, **ZERO_SNR)
    yield from _each("HeunDiscreteScheduler", 36, **SPACING, **OFFSET, **PREDICTION, **CURVE, clip_sample=BOTH)
    yield from _each("KDPM2DiscreteScheduler", 24, **schedule, **NOISE_OR_V, **CURVE)
    # On the cosine schedule its float32 sigma_down is off by percents.
    schedule["beta_schedule"] = ("scaled_linear", "linear")
    yield from _each("KDPM2AncestralDiscreteScheduler", 30, **schedule, **NOISE_OR_V, **CURVE)
    solver = {"solver_order": (1, 2, 3), "solver_type": ("midpoint", "heun"), "lower_order_final": BOTH}
    rest = {**SPACING, **PREDICTION, **CURVE, "euler_at_final": BOTH}
    data = {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++"), **solver, **FINAL}
    yield from _each("DPMSolverMultistepScheduler", 90, **data, **rest)
    noise = {"algorithm_type": ("dpmsolver",), **solver, "final_sigmas_type": ("sigma_min",)}
    yield from _each("DPMSolverMultistepScheduler", 30, **noise, **rest)
    noise |= {"algorithm_type": ("sde-dpmsolver",), "solver_order": (1, 2)}
    yield from _each("DPMSolverMultistepScheduler", 20, **noise, **rest)
    for extra in ({"use_lu_lambdas": True}, {"lambda_min_clipped": -5.1}, FLOW, {"rescale_betas_zero_snr": True}):
        for spacing in SPACING["timestep_spacing"]:
            yield "DPMSolverMultistepScheduler", {**LDM, **extra, "timestep_spacing": spacing}, STEPS
    for extra in ({"use_karras_sigmas": True}, {"use_lu_lambdas": True}):
        yield "DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", **extra}, STEPS
    yield from _each("DPMSolverSinglestepScheduler", 60, **data, **PREDICTION, **CURVE)
    noise |= {"algorithm_type": ("dpmsolver",), "solver_order": (1, 2, 3)}
    yield from _each("DPMSolverSinglestepScheduler", 30, **noise, **PREDICTION, **CURVE)
    yield "DPMSolverSinglestepScheduler", {**LDM, **FLOW}, STEPS
    yield from _each(
        "UniPCMultistepScheduler",
        90,
        solver_order=(1, 2, 3),
        solver_type=("bh1", "bh2"),
        predict_x0=BOTH,
        lower_order_final=BOTH,
        disable_corrector=([], [0, 2]),
        **SPACING,
        **PREDICTION,
        **CURVE,
        **FINAL,
        **ZERO_SNR,
    )
    for extra in (
        FLOW,
        {**FLOW, "use_karras_sigmas": True},
        {**FLOW, "shift_terminal": 0.1},
        {"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True},
    ):
        yield "UniPCMultistepScheduler", {**LDM, **extra}, STEPS
    order = {"solver_order": (1, 2, 3), "lower_order_final": BOTH}
    yield from _each("DEISMultistepScheduler", 36, **order, **SPACING, **PREDICTION, **CURVE)
    yield "DEISMultistepScheduler", {**LDM, **FLOW}, STEPS
    yield "IPNDMScheduler", {}, STEPS
    yield from _each(
        "SASolverScheduler",
        60,
        predictor_order=(1, 2, 3),
        corrector_order=(1, 2, 3, 4),
        algorithm_type=("data_prediction", "noise_prediction"),
        lower_order_final=BOTH,
        **SPACING,
        **PREDICTION,
        **CURVE,
    )
    yield "SASolverScheduler", {**LDM, **FLOW}, STEPS
    distilled = {**PREDICTION, **ZERO_SNR, "original_inference_steps": (50, 100)}
    yield from _each("LCMScheduler", 24, **distilled, clip_sample=BOTH)
    yield from _each("TCDScheduler", 24, **distilled, eta=(0.0, 0.3, 0.45, 1.0))
    edm = {**NOISE_OR_V, **FINAL, "sigma_schedule": ("karras", "exponential")}
    yield from _each("EDMEulerScheduler", 24, betas=False, **edm)
    for algorithm, orders in (("dpmsolver++", (1, 2, 3)), ("sde-dpmsolver++", (1, 2))):
        options = {**edm, **solver, "algorithm_type": (algorithm,), "solver_order": orders}
        yield from _each("EDMDPMSolverMultistepScheduler", 20, betas=False, **options)
    yield from _each(
        "FlowMatchEulerDiscreteScheduler",
        40,
        betas=False,
        shift=(1.0, 3.0),
        **CURVE,
        stochastic_sampling=BOTH,
        shift_terminal=(None, 0.1),
        invert_sigmas=BOTH,
    )
    for shift in (1.0, 3.0):
        yield "FlowMatchHeunDiscreteScheduler", {"shift": shift}, STEPS


def _each(
    name: str, count: int, betas: bool = True, **options: tuple[Any, ...]
) -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    for config in sample(name, count, {"steps": STEPS, **options}):
        steps = (config.pop("steps"),)
        yield name, {**(LDM if betas else {}), **config}, steps


def cases() -> list[Case]:
    out = []
    for name, config, steps in settings():
        config = dict(config)
        eta = config.pop("eta", 0.0)
        curve = config.pop("curve", None)
        if curve:
            config[curve] = True
        out += [Case(name, tuple(config.items()), n, eta=eta) for n in steps]
    return out
