"""Every op by whoever is best at it there: a kernel of ours on a GPU, else PyTorch with its libraries.

    with ops.using("auto"), rehearsal("cuda") as choices:      # tensors are on the device "meta", nothing is computed
        ...
    choices[0]             # Choice(op="attention", what="2×4096×8×40, ... float16", by="fused", why="...")

The rule looks at devices, dtypes and shapes alone, so a captured graph repeats what was chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.ops import implementation, reference

HINTS = ("want_stats", "stats", "flip", "shift", "scale")  # do not change who is chosen
PRODUCTS = ("attention", "linear", "geglu", "conv2d")
GAINS = {  # what the kernel of an op saves
    "attention": "no padded head dim, packed projections as they lie",
    "group_norm": "SiLU within, no concatenation",
    "layer_norm": "one pass with the residual",
    "linear": "activation and residual before the product is stored",
    "geglu": "half of the product is never stored",
    "conv2d": "no concatenation, or an enlargement in four phases",
    "timestep_embedding": "all steps at once, with the first layer",
    "begin_row": "one launch",
    "end_row": "one launch",
    "to_uint8": "one launch",
}


@dataclass(frozen=True)
class Choice:
    """what: shapes, dtype and options of the call. by: "fused" or "reference"."""

    op: str
    what: str
    by: str
    why: str


@dataclass(frozen=True)
class _Rehearsal:
    device: str
    choices: list[Choice]


_rehearsal: ContextVar[_Rehearsal | None] = ContextVar("fastldm.ops.rehearsal", default=None)


@contextmanager
def rehearsal(device: str) -> Iterator[list[Choice]]:
    """The choices that calls in this context would make on such a device, in their order. No kernel is launched."""
    now = _Rehearsal(device, [])
    token = _rehearsal.set(now)
    try:
        with _no_launches() if _has_triton() else nullcontext():
            yield now.choices
    finally:
        _rehearsal.reset(token)


def _no_launches() -> AbstractContextManager[object]:
    from fastldm.kernels.launch import recording

    return recording()


def _chosen(op: str) -> Callable[..., Any]:
    plain = getattr(reference, op)

    @functools.wraps(plain)
    def call(*arguments: Any, **options: Any) -> Any:
        why = _against_kernels(op, arguments, options)
        if why is None:
            from fastldm.kernels.launch import Unsupported

            try:
                out = getattr(implementation("fused"), op)(*arguments, **options)
            except Unsupported as refusal:
                why = str(refusal)
            else:
                _note(op, arguments, options, "fused", GAINS[op])
                return out
        _note(op, arguments, options, "reference", why)
        if options.get("want_stats"):
            options["want_stats"] = False  # they would be a pass of their own
        return _in_contracts_layout(op, plain(*arguments, **options))

    return call


def without_kernels(device: torch.device) -> str | None:
    """Why no kernel runs there, or None; Triton's interpreter runs them on a CPU."""
    if _has_triton() and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _not_cuda(device.type) or _too_old(device)


def _not_cuda(kind: str) -> str | None:
    if kind != "cuda":
        return f"kernels run on CUDA devices, and this is {kind}"
    return None if _has_triton() else "triton is not installed"


def _too_old(device: torch.device) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels are for NVIDIA chips from sm_80 on"
    return None


def _against_kernels(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Why PyTorch computes the op, or None where a kernel does if it takes the arguments."""
    x: Tensor = arguments[0]
    now = _rehearsal.get()
    why = _not_cuda(x.device.type if now is None else now.device) or (_too_old(x.device) if now is None else None)
    if why is not None:
        return why
    if op in PRODUCTS and x.dtype == torch.float32:
        return "products of float32 have no tensor cores"
    if op == "linear" and options.get("act") is None and options.get("residual") is None:
        return "cuBLAS: there is nothing to fuse"
    if op == "conv2d" and options.get("x2") is None and options.get("w_phases") is None:
        return "cuDNN: one input, not enlarged in phases"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _note(op: str, arguments: tuple[Any, ...], options: dict[str, Any], by: str, why: str) -> None:
    now = _rehearsal.get()
    if now is not None:
        now.choices.append(Choice(op, _what(op, arguments, options), by, why))


def _what(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """2×320×64×64, 320×320×3×3 float16, stride=2"""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    shapes = ", ".join("×".join(map(str, t.shape)) for t in tensors if t.ndim > 1 or len(tensors) == 1)
    defaults = inspect.signature(getattr(reference, op)).parameters
    given = {name: v for name, v in options.items() if name not in HINTS and v is not defaults[name].default}
    words = [f"{name}={v}" if isinstance(v, str | int) else name for name, v in given.items()]
    return ", ".join([f"{shapes} {str(tensors[0].dtype).removeprefix('torch.')}", *words])


def _in_contracts_layout(op: str, out: Any) -> Any:
    """Tensors without memory have the layout of a CPU's convolution, not of cuDNN's."""
    if _rehearsal.get() is None or op not in ("conv2d", "group_norm"):
        return out
    if isinstance(out, tuple):
        return out[0].contiguous(memory_format=torch.channels_last), *out[1:]
    return out.contiguous(memory_format=torch.channels_last)


attention = _chosen("attention")
group_norm = _chosen("group_norm")
layer_norm = _chosen("layer_norm")
linear = _chosen("linear")
geglu = _chosen("geglu")
conv2d = _chosen("conv2d")
timestep_embedding = _chosen("timestep_embedding")
begin_row = _chosen("begin_row")
end_row = _chosen("end_row")
to_uint8 = _chosen("to_uint8")
