"""Puts a checkpoint's tensors into a model: strictly, packed, one copy in memory, every value finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastldm.errors import WeightsError
from fastldm.weights.header import TensorInfo
from fastldm.weights.keymap import Address, addresses, fits, present_name

log = logging.getLogger("fastldm")

Model = TypeVar("Model", bound=nn.Module)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 10  # names listed in a message


class Tensors(Protocol):
    """Named tensors on disk."""

    @property
    def where(self) -> str: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Tensor: ...


def load(build: Callable[[], Model], tensors: Tensors, *, dtype: torch.dtype, device: torch.device) -> Model:
    """A model with the checkpoint's weights, in `dtype` on `device`, for inference.

    build: makes the model; called under `torch.device("meta")`, which holds for this thread alone.
    Memory grows by the weights in `dtype` and one tensor as it is on disk.
    Raises WeightsError naming what is missing, left over, of another shape, no float, or not finite in `dtype`.
    """
    with torch.device("meta"):
        model = build().requires_grad_(False).eval()
    table = addresses(model)
    names = _matched(table, model, tensors)
    by_parameter: dict[str, list[str]] = {}
    for hub, address in table.items():
        by_parameter.setdefault(address.parameter, []).append(hub)
    for parameter, hubs in by_parameter.items():
        shape = model.get_parameter(parameter).shape
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        packed = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
        for hub in hubs:
            rows = packed[table[hub].start : table[hub].stop]
            source = tensors.read(names[hub])
            rows.copy_(source.view(rows.shape))
            _check_finite(rows, source, names[hub], tensors.where)
        _assign(model, parameter, packed)
    return model


def _matched(table: Mapping[str, Address], model: nn.Module, tensors: Tensors) -> dict[str, str]:
    """{the hub's present name: the name in the file}, after checking that both sides are the same set and shapes."""
    names: dict[str, str] = {}
    for name in tensors.infos:
        hub = present_name(name)
        if hub is None:
            continue
        if hub in names:
            raise WeightsError(f"{tensors.where}: {names[hub]!r} and {name!r} are the same tensor", field=name)
        names[hub] = name
    _refuse(tensors.where, "are missing", table.keys() - names.keys(), len(table))
    _refuse(tensors.where, "do not belong to this model", names.keys() - table.keys(), len(names))
    for hub, name in names.items():
        info, address = tensors.infos[name], table[hub]
        target = model.get_parameter(address.parameter)[address.start : address.stop]
        if not fits(info.shape, target):
            raise WeightsError(
                f"{tensors.where}: {name} has shape {tuple(info.shape)}, the model needs {tuple(target.shape)}",
                field=name,
            )
        if info.dtype not in FLOATS:
            raise WeightsError(f"{tensors.where}: {name} is {info.dtype}, weights must be floats", field=name)
    doubles = [name for name in names.values() if tensors.infos[name].dtype == torch.float64]
    if doubles:
        log.warning("%s: %d tensors are float64 and are rounded", tensors.where, len(doubles))
    return names


def _refuse(where: str, problem: str, names: Collection[str], total: int) -> None:
    if names:
        shown = sorted(names)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise WeightsError(
            f"{where}: {len(names)} of {total} tensors {problem}: {_listed(shown[:SHOWN])}{more}",
            field=shown[0],
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if name.isprintable() and len(name) < 200 else repr(name[:200]) for name in names)


def _check_finite(rows: Tensor, source: Tensor, name: str, where: str) -> None:
    if torch.isfinite(rows.sum(dtype=torch.float32)) or bool(torch.isfinite(rows).all()):
        return
    if bool(torch.isfinite(source).all()):
        largest = source.abs().max().item()
        raise WeightsError(f"{where}: {name} reaches {largest:g}, too large for {rows.dtype}", field=name)
    bad = int((~torch.isfinite(source)).sum())
    raise WeightsError(f"{where}: {name} has {bad} values that are NaN or infinite", field=name)


def _assign(model: nn.Module, parameter: str, value: Tensor) -> None:
    path, _, name = parameter.rpartition(".")
    setattr(model.get_submodule(path), name, nn.Parameter(value, requires_grad=False))
