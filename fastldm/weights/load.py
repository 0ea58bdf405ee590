"""Puts a checkpoint's tensors into a model: strictly, packed, one copy in memory, every value finite."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastldm.errors import WeightsError, brief
from fastldm.weights.header import TensorInfo
from fastldm.weights.keymap import addresses, fits, present_name

log = logging.getLogger("fastldm")

Model = TypeVar("Model", bound=nn.Module)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 10  # names listed in a message
_PLAIN = re.compile(r"\w[\w.-]{0,199}", re.ASCII)


class Tensors(Protocol):
    """Named tensors on disk."""

    @property
    def where(self) -> str: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> Tensor: ...


class StateDict:
    """Named tensors in memory, as a module of another library has them."""

    def __init__(self, where: str, tensors: Mapping[str, Tensor]) -> None:
        self.where, self._tensors = where, tensors
        self.infos = {k: TensorInfo(k, v.dtype, tuple(v.shape)) for k, v in tensors.items()}

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise WeightsError(f"{self.where}: {name} has no values: it is on the meta device", field=name)
        return tensor.detach().cpu().contiguous()


def load(build: Callable[[], Model], tensors: Tensors, *, dtype: torch.dtype, device: torch.device) -> Model:
    """`fill` of the `skeleton` that `build` makes."""
    return fill(skeleton(build), tensors, dtype=dtype, device=device)


def skeleton(build: Callable[[], Model]) -> Model:
    """A model without weights. `build` is called under `torch.device("meta")`, which holds for this thread alone."""
    with torch.device("meta"):
        return build().requires_grad_(False).eval()


def fill(model: Model, tensors: Tensors, *, dtype: torch.dtype, device: torch.device) -> Model:
    """The skeleton with the checkpoint's weights, in `dtype` on `device`, for inference.

    Memory grows by the weights in `dtype` and one tensor as it is on disk.
    Raises WeightsError naming what is missing, left over, of another shape, no float, or not finite in `dtype`.
    """
    table = addresses(model)
    names = matched(model, tensors)
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
            check_finite(rows, source, tensors.infos[names[hub]].name, tensors.where)
        _assign(model, parameter, packed)
    return model


def matched(model: nn.Module, tensors: Tensors) -> dict[str, str]:
    """{the hub's present name: the name in `tensors`}, after checking that both sides are the same set and shapes."""
    table = addresses(model)
    names: dict[str, str] = {}
    for name in tensors.infos:
        hub = present_name(name)
        if hub is None:
            continue
        if hub in names:
            twice = _listed((names[hub], name))
            raise WeightsError(f"{tensors.where}: {twice} are the same tensor", field=name)
        names[hub] = name
    refuse(tensors.where, "are missing", table.keys() - names.keys(), len(table))
    refuse(tensors.where, "do not belong to this model", names.keys() - table.keys(), len(names))
    for hub, name in names.items():
        info, address = tensors.infos[name], table[hub]
        target = model.get_parameter(address.parameter)[address.start : address.stop]
        if not fits(info.shape, target):
            raise WeightsError(
                f"{tensors.where}: {info.name} has shape {tuple(info.shape)}, the model needs {tuple(target.shape)}",
                field=info.name,
            )
        if info.dtype not in FLOATS:
            raise WeightsError(f"{tensors.where}: {info.name} is {info.dtype}, weights must be floats", field=info.name)
    doubles = [name for name in names.values() if tensors.infos[name].dtype == torch.float64]
    if doubles:
        log.warning("%s: %d tensors are float64 and are rounded", tensors.where, len(doubles))
    return names


def refuse(where: str, problem: str, names: Collection[str], total: int) -> None:
    """Raises `WeightsError` with the first ten of `names` and how many of `total` they are, if there is one."""
    if names:
        shown = sorted(names)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise WeightsError(
            f"{where}: {len(names)} of {total} tensors {problem}: {_listed(shown[:SHOWN])}{more}",
            field=shown[0],
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if _PLAIN.fullmatch(name) else brief(name) for name in names)


def check_finite(rows: Tensor, source: Tensor, name: str, where: str) -> None:
    """Raises `WeightsError` if `rows`, which is `source` in another dtype, has a NaN or infinity."""
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
