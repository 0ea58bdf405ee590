"""Every table against diffusers' own scheduler: the same calls of the network, the same noise, the same result.

Both sides run in float64, diffusers on the values of its float32 tables. What remains is the rounding of those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch

from fastldm.errors import Error
from fastldm.sampling import sampler_table, scheduler_config
from tests.sampling.cases import LDM, Case, cases
from tests.sampling.oracle import SHAPE, error, net, normal, run_diffusers, run_table, scheduler_of

BOUND = 1e-5
ALL = cases()


def compare(case: Case) -> str | None:
    """None where the table and diffusers agree, else what differs; skips where diffusers has no finite result."""
    config = dict(case.config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = run_diffusers(case.name, config, case.steps, begin=case.begin, eta=case.eta)
    except (ValueError, IndexError, NotImplementedError, RuntimeError, UnboundLocalError, TypeError) as failure:
        theirs, reason = None, repr(failure)[:80]
    if theirs is None or not np.isfinite(theirs.x).all():
        with contextlib.suppress(Error):  # we may do better, or say so; nothing else
            sampler_table(_config(case), case.steps, eta=case.eta, begin=case.begin)
        pytest.skip(f"diffusers: {reason}" if theirs is None else "diffusers: not finite")
    table = sampler_table(_config(case), case.steps, eta=case.eta, begin=case.begin)
    if table.rows != len(theirs.timesteps):
        return f"{table.rows} calls of the network, not {len(theirs.timesteps)}"
    if not np.allclose(table.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3):
        r = int(np.abs(table.timesteps - theirs.timesteps).argmax())
        return f"timestep {table.timesteps[r]} for {theirs.timesteps[r]} in row {r}"
    if list(table.draws) != theirs.draws:
        return f"draws {table.draws} for {theirs.draws}"
    if abs(table.start[1] / theirs.start - 1) > 1e-6:
        return f"starts from noise times {table.start[1]}, not {theirs.start}"
    noises = np.where(table.draws[:, None, None, None, None], normal(1, table.rows), np.nan)
    noises = np.nan_to_num(noises)
    ours = run_table(table, net, normal(0) * theirs.start, noises)
    difference = error(ours, theirs.x)
    return None if difference <= BOUND else f"differs by {difference:.1e}"


def _config(case: Case):
    return scheduler_config({"_class_name": case.name, **dict(case.config)})


@pytest.mark.parametrize("case", ALL, ids=str)
def test_table_equals_diffusers(case: Case) -> None:
    assert compare(case) is None


MIDDLE = [
    dataclasses.replace(case, begin=int(case.steps * (0.98, 0.7, 0.25, 0.5)[i % 4]))
    for i, case in enumerate(ALL)
    if case.steps >= 4 and i % 3 == 0
]


@pytest.mark.parametrize("case", MIDDLE, ids=str)
def test_start_in_the_middle_equals_diffusers(case: Case) -> None:
    assert compare(case) is None


def test_a_thousand_cases_are_compared() -> None:
    assert len(ALL) + len(MIDDLE) >= 1000
    assert len(set(map(str, ALL))) >= 0.95 * len(ALL)


TAKING = [
    ("DDPMScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("EulerDiscreteScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("EulerDiscreteScheduler", {"sigmas": [9.0, 3.0, 1.0, 0.2, 0.0]}),
    ("EulerDiscreteScheduler", {"sigmas": [9.0, 3.0, 1.0, 0.2]}),
    ("HeunDiscreteScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("DPMSolverMultistepScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("DPMSolverSinglestepScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("LCMScheduler", {"timesteps": [999, 499, 259, 19]}),
    ("TCDScheduler", {"timesteps": [999, 499, 259, 19]}),
    ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
    ("FlowMatchEulerDiscreteScheduler", {"timesteps": [999.0, 700.0, 400.0, 50.0]}),
]


@pytest.mark.parametrize(("name", "given"), TAKING, ids=lambda v: v if isinstance(v, str) else "".join(v))
def test_own_timesteps_and_sigmas(name: str, given: dict[str, list[float]]) -> None:
    config = {} if name.startswith("Flow") else LDM
    theirs = run_diffusers(name, config, 4, **given)
    table = sampler_table(scheduler_config({"_class_name": name, **config}), 50, **given)
    assert np.allclose(table.timesteps, theirs.timesteps, rtol=1e-6, atol=2e-4)
    ours = run_table(table, net, normal(0) * theirs.start, normal(1, table.rows))
    assert error(ours, theirs.x) <= BOUND


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_dynamic_shift(name: str, kind: str) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": kind}
    if name.startswith("UniPC"):
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    theirs = run_diffusers(name, config, 6, mu=0.8)
    table = sampler_table(scheduler_config({"_class_name": name, **config}), 6, mu=0.8)
    assert np.allclose(table.timesteps, theirs.timesteps, rtol=1e-6)
    assert error(run_table(table, net, normal(0), normal(1, 6)), theirs.x) <= BOUND


# ------------------------------------------------------------------------------------------- image to image, inpainting

BLENDED = [
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("SASolverScheduler", {"use_karras_sigmas": True}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize(("name", "config"), BLENDED, ids=lambda v: v if isinstance(v, str) else "")
def test_noised_images_are_diffusers(name: str, config: dict[str, object], begin: int) -> None:
    """`start_from_image` and `u`, `v` against add_noise at the first timestep, and at each next one."""
    config = config if name.startswith("Flow") else {**LDM, **config}
    scheduler = scheduler_of(name, config)
    scheduler.set_timesteps(8)
    table = sampler_table(scheduler_config({"_class_name": name, **config}), 8, begin=begin)
    image, noise = (torch.from_numpy(normal(seed)) for seed in (5, 6))
    add = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()

    def noised(flat: int) -> np.ndarray:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(flat)
        t = scheduler.timesteps[flat : flat + 1]
        mixed = add(image, t, noise) if name.startswith("Flow") else add(image, noise, t)
        return mixed.numpy()

    first = begin * scheduler.order
    expected = [noised(first + i) for i in range(table.rows)] + [image.numpy()]
    mixes = [table.start_from_image, *zip(table.u, table.v, strict=True)]
    for (u, v), want in zip(mixes, expected, strict=True):
        assert error(u * image.numpy() + v * noise.numpy(), want) <= 1e-6


def test_inpainting_keeps_the_image_where_the_mask_is_zero() -> None:
    table = sampler_table(scheduler_config({"_class_name": "EulerDiscreteScheduler", **LDM}), 5)
    z0 = normal(3)
    out = run_table(table, net, normal(0), np.zeros((5, *SHAPE)), mask=0.0, z0=z0, n0=normal(4))
    assert np.array_equal(out, z0)
