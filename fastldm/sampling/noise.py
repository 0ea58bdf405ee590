"""Random numbers: drawn from the caller's generator, in the order and from the source that diffusers draws them.

Nothing here reads or changes torch's global generators.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import ArgumentError
from fastldm.sampling.table import Brownian, SamplerTable

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
    sources = _sources(generator, shape[0])
    if len(sources) == 1:
        return _normal(tuple(shape), sources[0], dtype, device)
    return torch.cat([_normal((1, *shape[1:]), g, dtype, device) for g in sources])


def check_generators(generator: object) -> list[torch.Generator]:
    """`generator` as a list; `ArgumentError` where it is neither a torch.Generator nor a list of them."""
    given = list(generator) if isinstance(generator, list | tuple) else [generator]
    sources = [g for g in given if isinstance(g, torch.Generator)]
    if not sources or len(sources) < len(given):
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
    drawn = torch.randn(shape, generator=g, device=g.device, dtype=dtype)
    if device.type == "cuda" and not drawn.is_cuda:
        return drawn.pin_memory().to(device, non_blocking=True)  # the host goes on
    return drawn.to(device)


class RowNoise:
    """The noise of a run, row by row: `noise(r)` for r = 0, 1, ... in this order; None where row r draws none."""

    def __init__(
        self,
        table: SamplerTable,
        shape: Sequence[int],
        generator: Generator,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.table, self.shape, self.dtype, self.device = table, tuple(shape), dtype, torch.device(device)
        self.generator = fresh_generator(self.device) if generator is None else generator
        self.motion: BrownianMotion | None = None
        if table.brownian is not None and table.rows > 1:
            self.motion = BrownianMotion(table.brownian, self.shape, self.generator, dtype, self.device)

    def __call__(self, row: int) -> Tensor | None:
        if self.motion is not None:
            return self.motion(row)
        if not self.table.draws[row]:
            return None
        return draw(self.shape, self.generator, dtype=self.dtype, device=self.device)


def brownian_interval() -> Any:
    """torchsde's class. Raises `ArgumentError` where the package is not installed."""
    try:
        from torchsde import BrownianInterval
    except ImportError:
        raise ArgumentError(
            "scheduler: the DPM++ SDE samplers need torchsde: pip install torchsde; "
            "'dpmpp_2m_sde' is a stochastic sampler that needs nothing",
            field="scheduler",
        ) from None
    return BrownianInterval


class BrownianMotion:
    """The increments of a Brownian motion over sigma, the same for any choice of steps. Needs torchsde."""

    def __init__(
        self,
        plan: Brownian,
        shape: tuple[int, ...],
        generator: Generator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        BrownianInterval = brownian_interval()
        seeds = [plan.seed] if plan.seed is not None else [_seed(g) for g in _sources(generator, shape[0])]
        self.plan = plan
        self.batched = len(seeds) > 1
        size = shape[1:] if self.batched else shape
        low, high = torch.tensor(plan.low), torch.tensor(plan.high)
        common: dict[str, Any] = {"size": size, "dtype": dtype, "device": device}
        common |= {"tol": 1e-6, "pool_size": 24, "halfway_tree": True}
        self.trees = [BrownianInterval(t0=low, t1=high, entropy=seed, **common) for seed in seeds]

    def __call__(self, row: int) -> Tensor | None:
        if not self.plan.spans[row].any():
            return None
        # Float32 through the logarithm and back, as in k-diffusion: the motion is rough, so an ulp of time shows.
        now, then = torch.tensor(self.plan.spans[row], dtype=torch.float32)
        t, end = now.log().neg(), then.log().neg()
        end = t + (end - t) * 0.5 if self.plan.halfway[row] else end
        high, low = t.neg().exp(), end.neg().exp()
        parts = [tree(low, high) for tree in self.trees]
        moved = torch.stack(parts) if self.batched else parts[0]
        return -moved / (high - low).sqrt()


def _sources(generator: Generator, batch: int) -> list[torch.Generator]:
    sources = check_generators(generator)
    if len(sources) not in (1, batch):
        raise ArgumentError(
            f"generator: a list of {len(sources)} for a batch of {batch}; give one, or one for each sample",
            field="generator",
        )
    return sources


def _seed(g: torch.Generator) -> int:
    return int(torch.randint(0, 2**63 - 1, (), generator=g, device=g.device).item())
