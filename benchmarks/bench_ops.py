"""Each op by itself under pytest-benchmark, at the first of its real shapes: what a change of one op did to it.

    python -m pytest benchmarks/bench_ops.py -k attention --benchmark-autosave
    python -m pytest benchmarks/bench_ops.py -k attention --benchmark-compare

On a GPU: its kernel and PyTorch, in float16. Elsewhere: PyTorch, in float32. A call is timed with its launch, and a GPU
is waited for: `benchmarks/kernels.py` measures more carefully what stands in docs/performance.md.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from benchmarks.real_shapes import REAL, Shape
from fastldm.ops import reference

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if ON_GPU else ("cpu", torch.float32)
SHAPES = [(op, shape) for op in REAL for shape in REAL[op][:2]]


@pytest.mark.parametrize("by", ["kernel", "reference"] if ON_GPU else ["reference"])
@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=lambda v: v if isinstance(v, str) else f"{v.model} {v.what}")
@torch.no_grad()
def test_op(benchmark: Any, op: str, shape: Shape, by: str) -> None:
    module = importlib.import_module(f"fastldm.kernels.{op}") if by == "kernel" else reference
    arguments, options = shape.make(DEVICE, DTYPE)
    counters = [t for t in arguments if isinstance(t, torch.Tensor) and t.dtype == torch.int64]

    def call() -> None:
        getattr(module, op)(*arguments, **options)
        if ON_GPU:
            torch.cuda.synchronize()

    def rewound() -> None:
        for counter in counters:  # the row of begin_row and end_row, which goes on with every call
            counter.zero_()

    benchmark.extra_info["bytes"] = sum(t.numel() * t.itemsize for t in arguments if isinstance(t, torch.Tensor))
    benchmark.pedantic(call, setup=rewound, rounds=100 if ON_GPU else 5, warmup_rounds=3 if ON_GPU else 1)
