from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline import pairs


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pairs.Pair]:
    """pair(model, scheduler, levels=2): made once for all tests of this folder."""
    made: dict[tuple[object, ...], pairs.Pair] = {}

    def get(model: str = "sd1", scheduler: str = "ddim", *, levels: int = 2) -> pairs.Pair:
        key = (model, scheduler, levels)
        if key not in made:
            made[key] = pairs.make(tmp_path_factory.mktemp(model), model, scheduler, levels=levels)
        return made[key]

    return get


@pytest.fixture(scope="package")
def folder(pair: Callable[..., pairs.Pair]) -> Path:
    """A saved tiny SD 1.x; not to be changed: copy it."""
    return pair().folder
