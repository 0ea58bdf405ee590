"""Who computes an op: by device, dtype and shapes, with the reason."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from fastldm.ops import auto, reference
from fastldm.ops.auto import Choice, rehearsal


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def image(*shape: int) -> Tensor:
    return meta(*shape).to(memory_format=torch.channels_last)


def choice(op: str, *arguments: Any, device: str = "cuda", **options: Any) -> Choice:
    with ops.using("auto"), rehearsal(device) as choices:
        getattr(ops, op)(*arguments, **options)
    assert len(choices) == 1
    return choices[0]


X, W, PACKED = meta(2, 64, 320), meta(320, 320), meta(2, 64, 3, 8, 40).unbind(2)
MAP, TAPS = image(2, 320, 8, 8), image(320, 320, 3, 3)
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str, str]] = {
    "attention": ("attention", PACKED, {}, "fused", "no padded head dim"),
    "a head dim that no kernel has": ("attention", (meta(1, 9, 1, 300),) * 3, {}, "reference", "head dim 300"),
    "a product alone": ("linear", (X, W), {}, "reference", "cuBLAS: there is nothing to fuse"),
    "a product with more": ("linear", (X, W), {"residual": X}, "fused", "before the product is stored"),
    "a convolution alone": ("conv2d", (MAP, TAPS), {}, "reference", "cuDNN"),
    "a convolution of two inputs": ("conv2d", (MAP, image(320, 640, 1, 1)), {"x2": MAP}, "fused", "no concatenation"),
    "norm": ("layer_norm", (X, meta(320), meta(320), 1e-5), {}, "fused", "one pass"),
    "NCHW": ("group_norm", (meta(2, 320, 8, 8), meta(320), meta(320), 32, 1e-5), {}, "reference", "not contiguous"),
    "float64": ("layer_norm", (X.double(), meta(320).double(), meta(320).double(), 1e-5), {}, "reference", "float64"),
    "float32 products": ("geglu", (X.float(), meta(640, 320).float(), meta(640).float()), {}, "reference", "tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_choice_on_a_gpu(case: str) -> None:
    op, arguments, options, by, why = CASES[case]
    found = choice(op, *arguments, **options)
    assert (found.op, found.by) == (op, by)
    assert why in found.why


@pytest.mark.parametrize("op", ["linear", "layer_norm"])
def test_on_a_cpu_pytorch_computes_everything(op: str) -> None:
    more = (meta(320), meta(320), 1e-5) if op == "layer_norm" else (W,)
    found = choice(op, X, *more, device="cpu")
    assert (found.by, found.why) == ("reference", "kernels run on CUDA devices, and this is cpu")


def test_what_was_asked_for() -> None:
    assert choice("conv2d", MAP, TAPS, stride=2, pad="end", residual=image(2, 320, 4, 4)).what == (
        "2×320×8×8, 320×320×3×3 float16, residual, stride=2, pad=end"
    )
    assert choice("conv2d", MAP, TAPS, stride=1, pad="same", want_stats=True).what == "2×320×8×8, 320×320×3×3 float16"


def test_without_triton_it_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    auto._has_triton.cache_clear()
    try:
        found = choice("layer_norm", X, meta(320), meta(320), 1e-5)
    finally:
        monkeypatch.undo()
        auto._has_triton.cache_clear()
    assert (found.by, found.why) == ("reference", "triton is not installed")


@pytest.mark.parametrize(
    ("capability", "why"), [((7, 5), "kernels are for NVIDIA chips from sm_80 on"), ((8, 0), None)]
)
def test_chips(capability: tuple[int, int], why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    assert auto._against_kernels("layer_norm", (x,), {}) == why


def test_results_are_those_of_the_one_that_is_chosen() -> None:
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with ops.using("auto"):
        assert torch.equal(ops.linear(x, w, act="silu"), reference.linear(x, w, act="silu"))


def test_pytorch_is_not_asked_for_statistics() -> None:
    """Which would be a pass of their own."""
    x, w = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 1, 1)
    with ops.using("auto"):
        y, stats = ops.conv2d(x, w, want_stats=True)
    assert stats is None
    assert torch.equal(y, reference.conv2d(x, w)[0])


def test_rehearsals_end() -> None:
    with rehearsal("cuda") as choices:
        pass
    with ops.using("auto"):
        ops.linear(torch.ones(1, 1), torch.ones(1, 1))
    assert choices == []
