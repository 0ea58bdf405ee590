"""What a sampler is: one frozen dataclass, and the hub's `scheduler_config.json` translated into it.

The hub stores the parameters of one scheduler class, and keys of other classes that were carried along when somebody
switched schedulers. Here, as there, a class reads the parameters that it has, takes its own default for an absent
one, and passes over those of other classes. A key that no class has is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastldm.config import Reader
from fastldm.errors import ConfigError, RefusedError, brief

MAX_TRAIN_TIMESTEPS = 10_000
MAX_STEPS = 1000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid", "exp")
_STEPPING = (
    "add_noise",
    "alphas_cumprod",
    "betas",
    "compatibles",
    "init_noise_sigma",
    "num_inference_steps",
    "scale_model_input",
    "set_begin_index",
    "set_timesteps",
    "sigmas",
    "step",
    "timesteps",
)
FLOW_KINDS = ("flow_euler", "flow_heun")


class HubKeys(dict[str, Any]):
    """A scheduler's keys, `config.beta_start` or `config["beta_start"]`; an absent one has its class's default.

    Absent ones are not among the items: another class would use its own defaults for them.
    """

    __slots__ = ()

    def __missing__(self, key: str) -> Any:
        return CLASSES[dict.get(self, "_class_name", "")][1][key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's configuration has no {brief(name)}", name=name) from None

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def _fixed(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this would change nothing: assign pipe.scheduler = (class, {**pipe.scheduler.config, ...})")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _fixed

    def __reduce__(self) -> tuple[type[HubKeys], tuple[dict[str, Any]]]:
        return HubKeys, (dict(self),)


@dataclass(frozen=True)
class SchedulerConfig:
    """Everything that decides the numbers of a `SamplerTable` besides the call's own arguments.

    `kind` names the algorithm; the fields carry the hub's names, and those that the kind does not use hold the value
    that means "off". `given` are the hub's keys as they were read, for a switch to another kind.
    """

    kind: str
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    timestep_type: str = "discrete"
    interpolation_type: str = "linear"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    variance_type: str | None = None
    skip_prk_steps: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    stochastic_sampling: bool = False
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    rho: float = 7.0
    lambda_min_clipped: float = -math.inf
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    solver_order: int = 2
    predictor_order: int = 2
    corrector_order: int = 2
    predict_x0: bool = True
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    noise_sampler_seed: int | None = None
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __getattr__(self, name: str) -> Any:
        """What a scheduler object of diffusers has beside, to step with."""
        if name in _STEPPING:
            reason = "steps nothing itself: take X.from_config(pipe.scheduler.config) for a loop of your own"
            raise RefusedError(f"{name}: the scheduler of a fastldm.Pipeline {reason}", field=name)
        raise AttributeError(f"a SchedulerConfig has no {brief(name)}", name=name)

    @property
    def config(self) -> HubKeys:
        """The hub's keys as they were read: what `X.from_config` of a scheduler class of diffusers takes."""
        return HubKeys(self.given)

    @property
    def order(self) -> int:
        """Network calls per step, as the hub's classes count them."""
        return 2 if self.kind in ("heun", "dpm2", "dpm2_ancestral", "dpm_sde", "flow_heun") else 1

    @property
    def is_flow(self) -> bool:
        """Whether x = (1 − σ) x0 + σ n rather than x = α x0 + σ n with α² + σ² = 1."""
        return self.use_flow_sigmas or self.kind in FLOW_KINDS


# ------------------------------------------------------------------------------------- the hub's classes and defaults

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_LDM_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DDPM = {
    **_BETAS,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}
