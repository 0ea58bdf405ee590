"""The names under which people ask for a sampler, such as "dpmpp_2m_karras": each a diff of configurations."""

from __future__ import annotations

from typing import Any

from fastldm.errors import ArgumentError
from fastldm.sampling.config import CLASSES, FLOW_KINDS, SchedulerConfig, scheduler_config

# name: the hub's class, what differs from its defaults, one line for people.
NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {}, "DDIM; deterministic, or with eta up to 1 stochastic"),
    "ddpm": ("DDPMScheduler", {}, "ancestral sampling of the training process; needs many steps"),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False}, "PNDM: multistep of order 4 after Runge-Kutta steps"),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, "PNDM without Runge-Kutta steps"),
    "lms": ("LMSDiscreteScheduler", {}, "linear multistep of order 4 in sigma"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler in sigma; the plain choice"),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler with fresh noise in each step"),
    "heun": ("HeunDiscreteScheduler", {}, "Heun: order 2, two network calls a step"),
    "dpm2": ("KDPM2DiscreteScheduler", {}, "midpoint: order 2, two network calls a step"),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}, "midpoint with fresh noise in each step"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, "DPM-Solver++ of order 2, one call a step; good at 20 steps"),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "DPM-Solver++ of order 3, one call a step"),
    "dpmpp_2m_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        "DPM-Solver++ of order 2 with fresh noise in each step",
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}, "DPM-Solver++ of order 2 in pairs of steps"),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, "DPM-Solver++ on Brownian noise, two calls a step; needs torchsde"),
    "unipc": ("UniPCMultistepScheduler", {}, "predictor and corrector of order 2; good at 10 steps"),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}, "predictor and corrector of order 3"),
    "deis": ("DEISMultistepScheduler", {}, "exponential integrator of order 2"),
    "sa_solver": ("SASolverScheduler", {}, "stochastic Adams: predictor and corrector with fresh noise"),
    "lcm": ("LCMScheduler", {}, "for models distilled to few steps: latent consistency"),
    "tcd": ("TCDScheduler", {}, "for models distilled to few steps: trajectory consistency"),
}
CURVES = {
    "karras": ("use_karras_sigmas", "Karras' sigmas"),
    "exponential": ("use_exponential_sigmas", "sigmas equidistant in log"),
    "beta": ("use_beta_sigmas", "sigmas at quantiles of a beta distribution"),
}
# The same algorithms for networks that were trained on flows, or with EDM's preconditioning.
FLOW_CLASSES = {
    "EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
}
EDM_CLASSES = {
    "EulerDiscreteScheduler": "EDMEulerScheduler",
    "DPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
}
# What belongs to the model and stays when the sampler changes: always, or where it was given.
MODEL: tuple[str, ...] = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
GIVEN = (
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
    "original_inference_steps",
    "timestep_scaling",
)
FLOW = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
EDM = ("num_train_timesteps", "prediction_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")


def samplers() -> dict[str, str]:
    """Every name of a sampler, with one line about it."""
    out = {}
    for name, (hub, _, line) in NAMES.items():
        out[name] = line
        for suffix, (key, words) in CURVES.items():
            if key in CLASSES[hub][1]:
                out[f"{name}_{suffix}"] = f"{line}; {words}"
    return out


def named(name: str, base: SchedulerConfig) -> SchedulerConfig:
    """The sampler `name` for the model that `base` was made for: its betas, prediction type and spacing are kept.

    Raises `ArgumentError` for a name that does not exist or does not suit the model, `ConfigError` where the sampler
    does not know the model's prediction type.
    """
    known = samplers()
    if name not in known:
        raise ArgumentError(f"scheduler = {name!r}: no such sampler; there are {', '.join(known)}", field="scheduler")
    stem, _, suffix = name.rpartition("_") if name.rpartition("_")[2] in CURVES else (name, "", "")
    hub, changes, _ = NAMES[stem]
    changes = dict(changes)
    keep = MODEL
    if base.is_flow:
        keep, hub = FLOW, FLOW_CLASSES.get(hub, hub)
        shift = "shift" if hub in FLOW_CLASSES.values() else "flow_shift"
        changes |= {shift: base.flow_shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    elif base.kind.startswith("edm"):
        keep, hub = EDM, EDM_CLASSES.get(hub, hub)
    else:
        changes |= {key: base.given[key] for key in GIVEN if key in base.given}
    kind, accepted = CLASSES[hub]
    changes |= {key: getattr(base, key) for key in keep}
    if base.is_flow:
        curves = kind == "flow_euler" or (kind, suffix) == ("unipc", "karras")
        suits = kind in FLOW_KINDS or "use_flow_sigmas" in accepted
    else:
        curves, suits = True, kind.startswith("edm") == base.kind.startswith("edm")
    if suffix:
        key = CURVES[suffix][0]
        changes[key], suits = True, suits and curves and key in accepted
    if not suits:
        raise ArgumentError(f"scheduler = {name!r}: does not suit a model of {base.kind}", field="scheduler")
    data = {key: list(v) if isinstance(v, tuple) else v for key, v in changes.items() if key in accepted}
    return scheduler_config({"_class_name": hub, **data}, "scheduler")
