"""What every test shares."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, the longer the busier the machine


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's global generator, so that each can run alone."""
    torch.manual_seed(1234)
