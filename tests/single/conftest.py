from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.single.models import ANOTHER, KINDS, Sample
from tests.single.models import sample as make
from tests.single.narrow import narrow as make_narrow


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sample]:
    """sample(kind="sd1"), or "another", the same with other weights: made once for all tests; not to be changed."""
    made: dict[str, Sample] = {}

    def get(kind: str = "sd1") -> Sample:
        if kind not in made:
            made[kind] = make(ANOTHER if kind == "another" else KINDS[kind], tmp_path_factory.mktemp("single"))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A model whose single file needs no configuration."""
    return make_narrow(tmp_path_factory.mktemp("narrow"))


@pytest.fixture
def no_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING, "fastldm"):
        yield
    assert not caplog.records
