"""The kernels of a model compiled before its first call, side by side; Triton keeps them for every process to come.

No GPU is needed: what a call launches is found out on tensors without memory, for a chip that is named.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch

from fastldm import ops
from fastldm.errors import ArgumentError, brief
from fastldm.ops.auto import rehearsal
from fastldm.runtime.plan import Shape
from fastldm.runtime.rehearse import Networks, parts

LEAST = 80  # compute capability
MOST_JOBS = 16  # where nobody says: each finds out all launches first
Call = tuple[Shape, int]  # the latents, and how many guidance branches


@dataclass(frozen=True)
class Warmed:
    """kernels: variants that the calls need. compiled: those that were not there yet. seconds: for all."""

    kernels: int
    compiled: int
    seconds: float


@dataclass(frozen=True)
class _Share:
    """Of the variants, in their order, every `of`-th from the `first` on."""

    networks: Networks
    calls: Sequence[Call]
    capability: int
    first: int
    of: int


def warm_up(networks: Networks, calls: Sequence[Call], *, capability: int, jobs: int | None = None) -> Warmed:
    """Compiles what `ops.using("auto")` launches in these calls. jobs: processes, as many as processors where None."""
    began, jobs = time.perf_counter(), jobs or min(len(os.sched_getaffinity(0)), MOST_JOBS)
    shares = [_Share(networks, tuple(calls), capability, first, jobs) for first in range(jobs)]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_compiling) as pool:
        done = list(pool.map(_compiled, shares))
    return Warmed(sum(n for n, _ in done), sum(n for _, n in done), time.perf_counter() - began)


def _compiling() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it once, when it is imported
    torch.set_num_threads(1)


def _compiled(share: _Share) -> tuple[int, int]:
    """How many variants there were, and how many of them Triton had not kept."""
    import triton

    triton.runtime.driver.set_active(named_chip(share.capability))
    fresh: list[str] = []
    triton.knobs.compilation.listener = _listener(fresh)
    mine = variants(share.networks, share.calls)[share.first :: share.of]
    for one in mine:
        one.kernel.warmup(**one.arguments, grid=one.grid, num_warps=one.warps, num_stages=one.stages)
    return len(mine), len(fresh)


def _listener(fresh: list[str]) -> Any:
    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            fresh.append(src.name)

    return listen


@torch.no_grad()
def variants(networks: Networks, calls: Sequence[Call]) -> list[Any]:
    """A launch of each variant, in an order that is the same in every process."""
    from fastldm.kernels.launch import recording

    found: dict[str, Any] = {}
    for shape, branches in calls:
        for run in parts(networks, shape, branches).values():
            with ops.using("auto"), rehearsal("cuda"), recording() as launches:
                run()
            found |= {variant(one): one for one in launches}
    return [found[name] for name in sorted(found)]


def variant(one: Any) -> str:
    """What Triton compiles once: the kernel, its arguments' types and specialisations, the tiles, the options."""
    import triton

    kernel = one.kernel
    _, _, _, _, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
    _, specialisation, options = binder(**one.arguments, num_warps=one.warps, num_stages=one.stages, debug=False)
    return f"{kernel.fn.__module__}.{kernel.fn.__name__} {specialisation} {options}"


def named_chip(capability: int) -> Any:
    """As much of a driver as compiling asks for. Each target is a device, by which Triton keeps what it compiled."""
    from triton.backends.compiler import GPUTarget

    class Chip:
        target = GPUTarget("cuda", capability, 32)

        def get_current_target(self) -> GPUTarget:
            return self.target

        def get_current_device(self) -> int:
            return capability

        def get_current_stream(self, device: int) -> int:
            return 0

    return Chip()


def asked_chip(target: object) -> int:
    """The compute capability of a chip's name, such as "sm_90"; of the GPU that is here where None.

    Raises `ArgumentError` for another name, for a chip before sm_80, for None without a GPU, and without Triton.
    """
    if find_spec("triton") is None:
        raise ArgumentError("target: triton is not installed, which compiles the kernels", field="target")
    if target is None and torch.cuda.is_available() and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    found = re.fullmatch(r"sm_(\d{2,3})", target, re.ASCII) if isinstance(target, str) else None
    if found is None or int(found[1]) < LEAST:
        missing = "there is no NVIDIA GPU here; " if target is None else ""
        raise ArgumentError(
            f"target = {brief(target)}: {missing}must be a chip such as sm_90, from sm_80 on", field="target"
        )
    return int(found[1])
