"""Where a model runs and in which dtype, as callers say it."""

from __future__ import annotations

from typing import Any

import torch

from fastldm.errors import ArgumentError, UnknownArgumentError, brief
from fastldm.ops import IMPLEMENTATIONS
from fastldm.ops.auto import without_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUTS = (None, torch.channels_last, torch.preserve_format)
_NEEDLESS = ("non_blocking", "copy", "silence_dtype_warnings")  # of torch's or diffusers' `to`


def asked_dtype(torch_dtype: object = None, dtype: object = None) -> torch.dtype | None:
    """The dtype under either of its names; None where neither is given."""
    if torch_dtype is not None and dtype is not None and torch_dtype is not dtype:
        raise ArgumentError(f"dtype = {brief(dtype)}: torch_dtype says {brief(torch_dtype)}", field="dtype")
    name, value = ("dtype", dtype) if torch_dtype is None else ("torch_dtype", torch_dtype)
    if value is None:
        return None
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        raise ArgumentError(f"{name} = {brief(value)}: must be one of {', '.join(map(str, DTYPES))}", field=name)
    return value


def asked_backend(value: object) -> str:
    """The implementation of the ops."""
    if not isinstance(value, str) or value not in IMPLEMENTATIONS:
        raise ArgumentError(f"backend = {brief(value)}: must be one of {', '.join(IMPLEMENTATIONS)}", field="backend")
    return value


def check_backend(backend: str, device: torch.device) -> None:
    """Raises `ArgumentError` for kernels alone where none runs."""
    if backend == "fused" and (reason := without_kernels(device)):
        raise ArgumentError(f'backend = "fused": {reason}; "auto" takes kernels where there are some', field="backend")


def asked_device(value: object) -> torch.device | None:
    """The device, a GPU with its number; None where none is given."""
    device = _device(value)
    if device is None or device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ArgumentError(f"device = {brief(value)}: there are {count} GPUs here", field="device")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def device_type(value: object) -> str | None:
    """ "cpu" or "cuda", whether it is there or not; None where none is given."""
    device = _device(value)
    return None if device is None else device.type


def _device(value: object) -> torch.device | None:
    if value is None:
        return None
    try:
        device = None if isinstance(value, bytes) else torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError):  # the last for a number beyond 64 bits
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ArgumentError(f'device = {brief(value)}: must be "cpu", "cuda" or "cuda:N"', field="device")
    return torch.device("cpu") if device.type == "cpu" else device


def destination(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """What the arguments of a `to(...)` ask for, as torch and diffusers read them: a device, a dtype, or both.

    Raises `ArgumentError` naming the argument.
    """
    given = {name: kwargs.pop(name, None) for name in ("device", "dtype")}
    layout = kwargs.pop("memory_format", None)
    for name in _NEEDLESS:
        if not isinstance(value := kwargs.get(name, False), bool):
            raise ArgumentError(f"{name} = {brief(value)}: must be True or False", field=name)
    unknown = next((name for name in kwargs if name not in _NEEDLESS), None)
    if unknown is not None:
        raise UnknownArgumentError(f"{unknown}: to() takes device, dtype and memory_format", field=unknown)
    if not any(layout is known for known in _LAYOUTS):
        raise ArgumentError(f"memory_format = {brief(layout)}: channels_last is what runs here", field="memory_format")
    for value in args:
        name = "dtype" if isinstance(value, torch.dtype) else "device"
        if value is None:
            continue
        if given[name] is not None:
            raise ArgumentError(f"{name} = {brief(value)}: {brief(given[name])} is given, too", field=name)
        given[name] = value
    return asked_device(given["device"]), asked_dtype(dtype=given["dtype"])
