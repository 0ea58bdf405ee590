"""Betas, timesteps and sigmas against diffusers and against golden values; the arguments of a run."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from fastldm.errors import ArgumentError, ConfigError
from fastldm.sampling import sampler_table, scheduler_config, schedules
from tests.sampling.cases import LDM

GOLDEN = [  # four steps on Stable Diffusion's betas: timesteps, init_noise_sigma
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, [751, 501, 501, 251, 1], 1.0),
    ("DDIMScheduler", {"steps_offset": 1}, [751, 501, 251, 1], 1.0),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, [751, 501, 251, 1], 4.2364),
    ("EulerDiscreteScheduler", {}, [999, 666, 333, 0], 14.6146),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, [999, 749, 499, 249], 14.6146),
    ("HeunDiscreteScheduler", {}, [999, 666, 666, 333, 333, 0, 0], 14.6146),
    ("DPMSolverMultistepScheduler", {}, [999, 749, 500, 250], 1.0),
    ("UniPCMultistepScheduler", {}, [999, 749, 500, 250], 1.0),
    ("LCMScheduler", {}, [999, 759, 499, 259], 1.0),
    ("TCDScheduler", {}, [999, 759, 499, 259], 1.0),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, [1000, 857.692, 602.151, 8.9286], 1.0),
]


@pytest.mark.parametrize(("name", "config", "timesteps", "start"), GOLDEN)
def test_golden(name: str, config: dict[str, Any], timesteps: list[float], start: float) -> None:
    betas = {} if name.startswith("Flow") else LDM
    table = sampler_table(scheduler_config({"_class_name": name, **betas, **config}), 4)
    assert table.timesteps == pytest.approx(timesteps, rel=1e-5)
    assert table.start == (0.0, pytest.approx(start, rel=1e-5))


def test_golden_zero_snr() -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    table = sampler_table(scheduler_config({"_class_name": "EulerDiscreteScheduler", **LDM, **config}), 4)
    assert table.start[1] == pytest.approx(4096, rel=1e-4)
    assert table.v[0] == pytest.approx(5.3987, rel=1e-4)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"])
@pytest.mark.parametrize(("total", "start", "end"), [(1000, 0.00085, 0.012), (1000, 1e-4, 0.02), (77, 1e-3, 0.3)])
def test_alphas_cumprod_is_diffusers(schedule: str, zero_snr: bool, total: int, start: float, end: float) -> None:
    config = {
        "num_train_timesteps": total,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": schedule,
        "rescale_betas_zero_snr": zero_snr,
    }
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
    ours = schedules.alphas_cumprod(scheduler_config({"_class_name": "DDPMScheduler", **config}))
    if schedule == "sigmoid" or zero_snr:  # exp and sqrt differ by an ulp between libraries
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0)
    else:
        assert np.array_equal(ours, theirs)


def test_trained_betas() -> None:
    betas = np.linspace(1e-3, 1e-2, 50).tolist()
    config = {"trained_betas": betas, "num_train_timesteps": 50}
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    assert np.array_equal(
        schedules.alphas_cumprod(scheduler_config({"_class_name": "DDIMScheduler", **config})), theirs
    )


EULER = scheduler_config({"_class_name": "EulerDiscreteScheduler", **LDM})
DDIM = scheduler_config({"_class_name": "DDIMScheduler", **LDM, "steps_offset": 1})


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**12, 2.0, True, "4", None, float("nan")])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler_table(EULER, steps)
    assert caught.value.field == "num_inference_steps"


@pytest.mark.parametrize("begin", [-1, 4, 1.0, True, "1"])
def test_bad_begin(begin: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler_table(EULER, 4, begin=begin)
    assert caught.value.field == "begin"


@pytest.mark.parametrize("eta", [-0.1, 1.1, "x", True, None, float("nan"), [0.5]])
def test_bad_eta(eta: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler_table(DDIM, 4, eta=eta)
    assert caught.value.field == "eta"


BAD_LISTS = (
    [],
    [1],
    [5, 5],
    [1, 2],
    ["x"],
    [[2, 1]],
    3,
    "abc",
    [float("nan"), 1],
    [-1, -2],
    [1e9, 1],
    range(2000, 0, -1),
)


@pytest.mark.parametrize("field", ["timesteps", "sigmas"])
@pytest.mark.parametrize("values", BAD_LISTS, ids=lambda v: str(v)[:20])
def test_bad_lists(field: str, values: Any) -> None:
    if field == "timesteps" and values == [1]:
        return  # one step
    with pytest.raises(ArgumentError) as caught:
        sampler_table(EULER, 4, **{field: values})
    assert caught.value.field == field


def test_lists_where_they_do_not_belong() -> None:
    for field in ("timesteps", "sigmas"):
        with pytest.raises(ArgumentError, match=field):
            sampler_table(DDIM, 4, **{field: [3, 2, 1]})
    with pytest.raises(ArgumentError, match="together"):
        sampler_table(EULER, 4, timesteps=[3, 2], sigmas=[3, 2])
    karras = scheduler_config({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True})
    with pytest.raises(ArgumentError, match="by sigma"):
        sampler_table(karras, 4, timesteps=[3, 2])


def test_a_schedule_that_leaves_the_training_timesteps() -> None:
    with pytest.raises(ArgumentError, match="steps_offset = 1"):
        sampler_table(DDIM, 1000)


def test_no_signal_at_the_first_timestep_is_an_error() -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    with pytest.raises(ConfigError, match="no signal"):
        sampler_table(scheduler_config({"_class_name": "DDIMScheduler", **LDM, **config}), 4)


def test_dynamic_shift_needs_mu() -> None:
    config = scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})
    with pytest.raises(ArgumentError) as caught:
        sampler_table(config, 4)
    assert caught.value.field == "mu"


@pytest.mark.parametrize("steps", [61, 103, 233, 999, 1000])
def test_trailing_spacing_has_as_many_steps_as_were_asked_for(steps: int) -> None:
    """diffusers makes one more at some counts, at timestep −1: a rounding error in its arange."""
    table = sampler_table(scheduler_config({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}), steps)
    assert table.rows == table.steps == steps
    assert table.timesteps.min() >= 0


def test_steps_are_counted_as_diffusers_progress_bar() -> None:
    """Pipelines tick once per `order` calls, and not during the calls beyond steps × order."""
    for name, config in (
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("PNDMScheduler", {}),
        ("HeunDiscreteScheduler", {}),
    ):
        scheduler = getattr(diffusers, name)(**config)
        for begin in (0, 3):
            scheduler.set_timesteps(8)
            left = scheduler.timesteps[begin * scheduler.order :]
            steps, order = 8 - begin, scheduler.order
            warmup = len(left) - steps * order
            ticks = [i == len(left) - 1 or (i + 1 > warmup and (i + 1) % order == 0) for i in range(len(left))]
            table = sampler_table(scheduler_config({"_class_name": name, **config}), 8, begin=begin)
            assert list(table.ends_step) == ticks
