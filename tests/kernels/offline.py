"""Kernels compiled without a GPU, and what the compiler made of them, a line of JSON each.

    python -m tests.kernels.offline 90 [80 89 100 ...] [--first] [--tma] [--op NAME] [--dtype NAME] [--jobs N]

With --first few shapes of each op, which take every kernel of it, on sm_90 in every form; with --tma those that read
by TMA where the arguments allow it, also where pointers are the choice of `tuning.py`. The arguments are tensors
without memory, of the real shapes; Triton derives its specialisation keys from them as in a launch. A process of its
own, as Triton decides between interpreter and compiler once for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.real_shapes import REAL, Shape
from fastldm.kernels import tuning
from fastldm.kernels.launch import Launch, Unsupported, recording
from fastldm.kernels.tuning import SHARED_LIMIT

DTYPES = ("float16", "bfloat16", "float32")
# Arguments that make another program of a kernel, beyond what stands before and behind its products.
SWITCHES = ("PARTS", "D2", "TWO", "PHASES", "SIDE", "FLAT", "TMA", "HAS_RESIDUAL", "K", "mask", "sums")
WGMMA = {"_attention", "_short", "_linear", "_geglu", "_conv2d"}  # kernels that multiply large matrices


@dataclass(frozen=True)
class Compiled:
    """What became of one launch. serialised: wgmma instructions wait for each other (C7510 of ptxas)."""

    op: str
    shape: str
    kernel: str
    target: int
    dtype: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    wgmma: int
    serialised: bool
    programs: int


class Driver:
    """As much of a GPU as compiling asks for. To Triton each target is a device, by which it keeps what it compiled."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(op: str, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """None where the op refuses the shape in that dtype."""
    arguments, options = shape.make("meta", dtype)
    launcher = getattr(importlib.import_module(f"fastldm.kernels.{op}"), op)
    with recording() as recorded, suppress(Unsupported):
        launcher(*arguments, **options)
    return recorded


def compiled(one: Launch) -> tuple[Any, str]:
    """-> what Triton made of it, and what ptxas said, which is nothing where it lay in Triton's cache"""
    triton.knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(StringIO()) as said:
        made = one.kernel.warmup(**one.arguments, grid=one.grid, num_warps=one.warps, num_stages=one.stages)
    return made, said.getvalue()


def looked_at(op: str, shape: Shape, dtype: torch.dtype, capability: int) -> Iterator[Compiled]:
    for one in launches(op, shape, dtype):
        made, fresh = compiled(one)
        assert made.metadata.target.arch == capability
        ptx = made.asm["ptx"]
        if (capability, ptx) not in _said:
            _said[capability, ptx] = fresh or _assembled(ptx, capability)
        said = _said[capability, ptx]
        used, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
        assert used is not None, said
        programs = 1
        for size in one.grid:
            programs *= size
        yield Compiled(
            op=op,
            shape=f"{shape.model}: {shape.what}",
            kernel=made.metadata.name,
            target=capability,
            dtype=str(dtype).removeprefix("torch."),
            registers=int(used[1]),
            spilled=sum(map(int, spills)),
            shared=made.metadata.shared,
            wgmma=made.asm["ptx"].count("wgmma.mma_async"),
            serialised="serializ" in said,
            programs=programs,
        )


_said: dict[tuple[int, str], str] = {}  # by ptxas, of a chip and a program


def _assembled(ptx: str, capability: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        command = [get_ptxas(capability).path, "-v", f"-arch=sm_{capability}{suffix}", str(source), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def faults(one: Compiled) -> list[str]:
    """What is wrong with it."""
    found = [f"{one.spilled} bytes are spilled"] if one.spilled else []
    if one.shared > SHARED_LIMIT[one.target]:
        found.append(f"{one.shared} bytes of shared memory, of {SHARED_LIMIT[one.target]}")
    if one.serialised:
        found.append("its products wait for each other")
    if one.target == 90 and one.dtype != "float32" and one.kernel in WGMMA and not one.wgmma:
        found.append("there is no wgmma")
    return found


def forms(op: str, shape: Shape, dtype: torch.dtype) -> set[tuple[object, ...]]:
    """What a shape takes: (kernel,), (kernel, switch, its value), and of products (kernel, tile)."""
    found: set[tuple[object, ...]] = set()
    for one in launches(op, shape, dtype):
        name = one.kernel.fn.__name__
        found |= {(name,), *((name, key, _value(one.arguments[key])) for key in SWITCHES if key in one.arguments)}
        if name in WGMMA:
            tile = (size for key, size in one.arguments.items() if key.startswith("BLOCK"))
            found.add((name, *tile, one.warps, one.stages))
    return found


def _value(switch: object) -> object:
    """Of a number whether it is 0, 1 or more, of a tensor whether it is there."""
    return min(switch, 2) if isinstance(switch, int) else switch is not None


def covering(shapes: Sequence[set[tuple[object, ...]]]) -> list[int]:
    """The indices of few shapes with all forms: in turn the one with the most that are left."""
    left, chosen = set[tuple[object, ...]]().union(*shapes), []
    while left:
        chosen.append(max(range(len(shapes)), key=lambda i: len(shapes[i] & left)))
        left -= shapes[chosen[-1]]
    return sorted(chosen)


Task = tuple[str, int, torch.dtype, int, bool]  # op, which of its shapes, dtype, compute capability, by TMA


def look(task: Task) -> list[Compiled]:
    op, index, dtype, capability, by_tma = task
    triton.runtime.driver.set_active(Driver(capability))
    with tuning.tma(True) if by_tma else nullcontext():
        return list(looked_at(op, REAL[op][index], dtype, capability))


def tasks(
    targets: Iterable[int], ops: Iterable[str], dtypes: Iterable[str], *, first: bool, by_tma: bool
) -> Iterator[Task]:
    """first: few shapes of each op, which take every kernel of it; on sm_90 in every form."""
    for target in targets:
        triton.runtime.driver.set_active(Driver(target))  # which tiles are taken depends on it
        for op, name in product(ops, dtypes):
            shapes, dtype = REAL[op], getattr(torch, name)
            with tuning.tma(True) if by_tma else nullcontext():
                found = [forms(op, shape, dtype) for shape in shapes] if first else []
            if target != 90:
                found = [{form for form in shape if len(form) == 1} for shape in found]
            chosen = covering(found) if first else range(len(shapes))
            yield from ((op, index, dtype, target, by_tma) for index in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for its real shapes.")
    parser.add_argument("targets", type=int, nargs="+", choices=SHARED_LIMIT, help="compute capabilities")
    parser.add_argument("--first", action="store_true", help="few shapes of each op")
    parser.add_argument("--tma", action="store_true", help="by TMA wherever it can address the tensors")
    parser.add_argument("--op", action="append", choices=list(REAL), help="this one alone")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this one alone")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    options = parser.parse_args()
    bad = 0
    ops, dtypes = options.op or REAL, options.dtype or DTYPES[:2]
    todo = list(tasks(options.targets, ops, dtypes, first=options.first, by_tma=options.tma))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) if options.jobs > 1 else nullcontext() as pool:
        for found in map(look, todo) if pool is None else pool.map(look, todo):
            for one in found:
                print(json.dumps({**asdict(one), "faults": faults(one)}), flush=True)
                bad += bool(faults(one))
    if bad:
        sys.exit(f"{bad} launches are not as they should be")


if __name__ == "__main__":
    main()
