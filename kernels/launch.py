"""What every launcher shares: its refusals, its outputs, and the launch itself, which can be recorded instead.

A launcher checks shapes, dtypes and strides, takes its tiles from `tuning.py`, and launches by keyword:

    require(x.stride(-1) == 1, "the last dimension of x is not contiguous")
    out = empty(x.shape, like=x)
    launch(_kernel, (rows,), x=x, out=out, C=channels, BLOCK_C=128, warps=4, stages=2)

Recorded launches have never run: with tensors on the device "meta" they tell what would be compiled for a shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


class Unsupported(Exception):
    """What no kernel here takes: a shape, a dtype, a layout. The message is the reason."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def require_dtype(allowed: Sequence[torch.dtype], **tensors: Tensor | None) -> None:
    """Every tensor that is given has one and the same dtype of `allowed`."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    for name, t in present.items():
        require(t.dtype in allowed, f"{name} is {_short(t.dtype)}, not {', '.join(map(_short, allowed))}")
        require(t.dtype == first.dtype, f"{name} is {_short(t.dtype)} beside {_short(first.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Launch:
    """kernel: a jitted function. arguments: by name, tiles and flags included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int


_record: ContextVar[list[Launch] | None] = ContextVar("fastldm.kernels.record", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches in this context are listed, and do not run."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int, stages: int, **arguments: Any) -> None:
    """Runs the kernel on the current stream of its tensors' device. Allocates nothing: a graph can capture it."""
    record = _record.get()
    if record is not None:
        record.append(Launch(kernel, grid, arguments, warps, stages))
        return
    with _guard(next(a.device for a in arguments.values() if isinstance(a, Tensor))):
        kernel[grid](**arguments, num_warps=warps, num_stages=stages)


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def empty(
    shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None, channels_last: bool = False
) -> Tensor:
    """An output, not written yet, on the device of `like`. A test may fill it with NaN first."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def row_stride(x: Tensor, name: str) -> int:
    """How many elements the rows of x (..., C) are apart. Raises `Unsupported` where not all by the same."""
    require(x.stride(-1) == 1 or x.shape[-1] == 1, f"the last dimension of {name} is not contiguous")
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    for (_, stride), (size, inner) in itertools.pairwise(outer):
        require(stride == size * inner, f"the rows of {name} are not evenly spaced")
    return outer[-1][1] if outer else x.shape[-1]


def tma_reads(x: Tensor, stride: int) -> bool:
    """Whether TMA can read rows of x that are `stride` elements apart: from multiples of 16 bytes, none overlapping."""
    reach = x.shape[-1] <= stride < 2**40 // x.itemsize
    return reach and x.numel() > 0 and x.data_ptr() % 16 == 0 and stride * x.itemsize % 16 == 0


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return int(triton.next_power_of_2(n))
