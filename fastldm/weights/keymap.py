"""Names and packing: where each tensor of a checkpoint lives in a model.

A model holds one copy of every weight in its fast layout; an address is (parameter, rows). The model says what it packs
(`parts` of its layers) and where its module paths differ from the hub's (`hub_names`); all else is the same name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Address:
    """The place of one checkpoint tensor: rows start to stop of a parameter."""

    parameter: str
    start: int
    stop: int


def addresses(model: nn.Module) -> dict[str, Address]:
    """{the hub's tensor name: its address}, over all parameters of `model`."""
    table: dict[str, Address] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            parent = f"{path.rpartition('.')[0]}." if "." in path else ""
            start = 0
            parts = getattr(module, "parts", None)
            for part, rows in ((path.removeprefix(parent), len(parameter)),) if parts is None else parts:
                hub = _hub_name(f"{parent}{part}.{name}", model)
                if hub in table:
                    raise ValueError(f"{hub} would live at {table[hub].parameter} and at {full}")
                table[hub] = Address(full, start, start + rows)
                start += rows
            if start != len(parameter):
                raise ValueError(f"the parts of {full} have {start} rows, the parameter has {len(parameter)}")
    return table


def _hub_name(name: str, model: nn.Module) -> str:
    for ours, theirs in getattr(model, "hub_names", ()):
        name = name.replace(ours, theirs, 1)
    return name


def fits(shape: Iterable[int], target: Tensor) -> bool:
    """Whether a checkpoint's tensor can stand at `target`: the same shape, or a 1×1 convolution for a linear layer."""
    found = tuple(shape)
    return found == tuple(target.shape) or (target.ndim == 2 and found == (*target.shape, 1, 1))


# Old spellings of the hub, each brought to the present one; and tensors that carry no weights.
ALIASES = (
    (re.compile(r"^text_model\."), ""),  # transformers before 5.6
    (re.compile(r"(\.attentions\.\d+)\.query\."), r"\1.to_q."),  # diffusers before 0.17, in the autoencoder
    (re.compile(r"(\.attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(\.attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(\.attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
IGNORED = re.compile(r"(^|\.)embeddings\.position_ids$")


def present_name(name: str) -> str | None:
    """A tensor's name in the hub's present spelling; None for a tensor that no model needs."""
    if IGNORED.search(name):
        return None
    for pattern, replacement in ALIASES:
        name = pattern.sub(replacement, name)
    return name
