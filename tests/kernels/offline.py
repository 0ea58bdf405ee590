"""Kernels compiled without a GPU, and what the compiler made of them, a line of JSON each.

    python -m tests.kernels.offline 90 [80 89 100 ...] [--first] [--op NAME] [--dtype NAME] [--jobs N]

The arguments are tensors without memory, of the real shapes; Triton derives its specialisation keys from them as in a
launch. A process of its own, as Triton decides between interpreter and compiler once for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from benchmarks.real_shapes import REAL, Shape
from fastldm.kernels.launch import Launch, recording

DTYPES = ("float16", "bfloat16")
WGMMA = {"_attention", "_short", "_linear", "_geglu", "_conv2d"}  # kernels that multiply large matrices
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of a block


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
    """As much of a GPU as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(op: str, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    arguments, options = shape.make("meta", dtype)
    launcher = getattr(importlib.import_module(f"fastldm.kernels.{op}"), op)
    with recording() as recorded:
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
    if one.target == 90 and one.kernel in WGMMA and not one.wgmma:
        found.append("there is no wgmma")
    return found


Task = tuple[str, int, torch.dtype, int]  # op, which of its shapes, dtype, compute capability


def look(task: Task) -> list[Compiled]:
    op, index, dtype, capability = task
    triton.runtime.driver.set_active(Driver(capability))
    return list(looked_at(op, REAL[op][index], dtype, capability))


def tasks(targets: Iterable[int], ops: Iterable[str], dtypes: Iterable[str], *, first: bool) -> Iterator[Task]:
    """first: one shape of each op."""
    for target in targets:
        for op in ops:
            for index in range(1 if first else len(REAL[op])):
                yield from ((op, index, getattr(torch, dtype), target) for dtype in dtypes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for its real shapes.")
    parser.add_argument("targets", type=int, nargs="+", choices=SHARED_LIMIT, help="compute capabilities")
    parser.add_argument("--first", action="store_true", help="one shape of each op")
    parser.add_argument("--op", action="append", choices=list(REAL), help="this one alone")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="this one alone")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    options = parser.parse_args()
    bad = 0
    todo = list(tasks(options.targets, options.op or REAL, options.dtype or DTYPES, first=options.first))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) if options.jobs > 1 else nullcontext() as pool:
        for found in map(look, todo) if pool is None else pool.map(look, todo):
            for one in found:
                print(json.dumps({**asdict(one), "faults": faults(one)}), flush=True)
                bad += bool(faults(one))
    if bad:
        sys.exit(f"{bad} launches are not as they should be")


if __name__ == "__main__":
    main()
