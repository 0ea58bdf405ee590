"""The tests of the kernels are tested: a kernel with one deliberate mistake fails them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.kernels.mutants import MUTANTS, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.op}: {m.why}")
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    tests = importlib.import_module(f"tests.kernels.test_{mutant.op}")
    module = mutated(mutant, tmp_path)
    options = {"whole": True} if mutant.whole else {}
    with pytest.raises(AssertionError):
        tests.check(module, mutant.case, mutant.dtype, **options)
