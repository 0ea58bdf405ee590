"""Who computes: what the `backend` of a pipeline may be, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastldm
from fastldm.ops.auto import without_kernels
from fastldm.runtime import build
from tests.pipeline.pairs import paint

CALL: dict[str, Any] = {"prompt": "a red cat", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton's interpreter, in which the tests of kernels run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("value", ["triton", "", "Auto", None, 1])
def test_others_are_refused(folder: Path, value: Any) -> None:
    with pytest.raises(fastldm.Error, match="must be one of") as caught:
        fastldm.Pipeline(folder, backend=value)
    assert caught.value.field == "backend"


def test_kernels_alone_are_refused_without_a_gpu_before_a_weight_is_read(
    folder: Path, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "opened", None)
    with pytest.raises(fastldm.Error, match=r'"fused": kernels run on CUDA devices, and this is cpu; "auto"') as caught:
        fastldm.Pipeline(folder, backend="fused", device="cpu")
    assert caught.value.field == "backend"


def test_they_cannot_be_moved_to_where_none_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pipe = fastldm.Pipeline(folder, backend="fused")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(fastldm.Error, match='"fused"'):
        pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.float32


@pytest.mark.parametrize(("chip", "why"), [((7, 5), "from sm_80 on"), ((9, 0), None)])
def test_old_chips_have_no_kernels(
    compiled: None, monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int], why: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    found = without_kernels(torch.device("cuda", 0))
    assert (why in found) if why and found else found is why


def test_auto_paints_the_same_on_a_cpu(folder: Path) -> None:
    auto, plain = (paint(fastldm.Pipeline(folder, backend=name), **CALL) for name in ("auto", "reference"))
    np.testing.assert_allclose(auto, plain, atol=1e-5)
