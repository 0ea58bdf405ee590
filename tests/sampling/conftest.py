"""Warnings of the oracle are not ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_oracle() -> Iterator[None]:
    with warnings.catch_warnings():
        for module in ("diffusers", "torchsde", "torch", "numpy"):
            warnings.filterwarnings("ignore", module=rf"{module}\b")
        yield
