"""The names under which people ask for a sampler, such as "dpmpp_2m_karras": each a diff of configurations."""

from __future__ import annotations

import difflib
from typing import Any

from fastldm.errors import ArgumentError, brief
from fastldm.sampling.config import ALGORITHMS, CLASSES, FLOW_KINDS, SchedulerConfig, scheduler_config

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
    "dpm_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "DPM-Solver of order 2 without ++: in the noise, not the image",
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}, "DPM-Solver++ of order 2 in pairs of steps"),
    "dpmpp_3s": (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3},
        "DPM-Solver++ of order 3 in threes of steps",
    ),
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
# What belongs to the model: written out when the sampler changes, because the next class may have another default.
# Whatever else was read travels along as it was, as with diffusers' `X.from_config`.
MODEL: tuple[str, ...] = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
FLOW = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
EDM = ("num_train_timesteps", "prediction_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")
# What a name decides: the former sampler's value does not hold for a class that has the key, ...
DECIDED = frozenset(
    {
        "algorithm_type",
        "solver_type",
        "solver_order",
        "predictor_order",
        "corrector_order",
        "predict_x0",
        "disable_corrector",
        "lower_order_final",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "skip_prk_steps",
        "stochastic_sampling",
        "variance_type",
    }
)
# ... and how its steps are spread is not remembered at all.
FORGOTTEN = frozenset({key for key, _ in CURVES.values()} | {"use_lu_lambdas", "use_flow_sigmas"})


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
    """The sampler `name` for the model that `base` was made for: what was read with it is kept where the name allows.

    Raises `ArgumentError` for a name that does not exist or does not suit the model, `ConfigError` where the sampler
    does not know the model's prediction type.
    """
    known = samplers()
    if name not in known:
        close = difflib.get_close_matches(name[:64].lower(), known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"such are {', '.join(list(NAMES)[:6])};"
        reason = f"no such sampler; {meant} fastldm.samplers() has all {len(known)}"
        raise ArgumentError(f"scheduler = {brief(name)}: {reason}", field="scheduler")
    stem, _, suffix = name.rpartition("_") if name.rpartition("_")[2] in CURVES else (name, "", "")
    hub, changes, _ = NAMES[stem]
    changes, keep = dict(changes), MODEL
    if base.is_flow:
        keep, hub = FLOW, FLOW_CLASSES.get(hub, hub)
        changes |= {"shift": base.flow_shift, "flow_shift": base.flow_shift}
        changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    elif base.kind.startswith("edm"):
        keep, hub = EDM, EDM_CLASSES.get(hub, hub)
    kind, accepted = CLASSES[hub]
    if base.is_flow:
        curves = kind == "flow_euler" or (kind, suffix) == ("unipc", "karras")
        suits = kind in FLOW_KINDS or ("use_flow_sigmas" in accepted and changes.get("algorithm_type") != "dpmsolver")
    else:
        curves, suits = True, kind.startswith("edm") == base.kind.startswith("edm")
    if suffix:
        key = CURVES[suffix][0]
        changes[key], suits = True, suits and curves and key in accepted
    algorithm = changes.get("algorithm_type")
    if not suits or (algorithm and algorithm not in ALGORITHMS[kind]):
        raise ArgumentError(f"scheduler = {name!r}: does not suit a model of {base.kind}", field="scheduler")
    data = {k: v for k, v in base.given.items() if k not in FORGOTTEN and not (k in DECIDED and k in accepted)}
    for key in keep:
        value = getattr(base, key)
        data.setdefault(key, list(value) if isinstance(value, tuple) else value)
    data.setdefault("clip_sample", False)  # latents are not images in -1..1
    return scheduler_config({**data, **changes, "_class_name": hub}, "scheduler")
