"""The hub's scheduler configurations: defaults, ranges, refusals, switches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import pickle
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest

from fastldm.errors import ArgumentError, ConfigError, RefusedError
from fastldm.sampling import SchedulerConfig, named, sampler_table, scheduler_config
from fastldm.sampling.config import CLASSES
from fastldm.sampling.names import NAMES, samplers

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
PASSED_OVER = {"dynamic_thresholding_ratio", "sample_max_value"}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_the_hubs(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {k: p.default for k, p in parameters.items() if k not in {"self", "kwargs"} | PASSED_OVER}
    assert CLASSES[name][1] == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_a_schedulers_own_config_is_read(name: str) -> None:
    """From the object, and from the JSON that it saves."""
    scheduler = getattr(diffusers, name)()
    saved = json.loads(scheduler.to_json_string())
    assert scheduler_config({**scheduler.config, "_class_name": name}) == scheduler_config(saved)


NUMBERS = (math.nan, math.inf, -1.0, -(10**9), 10**30, 1e300, "1", [1], {}, True)
BAD: dict[type, tuple[Any, ...]] = {
    bool: (3, 0.5, "true", [1], {"a": 1}, "no"),
    int: (*NUMBERS, 1.5, None),
    float: (*NUMBERS, None),
    str: ("nope", "", 3, True, ["linear"], {}, None),
    list: ("x", 3, [1.5], [10**9], [True], list(range(5000)), {}),
}
SPECIAL: dict[str, tuple[Any, ...]] = {
    "trained_betas": ("x", 3, [0.1], [2.0] * 1000, [math.nan] * 1000, ["x"] * 1000, [0.5] * 10**5, {}),
    "sigma_min": NUMBERS,
    "sigma_max": NUMBERS,
    "shift_terminal": NUMBERS,
    "noise_sampler_seed": NUMBERS,
    "solver_p": (3, "x", {"a": 1}),
    "tau_func": (3, "x", {"a": 1}),
    "variance_type": ("learned", "learned_range", "fixed_large_log", 3, True),
    "base_shift": (math.nan, math.inf, 1e300, "1", True),
    "max_shift": (math.nan, math.inf, 1e300, "1", True),
    "lambda_min_clipped": (math.nan, math.inf, -1e6, "x", [1], None),
    "num_train_timesteps": (*NUMBERS, 0, 10_001, 10**12),
    "solver_order": (*NUMBERS, 0, 4),
    "thresholding": (True, 1, "x"),
    "beta_start": (*NUMBERS, 0.0, 1.0),
    "beta_end": (*NUMBERS, 0.0, 1.0),
}
KEYS = [(name, key, default) for name, (_, defaults) in CLASSES.items() for key, default in defaults.items()]


@pytest.mark.parametrize(("name", "key", "default"), KEYS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_values_are_refused_by_name(name: str, key: str, default: Any) -> None:
    if key == "trained_betas" and name == "IPNDMScheduler":
        bad = SPECIAL[key]
    else:
        bad = SPECIAL.get(key) or BAD[type(default)]
    for value in bad:
        began = time.perf_counter()
        with pytest.raises(ConfigError) as caught:
            scheduler_config({"_class_name": name, key: value})
        assert time.perf_counter() - began < 0.5
        assert key in str(caught.value.field), (value, caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("data", [None, [], 3, "x", {}, {"_class_name": 3}, {"_class_name": "Other"}])
def test_what_is_no_scheduler_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError):
        scheduler_config(data)


def test_an_unknown_key_is_refused_and_one_of_another_class_is_not() -> None:
    with pytest.raises(ConfigError, match="frobnicate"):
        scheduler_config({**SD15, "frobnicate": 3})
    config = scheduler_config(SD15)  # clip_sample is no key of PNDM's
    assert (config.kind, config.steps_offset, config.skip_prk_steps) == ("pndm", 1, True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_"),
        ({"steps_offset": 2000}, "steps_offset"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        ({"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, "solver_order"),
    ],
)
def test_values_that_do_not_go_together(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scheduler_config({"_class_name": "DPMSolverMultistepScheduler", **change})
    assert key in str(caught.value.field)


@pytest.mark.parametrize("name", [n for n in CLASSES if not n.startswith(("Flow", "EDM", "IPNDM"))])
def test_switching_class_is_diffusers_from_config(name: str) -> None:
    """The values that a scheduler filled in itself are not carried over, those that were given are."""
    base = diffusers.EulerDiscreteScheduler(**{k: v for k, v in SD15.items() if k[:5] == "beta_"}, steps_offset=1)
    theirs = getattr(diffusers, name).from_config(base.config)
    ours = scheduler_config({**base.config, "_class_name": name})
    for key in CLASSES[name][1]:
        if hasattr(ours, key) and key not in ("variance_type", "disable_corrector"):
            assert getattr(ours, key) == theirs.config[key], key


def test_every_name_gives_a_table_and_keeps_the_model() -> None:
    base = scheduler_config({**SD15, "prediction_type": "v_prediction"})
    for name, line in samplers().items():
        config = named(name, base)
        assert (config.beta_start, config.beta_schedule) == (0.00085, "scaled_linear")
        assert config.prediction_type == "v_prediction"
        assert config.clip_sample is False
        table = sampler_table(config, 8)
        assert table.steps == 8
        assert table.slots <= 6
        assert len(line) < 120
    assert {"dpmpp_2m_karras", "euler_a", "unipc", "lcm"} <= set(samplers())
    assert named("dpmpp_2m_karras", base).use_karras_sigmas
    assert not named("dpmpp_2m", named("dpmpp_2m_karras", base)).use_karras_sigmas


SDXL = {
    **{k: v for k, v in SD15.items() if k[:4] in ("beta", "num_", "_dif")},
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
MODELS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "lcm": {**SDXL, "_class_name": "LCMScheduler", "steps_offset": 1}}


@pytest.mark.parametrize("model", MODELS)
def test_a_name_loses_nothing_of_the_model(model: str) -> None:
    """Whatever was chosen in between, a name means the same; and latents are not clipped."""
    base = scheduler_config(MODELS[model])
    direct = {name: named(name, base) for name in samplers()}
    assert not any(config.clip_sample for config in direct.values())
    assert direct["ddim"].set_alpha_to_one is ("set_alpha_to_one" not in MODELS[model])
    for first in direct.values():
        for name, config in direct.items():
            assert named(name, first) == config, (first.kind, name)


@pytest.mark.parametrize("model", MODELS)
def test_the_config_of_a_name_is_understood_by_diffusers(model: str) -> None:
    """`X.from_config(pipe.scheduler.config)`: for its own class, and for another one as from the model's first."""
    for name in samplers():
        ours = named(name, scheduler_config(MODELS[model]))
        hub = ours.config["_class_name"]
        if hub == "DPMSolverSDEScheduler" or name.endswith(("_exponential", "_beta")):
            continue  # the first needs torchsde, the others are slow to construct
        theirs = getattr(diffusers, hub).from_config(ours.config).config
        for key in set(CLASSES[hub][1]) & {f.name for f in dataclasses.fields(SchedulerConfig)}:
            value = list(ours.disable_corrector) if key == "disable_corrector" else getattr(ours, key)
            assert value == theirs[key], (name, key)
        for other in ("DDIMScheduler", "PNDMScheduler"):
            kind = getattr(diffusers, other)
            ours_again, first = kind.from_config(ours.config).config, kind.from_config(MODELS[model]).config
            for key in ("set_alpha_to_one", "steps_offset", "timestep_spacing", "prediction_type", "beta_start"):
                assert ours_again[key] == first[key], (name, other, key)