_LCM = {
    **_DDPM,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_DPM = {
    **_BETAS,
    **_SIGMAS,
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DPM_SOLVER = {
    **_DPM,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_EDM = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMScheduler": ("ddim", {**_DDPM, "set_alpha_to_one": True}),
    "DDPMScheduler": ("ddpm", {**_DDPM, "variance_type": "fixed_small"}),
    "PNDMScheduler": (
        "pndm",
        {**_BETAS, "timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "LMSDiscreteScheduler": ("lms", {**_BETAS, **_SIGMAS}),
    "EulerDiscreteScheduler": (
        "euler",
        {
            **_BETAS,
            **_SIGMAS,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {**_BETAS, "rescale_betas_zero_snr": False}),
    "HeunDiscreteScheduler": (
        "heun",
        {**_LDM_BETAS, **_SIGMAS, "clip_sample": False, "clip_sample_range": 1.0},
    ),
    "KDPM2DiscreteScheduler": ("dpm2", {**_LDM_BETAS, **_SIGMAS}),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_ancestral", {**_LDM_BETAS, **_SIGMAS}),
    "DPMSolverMultistepScheduler": (
        "dpm_multistep",
        {**_DPM_SOLVER, "euler_at_final": False, "use_lu_lambdas": False, "rescale_betas_zero_snr": False},
    ),
    "DPMSolverSinglestepScheduler": (
        "dpm_singlestep",
        {
            **{k: v for k, v in _DPM_SOLVER.items() if k not in ("timestep_spacing", "steps_offset")},
            "lower_order_final": False,
        },
    ),
    "DPMSolverSDEScheduler": ("dpm_sde", {**_LDM_BETAS, **_SIGMAS, "noise_sampler_seed": None}),
    "UniPCMultistepScheduler": (
        "unipc",
        {
            **_DPM,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "rescale_betas_zero_snr": False,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
    ),
    "DEISMultistepScheduler": ("deis", {**_DPM, "algorithm_type": "deis", "solver_type": "logrho"}),
    "IPNDMScheduler": ("ipndm", {"num_train_timesteps": 1000, "trained_betas": None}),
    "SASolverScheduler": (
        "sa_solver",
        {
            **{k: v for k, v in _DPM.items() if k not in ("solver_order", "use_dynamic_shifting", "time_shift_type")},
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
    ),
    "LCMScheduler": ("lcm", _LCM),
    "TCDScheduler": ("tcd", _LCM),
    "EDMEulerScheduler": ("edm_euler", _EDM),
    "EDMDPMSolverMultistepScheduler": (
        "edm_dpm_multistep",
        {
            **_EDM,
            "solver_order": 2,
            "thresholding": False,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lower_order_final": True,
            "euler_at_final": False,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": (
        "flow_euler",
        {
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": False,
            "time_shift_type": "exponential",
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "invert_sigmas": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            **_SIGMAS,
        },
    ),
    "FlowMatchHeunDiscreteScheduler": ("flow_heun", {"num_train_timesteps": 1000, "shift": 1.0}),
}
# Keys that say nothing about the numbers, or belong to a class that is not here.
_PASSED_OVER = frozenset(
    {"dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "clip_sample", "trained_betas"}
)
_DPM_TYPES = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "dpm_multistep": (*_DPM_TYPES, "deis"),
    "dpm_singlestep": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "deis"),
    "edm_dpm_multistep": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "deis": ("deis", "dpmsolver", "dpmsolver++"),
    "sa_solver": ("data_prediction", "noise_prediction"),
}
_SOLVERS = ("midpoint", "heun", "logrho", "bh1", "bh2")
_OWN_SOLVERS = {"unipc": ("bh1", "bh2"), "deis": ("logrho",)}
_OWN_PREDICTION = {
    "flow_euler": "flow_prediction",
    "flow_heun": "flow_prediction",
    "ipndm": "v_prediction",
}


def scheduler_config(data: Mapping[str, Any], where: str = "scheduler/scheduler_config.json") -> SchedulerConfig:
    """The sampler that a `scheduler_config.json`, or the `.config` of a scheduler object, describes.

    Raises `ConfigError` naming the key for a value out of range, a key that no scheduler has, and for what a table
    cannot say: dynamic thresholding, learned variances, a predictor of another class inside UniPC.
    """
    if isinstance(data, Mapping) and (strange := [key for key in data if not isinstance(key, str)]):
        raise ConfigError(f"{where}: the key {brief(strange[0])} must be a string", field=where)
    r = Reader(_explicit(data) if isinstance(data, Mapping) else data, where)
    name = r.choice("_class_name", tuple(CLASSES))
    kind, defaults = CLASSES[name]
    values = {key: _read(r, kind, key, default) for key, default in defaults.items()}
    r.seen |= _PASSED_OVER.union(*(d for _, d in CLASSES.values()))
    r.done()
    _together(r, kind, values)
    if "shift" in values:
        values["flow_shift"] = values.pop("shift")
    for key in ("thresholding", "solver_p", "tau_func", "base_shift", "max_shift"):
        values.pop(key, None)
    for key in ("base_image_seq_len", "max_image_seq_len"):
        values.pop(key, None)
    if kind in _OWN_PREDICTION:
        values["prediction_type"] = _OWN_PREDICTION[kind]
    return SchedulerConfig(kind, **values, given=dict(r.data))


def _explicit(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that a scheduler object filled in itself: another class would use its own defaults for them."""
    filled = data.get("_use_default_values")
    names = {k for k in filled if isinstance(k, str)} if isinstance(filled, list | tuple) else set()
    return {k: v for k, v in data.items() if k != "_use_default_values" and k not in names}


def _read(r: Reader, kind: str, key: str, default: Any) -> Any:
    """The value of one key, checked against the range that it has in this kind of sampler."""
    if isinstance(default, bool):
        if key == "thresholding":
            r.fixed(thresholding=(False, None))
            return False
        return r.flag(key) if r.data.get(key) is not None else _absent(r, key, default)
    if key in _READERS:
        return _READERS[key](r, kind, default)
    low, high = _RANGES[key]
    if r.data.get(key) is None:
        return _absent(r, key, default)
    if isinstance(default, int) or key == "noise_sampler_seed":
        return r.integer(key, int(low), int(high))
    return r.number(key, low, high)


def _absent(r: Reader, key: str, default: Any) -> Any:
    """`default` for a key that is absent, or null where null is the default or a flag's "off"."""
    if key in r.data and default is not None and not isinstance(default, bool):
        raise r.fail(key, "must not be null")
    r.seen.add(key)
    return False if key in r.data and isinstance(default, bool) else default


_RANGES: dict[str, tuple[float, float]] = {
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    "steps_offset": (0, MAX_TRAIN_TIMESTEPS),
    "clip_sample_range": (1e-6, 1e6),
    "flow_shift": (1e-3, 1e3),
    "shift": (1e-3, 1e3),
    "base_shift": (-100, 100),
    "max_shift": (-100, 100),
    "base_image_seq_len": (1, 2**31),
    "max_image_seq_len": (1, 2**31),
    "shift_terminal": (1e-6, 0.999),
    "sigma_min": (1e-6, 1e6),
    "sigma_max": (1e-6, 1e6),
    "sigma_data": (1e-6, 1e3),
    "rho": (0.1, 100),
    "solver_order": (1, 3),
    "predictor_order": (1, 3),
    "corrector_order": (0, 4),
    "original_inference_steps": (1, MAX_TRAIN_TIMESTEPS),
    "timestep_scaling": (1e-3, 1e6),
    "noise_sampler_seed": (0, 2**63 - 1),
}


def _beta(r: Reader, key: str, default: Any) -> float:
    value = r.number(key, 0.0, 1.0, default) if r.data.get(key) is not None else _absent(r, key, default)
    if not 0.0 < value < 1.0:
        raise r.fail(key, "must be greater than 0 and less than 1")
    return float(value)


def _trained_betas(r: Reader, kind: str, default: Any) -> tuple[float, ...] | None:
    value = r.raw("trained_betas", None)
    if value is None or (kind == "ipndm" and value == []):
        return None
    total = r.integer("num_train_timesteps", 1, MAX_TRAIN_TIMESTEPS, 1000)
    if not isinstance(value, list | tuple) or len(value) != total:
        raise r.fail("trained_betas", f"must be a list of num_train_timesteps = {total} numbers")
    for v in value:
        if isinstance(v, bool) or not isinstance(v, int | float) or not 0.0 < v < 1.0:
            raise r.fail("trained_betas", "must hold numbers greater than 0 and less than 1")
    return tuple(float(v) for v in value)


def _lambda_min(r: Reader, kind: str, default: Any) -> float:
    value = r.raw("lambda_min_clipped", default)
    if value in (-math.inf, "-inf", "-Infinity"):
        return -math.inf
    return float(r.number("lambda_min_clipped", -100, 100))


def _disable_corrector(r: Reader, kind: str, default: Any) -> tuple[int, ...]:
    value = r.raw("disable_corrector", default)
    if not isinstance(value, list | tuple) or len(value) > MAX_STEPS:
        raise r.fail("disable_corrector", f"must be a list of at most {MAX_STEPS} step indices")
    if any(isinstance(v, bool) or not isinstance(v, int) or not -MAX_STEPS <= v <= MAX_STEPS for v in value):
        raise r.fail("disable_corrector", f"must hold integers from {-MAX_STEPS} to {MAX_STEPS}")
    return tuple(value)


def _variance_type(r: Reader, kind: str, default: Any) -> str | None:
    options = ("fixed_small", "fixed_small_log", "fixed_large")
    if kind != "ddpm":  # the solvers only ask whether the network predicts variances besides
        options = (None, *options)  # type: ignore[assignment]
    value: str | None = r.choice("variance_type", options, default)
    return value if kind == "ddpm" else None


def _prediction_type(r: Reader, kind: str, default: Any) -> str:
    flow = ("flow_prediction",) if kind in ("dpm_multistep", "dpm_singlestep", "unipc", "deis", "sa_solver") else ()
    options = (
        ("epsilon", "v_prediction", *flow) if kind.startswith("edm") else ("epsilon", "v_prediction", "sample", *flow)
    )
    return str(r.choice("prediction_type", options, default))


def _solver_type(r: Reader, kind: str, default: Any) -> str:
    """The hub's classes take each other's solver types for their own default: so `from_config` can switch class."""
    value = str(r.choice("solver_type", _SOLVERS, default))
    own = _OWN_SOLVERS.get(kind, ("midpoint", "heun"))
    return value if value in own else str(default)


def _algorithm_type(r: Reader, kind: str, default: Any) -> str:
    value = str(r.choice("algorithm_type", ALGORITHMS[kind], default))
    if kind == "deis":
        return "deis"
    return "dpmsolver++" if value == "deis" else value


def _choice(key: str, *options: str) -> Callable[[Reader, str, Any], Any]:
    return lambda r, kind, default: r.choice(key, options, default)


def _fixed(key: str) -> Callable[[Reader, str, Any], Any]:
    return lambda r, kind, default: r.fixed(**{key: (None,)})


_READERS: dict[str, Callable[[Reader, str, Any], Any]] = {
    "beta_start": lambda r, kind, default: _beta(r, "beta_start", default),
    "beta_end": lambda r, kind, default: _beta(r, "beta_end", default),
    "beta_schedule": _choice("beta_schedule", *BETA_SCHEDULES),
    "trained_betas": _trained_betas,
    "prediction_type": _prediction_type,
    "timestep_spacing": _choice("timestep_spacing", "leading", "linspace", "trailing"),
    "timestep_type": _choice("timestep_type", "discrete", "continuous"),
    "interpolation_type": _choice("interpolation_type", "linear", "log_linear"),
    "final_sigmas_type": _choice("final_sigmas_type", "zero", "sigma_min"),
    "time_shift_type": _choice("time_shift_type", "exponential", "linear"),
    "sigma_schedule": _choice("sigma_schedule", "karras", "exponential"),
    "variance_type": _variance_type,
    "algorithm_type": _algorithm_type,
    "solver_type": _solver_type,
    "lambda_min_clipped": _lambda_min,
    "disable_corrector": _disable_corrector,
    "solver_p": _fixed("solver_p"),
    "tau_func": _fixed("tau_func"),
}


def _together(r: Reader, kind: str, values: Mapping[str, Any]) -> None:
    """The checks that need more than one key."""
    chosen = [key for key in _SIGMAS if values.get(key)]
    if len(chosen) > 1:
        raise r.fail(chosen[1], f"cannot be used together with {chosen[0]}")
    total = values["num_train_timesteps"]
    if values.get("steps_offset", 0) > total:
        raise r.fail("steps_offset", f"must not be greater than num_train_timesteps = {total}")
    if values.get("beta_start", 0.0) > values.get("beta_end", 1.0):
        raise r.fail("beta_start", f"must not be greater than beta_end = {values['beta_end']:g}")
    low, high = values.get("sigma_min"), values.get("sigma_max")
    if low is not None and high is not None and low >= high:
        raise r.fail("sigma_min", f"must be less than sigma_max = {high:g}")
    if values.get("original_inference_steps", 1) > total:
        raise r.fail("original_inference_steps", f"must not be greater than num_train_timesteps = {total}")
    flow = values.get("prediction_type") == "flow_prediction"
    if flow and not values.get("use_flow_sigmas"):
        raise r.fail("prediction_type", "needs use_flow_sigmas = true")
    if values.get("shift_terminal") is not None and kind == "unipc" and not values["use_flow_sigmas"]:
        raise r.fail("shift_terminal", "needs use_flow_sigmas = true")
    third = (kind, values.get("algorithm_type"), values.get("solver_order"))
    if third in (("dpm_multistep", "sde-dpmsolver", 3), ("edm_dpm_multistep", "sde-dpmsolver++", 3)):
        raise r.fail("solver_order", f"must be 1 or 2 for algorithm_type {third[1]!r}")
    first_kind = values.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver")
    if first_kind and values.get("final_sigmas_type") == "zero":
        raise r.fail("final_sigmas_type", f"must be 'sigma_min' for algorithm_type {values['algorithm_type']!r}")


__all__ = ["ALGORITHMS", "CLASSES", "ConfigError", "SchedulerConfig", "scheduler_config"]
