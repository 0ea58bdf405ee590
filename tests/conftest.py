"""What every test shares."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

# Kernels run under Triton's interpreter here, which is chosen when triton is imported, and compile in a process of
# their own (`tests/kernels/offline.py`). `make gpu-test` runs them on a GPU.
ON_GPU = os.environ.get("FASTLDM_TESTS") == "gpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, the longer the busier the machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's global generator, so that each can run alone."""
    torch.manual_seed(1234)