def test_a_configuration_can_be_copied() -> None:
    config = named("dpmpp_2m_karras", scheduler_config(SD15))
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert other == config
        assert other.config == config.config
        assert hash(other) == hash(config)
    assert dataclasses.asdict(config)["given"] == config.config
    for change in (lambda keys: keys.update(beta_start=3), lambda keys: keys.pop("beta_start")):
        with pytest.raises(TypeError, match="would change nothing"):
            change(config.config)
    keys = config.config
    assert keys == copy.deepcopy(keys) == pickle.loads(pickle.dumps(keys)) == dict(config.given)


def test_a_configuration_does_not_step() -> None:
    with pytest.raises(RefusedError, match="from_config"):
        named("euler", scheduler_config(SD15)).set_timesteps(3)
    assert not hasattr(scheduler_config(SD15), "step")
    with pytest.raises(AttributeError, match="no 'stepp'"):
        scheduler_config(SD15).stepp  # noqa: B018


def test_names_of_flows_and_edm() -> None:
    flow = scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    for name, kind in (
        ("euler", "flow_euler"),
        ("heun", "flow_heun"),
        ("dpmpp_2m", "dpm_multistep"),
        ("unipc", "unipc"),
    ):
        config = named(name, flow)
        assert (config.kind, config.flow_shift, config.is_flow) == (kind, 3.0, True)
        assert sampler_table(config, 6).steps == 6
    edm = scheduler_config({"_class_name": "EDMEulerScheduler", "sigma_max": 90.0})
    assert named("dpmpp_2m", edm).sigma_max == 90.0
    for name, base in (
        ("ddim", flow),
        ("dpmpp_2m_karras", flow),
        ("ddim", edm),
        ("nope", flow),
        ("dpm_2m", edm),
        ("dpm_2m", flow),
    ):
        with pytest.raises(ArgumentError) as caught:
            named(name, base)
        assert caught.value.field == "scheduler"
    assert set(NAMES) <= set(samplers())
    for base in (scheduler_config({**flow.config, "shift_terminal": 0.1}), edm):
        suiting = [name for name in samplers() if _suits(name, base)]
        assert len(suiting) >= 3
        for first in suiting:
            assert all(named(name, named(first, base)) == named(name, base) for name in suiting), first


def _suits(name: str, base: SchedulerConfig) -> bool:
    with contextlib.suppress(ArgumentError):
        return bool(named(name, base))
    return False


def test_betas_that_leave_no_signal_are_an_error() -> None:
    """ᾱ underflows to 0, so that the last sigma would be infinite."""
    config = scheduler_config({"_class_name": "SASolverScheduler", "beta_end": 0.5, "use_karras_sigmas": True})
    with pytest.raises(ConfigError, match="no signal") as caught:
        sampler_table(config, 3)
    assert caught.value.field == "beta_end"


def test_the_documentation_has_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    for name, (_, _, line) in NAMES.items():
        assert f"| `{name}` | {line} |" in text
