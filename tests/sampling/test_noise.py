"""Random numbers: diffusers' own, from the caller's generator, and nothing global touched."""

from __future__ import annotations

import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fastldm.errors import ArgumentError
from fastldm.sampling import SamplerTable, sampler_table, scheduler_config
from fastldm.sampling.noise import RowNoise, draw
from tests.sampling.oracle import SHAPE, error, net, normal, run_table


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_are_diffusers(dtype: torch.dtype) -> None:
    for make in (lambda: seeded(1)[0], lambda: seeded(1), lambda: seeded(1, 2, 3)):
        ours = draw((3, 4, 8, 8), make(), dtype=dtype)
        theirs = randn_tensor((3, 4, 8, 8), generator=make(), dtype=dtype, device=torch.device("cpu"))
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


def test_without_a_generator_nothing_global_is_touched() -> None:
    before = torch.random.get_rng_state()
    first, second = draw((2, 3), None), draw((2, 3), None)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    third = draw((2, 3), None)
    torch.manual_seed(0)
    assert not torch.equal(third, draw((2, 3), None))


@pytest.mark.parametrize("generator", [[], 3, "x", [None], [torch.Generator(), 3], seeded(1, 2)])
def test_bad_generators(generator: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        draw((3, 4), generator)
    assert caught.value.field == "generator"


def test_a_generator_of_another_device_is_refused() -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ArgumentError, match="cuda"):
        draw((1, 4), Elsewhere())


def table_of(name: str, steps: int, begin: int = 0, **config: Any) -> SamplerTable:
    return sampler_table(scheduler_config({"_class_name": name, **config}), steps, begin=begin)


def test_rows_draw_in_order_and_only_where_diffusers_does() -> None:
    table = table_of("LCMScheduler", 4)
    noise = RowNoise(table, (1, 4), seeded(5)[0])
    rows = [noise(r) for r in range(4)]
    assert rows[3] is None
    source = seeded(5)[0]
    for row in rows[:3]:
        assert row is not None
        assert torch.equal(row, torch.randn((1, 4), generator=source))


# ------------------------------------------------------------------------------------------------ Brownian intervals


@pytest.mark.filterwarnings("ignore:Should have")
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("steps", [4, 9, 20])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "timestep_spacing": "leading"},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
)
def test_brownian_noise_is_diffusers(config: dict[str, Any], steps: int, begin: int) -> None:
    """In float32 throughout, because the motion is rough: an ulp of time is 1e-4 of noise."""
    scheduler = diffusers.DPMSolverSDEScheduler(noise_sampler_seed=7, **config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(2 * begin)
    start = x = torch.from_numpy(normal(0)).float() * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps[2 * begin :]
    for t in timesteps:
        e = net(scheduler.scale_model_input(x, t).double().numpy(), float(t))
        x = scheduler.step(torch.from_numpy(e).float(), t, x).prev_sample
    table = table_of("DPMSolverSDEScheduler", steps, begin, noise_sampler_seed=7, **config)
    assert table.timesteps == pytest.approx(timesteps.numpy(), rel=1e-5, abs=1e-3)
    noise = RowNoise(table, SHAPE, None)
    drawn = [noise(r) for r in range(table.rows)]
    assert drawn[-1] is None
    noises = np.stack([np.zeros(SHAPE) if n is None else n.numpy() for n in drawn])
    assert error(run_table(table, net, start.double().numpy(), noises), x.double().numpy()) <= 2e-6


@pytest.mark.filterwarnings("ignore:Should have")
def test_brownian_noise_is_seeded_by_one_draw_of_the_callers_generator() -> None:
    table = table_of("DPMSolverSDEScheduler", 5)
    source = seeded(3)[0]
    one = RowNoise(table, SHAPE, source)
    after = torch.randn(3, generator=source)
    other = seeded(3)[0]
    torch.randint(0, 2**63 - 1, (), generator=other)
    assert torch.equal(after, torch.randn(3, generator=other))
    again = RowNoise(table, SHAPE, seeded(3)[0])
    each = RowNoise(table, SHAPE, seeded(3, 4))
    assert torch.equal(one(0), again(0))
    for r in range(table.rows - 1):
        assert each(r).shape == SHAPE
    alone = RowNoise(table, (1, *SHAPE[1:]), seeded(4))
    fresh = RowNoise(table, SHAPE, seeded(3, 4))
    assert torch.equal(fresh(0)[1:], alone(0))


def test_brownian_noise_has_unit_variance() -> None:
    table = table_of("DPMSolverSDEScheduler", 8)
    noise = RowNoise(table, (1, 4, 64, 64), seeded(1)[0])
    for r in range(table.rows - 1):
        assert float(noise(r).std()) == pytest.approx(1, abs=0.03)


def test_brownian_noise_without_torchsde_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ArgumentError, match="pip install torchsde"):
        RowNoise(table_of("DPMSolverSDEScheduler", 4), SHAPE, None)
