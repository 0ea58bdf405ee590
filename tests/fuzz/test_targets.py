"""The fuzz targets on their seeds and on seeded changes of them, without a fuzzer: a part of each run, in seconds."""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from tests.fuzz import config, header

TARGETS = {"header": (header, 2000), "config": (config, 700)}


@pytest.mark.parametrize("target", [header, config], ids=TARGETS)
def test_every_seed_is_accepted(target: ModuleType) -> None:
    assert all(target.one_input(seed) for seed in target.seeds())


@pytest.mark.parametrize(("target", "count"), TARGETS.values(), ids=TARGETS)
def test_changed_seeds_are_refused_or_right(target: ModuleType, count: int) -> None:
    rng = random.Random(5)
    seeds = target.seeds()
    made = [target.mutated(rng.choice(seeds), rng) for _ in range(count)]
    verdicts = [target.one_input(data) for data in made if data is not None]
    assert len(verdicts) > 0.95 * count
    assert 0.05 * count < sum(verdicts) < 0.95 * count
