"""Random numbers: drawn from the caller's generator, in the order and from the source that diffusers draws them.

Nothing here reads or changes torch's global generators.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.errors import ArgumentError

Generator = torch.Generator | Sequence[torch.Generator] | None


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the operating system."""
    return torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


def draw(
    shape: Sequence[int],
    generator: Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers of `shape` on `device`.

    generator: one for the whole batch, or a list with one for each sample; a list of one is that one. One on the CPU
    draws there, whatever `device` is, so that a seed gives the same numbers everywhere. None: a fresh one, seeded by
    the operating system. Raises `ArgumentError` naming `generator`.
    """
    device = torch.device(device)
    if generator is None:
        generator = fresh_generator(device)
    if isinstance(generator, torch.Generator):
        return _normal(tuple(shape), generator, dtype, device)
    sources = check_generators(generator)
    if len(sources) == 1:
        return _normal(tuple(shape), sources[0], dtype, device)
    if len(sources) != shape[0]:
        raise ArgumentError(
            f"generator: a list of {len(sources)} for a batch of {shape[0]}; give one, or one for each sample",
            field="generator",
        )
    return torch.cat([_normal((1, *shape[1:]), g, dtype, device) for g in sources])


def check_generators(generator: object) -> list[torch.Generator]:
    """`generator` as a list; `ArgumentError` where it is neither a torch.Generator nor a list of them."""
    sources = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not sources or not all(isinstance(g, torch.Generator) for g in sources):
        raise ArgumentError(
            f"generator: must be a torch.Generator or a list of them, not {type(generator).__name__}",
            field="generator",
        )
    return sources


def _normal(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    if g.device.type not in ("cpu", device.type):
        raise ArgumentError(
            f"generator: is on {g.device}, the tensor on {device}; use one on the CPU or on {device}",
            field="generator",
        )
    return torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(device)
