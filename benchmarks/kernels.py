"""Every kernel at the shapes of real models on a GPU, beside the best that PyTorch has for them.

    python benchmarks/kernels.py [--op NAME ...] [--seconds 480] [--dtype float16] [--out rows.jsonl]
    python benchmarks/kernels.py --check                               # no GPU: the work of each shape
    python benchmarks/kernels.py --page docs/performance.md --rows rows.jsonl      # no GPU: the page from the rows

Arms: `kernel`, in the form that is its default at that shape; `kernel by TMA` or `kernel by pointers`, the other form
where both are possible; `reference`, the op in plain PyTorch (cuBLAS, cuDNN, channels_last); `compiled`, torch.compile
of that, at the first shapes of each op; for attention PyTorch's backends by name. Each is captured in a CUDA graph that
cycles through input sets larger than the L2 cache, so every call reads from memory. A row has the median microseconds
of a call and its 20th and 80th percentile, TFLOP/s of useful work, GB/s of the inputs and outputs once each, the share
that is of the best that this chip was seen to do in the same process (a large product, a large copy), and the root mean
square error against the op in float32. Rows are written as they come: a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import machine
from benchmarks.real_shapes import REAL, Arguments, Shape
from fastldm.kernels import tuning
from fastldm.kernels.launch import Unsupported, recording
from fastldm.ops import reference

DEVICE = "cuda"
ROTATED = 160e6  # bytes of input sets; the L2 cache of an H200 holds 60 MB
MOST_SETS = 400  # what is so small that these do not fill the cache, is read from it in the models, too
CALLS = 40  # in a graph, at least one for each set
REPLAYS = 21
PRODUCT, COPIED = 8192, 1 << 30  # rows and columns of the large product, bytes of the large copy
COMPILED = 3  # shapes of each op that torch.compile is timed at: compiling one takes it seconds
MARKS = ("<!-- kernels: written by benchmarks/kernels.py -->\n", "<!-- end of kernels -->")
IN_PLACE = ("begin_row", "end_row")  # what they write is among their arguments
BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FORMS = {"kernel by TMA": True, "kernel by pointers": False}
Arm = Callable[..., Any]


def arms(op: str, *, compiled: bool) -> dict[str, Arm]:
    kernel = launcher(op)
    plain = getattr(reference, op)
    found: dict[str, Arm] = {"kernel": kernel, "reference": plain}
    found |= {name: functools.partial(_in_form, kernel, tma) for name, tma in FORMS.items()}
    if op == "conv2d":  # no arm but the last is asked for statistics, which would be passes of their own
        found = {name: functools.partial(_without_statistics, arm) for name, arm in found.items()}
        plain = found["reference"]
        found["kernel with statistics"] = kernel
    if compiled:
        found["compiled"] = torch.compile(plain, dynamic=False)
    if op == "attention":
        found |= {name: functools.partial(_with_backend, backend) for name, backend in BACKENDS.items()}
    return found


def launcher(op: str) -> Arm:
    return getattr(importlib.import_module(f"fastldm.kernels.{op}"), op)


def _in_form(arm: Arm, tma: bool, *arguments: Any, **options: Any) -> Any:
    with tuning.tma(tma):
        return arm(*arguments, **options)


def other_form(op: str, shape: Shape, dtype: torch.dtype) -> str | None:
    """The arm of the form that is not the default at that shape; None where there is one form."""
    arguments, options = shape.make("meta", dtype)

    def by_tma(form: AbstractContextManager[None]) -> bool:
        with form, recording() as launches:
            launcher(op)(*arguments, **options)
        return any(isinstance(a, TensorDescriptor) for one in launches for a in one.arguments.values())

    try:
        default = by_tma(nullcontext())
        other = by_tma(tuning.tma(not default))
    except Unsupported:
        return None
    return None if other == default else next(name for name, tma in FORMS.items() if tma == other)


def _without_statistics(arm: Arm, *arguments: Any, **options: Any) -> Any:
    return arm(*arguments, **{**options, "want_stats": False})


def _with_backend(backend: SDPBackend, *arguments: Any, **options: Any) -> Tensor:
    with sdpa_kernel(backend):
        return reference.attention(*arguments, **options)


# --------------------------------------------------------------------------------------------------------- what is done


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


def moved(arguments: Arguments, out: Any) -> int:
    """Bytes of the inputs and outputs, once each."""
    return sum(t.numel() * t.itemsize for t in tensors((arguments, out)))


def flops(op: str, shape: Shape) -> int:
    arguments, options = shape.make("meta", torch.float32)
    with FlopCounterMode(display=False) as counter:
        getattr(reference, op)(*arguments, **options)
    return int(counter.get_total_flops())


def error(out: Any, truth: Any) -> float:
    """|out − truth| / |truth| over all outputs."""
    pairs = list(zip(tensors(out), tensors(truth), strict=False))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(off / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300))


# --------------------------------------------------------------------------------------------------------------- timing


def timed(arm: Arm, sets: list[Arguments]) -> list[float]:
    """Microseconds of a call, of each replay of a graph of many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    rounds = math.ceil(CALLS / len(sets))
    with torch.cuda.stream(stream):
        for arguments, options in sets:
            arm(*arguments, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for arguments, options in sets * rounds:
                arm(*arguments, **options)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / (rounds * len(sets)))
    return times[2:]


def ceilings(dtype: torch.dtype) -> dict[str, Any]:
    """TFLOP/s of a product and GB/s of a copy (read and written bytes), as large as these need to be."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=dtype) for _ in "ab")
    product = statistics.median(timed(torch.mm, [((a, b), {})]))
    x = torch.empty(COPIED, device=DEVICE, dtype=torch.uint8)
    copy = statistics.median(timed(torch.Tensor.copy_, [((torch.empty_like(x), x), {})]))
    return {"tflops": 2 * PRODUCT**3 / product / 1e6, "gbps": 2 * COPIED / copy / 1e3}


def measured(op: str, name: str, arm: Arm, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    first = shape.make(DEVICE, dtype)
    size = moved(first, None)
    sets = [first, *(shape.make(DEVICE, dtype) for _ in range(min(MOST_SETS, math.ceil(ROTATED / size)) - 1))]
    row: dict[str, Any] = {}
    out = None
    if op not in IN_PLACE:
        out = arm(*first[0], **first[1])
        row["error"] = error(out, getattr(reference, op)(*widened(first[0]), **widened(first[1])))
    times = timed(arm, sets)
    (low, *_, high), middle = statistics.quantiles(times, n=5), statistics.median(times)
    return row | {
        "us": middle,
        "us_20": low,
        "us_80": high,
        "tflops": flops(op, shape) / middle / 1e6,
        "gbps": moved(first, out) / middle / 1e3,
    }


def widened(value: Any) -> Any:
    """In float32: tensors in tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if isinstance(value, dict):
        return {key: widened(each) for key, each in value.items()}
    return value


def rows(ops: list[str], dtype: torch.dtype, until: float) -> Iterator[dict[str, Any]]:
    """The first shape of every op, then the second, ...: what time is left out, is so from the end of each list."""
    peak = ceilings(dtype)
    yield {"peak": peak, "dtype": str(dtype)[6:]}
    for index in range(max(len(REAL[op]) for op in ops)):
        for op in ops:
            for shape in REAL[op][index : index + 1]:
                other = other_form(op, shape, dtype)
                for name, arm in arms(op, compiled=index < COMPILED).items():
                    if name in FORMS and name != other:
                        continue
                    if time.monotonic() > until:
                        return
                    row = {"op": op, "model": shape.model, "shape": shape.what, "arm": name, "dtype": str(dtype)[6:]}
                    row |= tried(op, name, arm, shape, dtype)
                    if "us" in row:
                        row["of_peak"] = max(row["tflops"] / peak["tflops"], row["gbps"] / peak["gbps"])
                    yield row
                    if "CUDA error" in row.get("failed", ""):
                        return  # nothing that follows in this process would be true


def tried(op: str, name: str, arm: Arm, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    try:
        return measured(op, name, arm, shape, dtype)
    except Exception as problem:  # a backend that does not take a shape is a row, too
        return {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"}


def shown(row: Mapping[str, Any]) -> str:
    if "peak" in row:
        return f"peak: {row['peak']['tflops']:.0f} TFLOP/s, {row['peak']['gbps']:.0f} GB/s"
    what = f"{row['op']:18} {row['model']:12} {row['shape']:34} {row['arm']:18}"
    if "failed" in row:
        return f"{what} {row['failed'][:60]}"
    return f"{what} {row['us']:9.1f} us {row['tflops']:7.1f} TFLOP/s {row['gbps']:7.0f} GB/s {row['of_peak']:5.0%}"


# --------------------------------------------------------------------------------------------------------------- tables


def paired(found: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    """The kernel's row of each shape, and the fastest of the others."""
    shapes: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in found:
        if "us" in row:
            shapes.setdefault((row["op"], row["model"], row["shape"]), {})[row["arm"]] = row
    for by in shapes.values():
        kernel = by.pop("kernel", None)
        if kernel is not None:
            others = [row for name, row in by.items() if not name.startswith("kernel")]
            yield kernel, min(others, key=lambda row: row["us"], default=None)


def summary(found: list[Mapping[str, Any]]) -> str:
    """Of each op: shapes, how many of them the kernel wins, and the geometric mean of how many times faster it is."""
    lines = [
        "| op | shapes | kernel ahead | times faster, geometric mean | least | most |",
        "|---|---|---|---|---|---|",
    ]
    gains: dict[str, list[float]] = {}
    for kernel, best in paired(found):
        if best is not None:
            gains.setdefault(kernel["op"], []).append(best["us"] / kernel["us"])
    for op, each in gains.items():
        won, mean = sum(gain > 1 for gain in each), statistics.geometric_mean(each)
        lines.append(f"| {op} | {len(each)} | {won} | {mean:.2f} | {min(each):.2f} | {max(each):.2f} |")
    return "\n".join(lines)


def table(found: list[Mapping[str, Any]]) -> str:
    lines = [
        "| op | model | shape | kernel | of peak | best of PyTorch | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel, best in paired(found):
        other = f"{best['us']:.1f} µs, {best['arm']} | {best['us'] / kernel['us']:.2f}" if best else "| "
        lines.append(
            f"| {kernel['op']} | {kernel['model']} | {kernel['shape']} | {kernel['us']:.1f} µs | "
            f"{kernel['of_peak']:.0%} | {other} |"
        )
    return "\n".join(lines)


def page(text: str, found: list[Mapping[str, Any]]) -> str:
    """The page with what the rows say between the marks."""
    (begin, end), here = MARKS, found[0]
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"there is no {begin.strip()!r} with {end!r} behind it")
    peak = next((shown(row) for row in found if "peak" in row), "peak: not measured")
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    parts = (f"{here['device']}; {versions}; commit {here['commit']}. {peak}.", summary(found), table(found))
    return f"{before}{begin}\n" + "\n\n".join(parts) + f"\n\n{end}{after}"


# ----------------------------------------------------------------------------------------------------------------- main


def checked(ops: list[str]) -> None:
    """The parts that need no GPU: the counts of every shape."""
    for op in ops:
        for shape in REAL[op]:
            arguments = shape.make("meta", torch.float16)
            work = 0 if op in IN_PLACE else flops(op, shape)
            size = f"{moved(arguments, None) / 1e6:9.2f} MB {work / 1e9:9.2f} GFLOP"
            print(f"{op:18} {shape.model:12} {shape.what:34} {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels on a GPU beside PyTorch.")
    parser.add_argument("--op", action="append", choices=list(REAL), help="this one alone")
    parser.add_argument("--seconds", type=float, default=480, help="stop after as many")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument("--check", action="store_true", help="no GPU: print the work of each shape")
    parser.add_argument("--page", type=Path, help="no GPU: write --rows into this page")
    parser.add_argument("--rows", type=Path, help="what --out has written")
    options = parser.parse_args()
    ops = options.op or list(REAL)
    if options.check:
        checked(ops)
    elif options.page:
        found = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
        options.page.write_text(page(options.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --check shows what would be measured")
    else:
        dtype = getattr(torch, options.dtype)
        print(summary(list(saved(rows(ops, dtype, time.monotonic() + options.seconds), options.out))))


def saved(found: Iterable[dict[str, Any]], out: Path | None) -> Iterator[dict[str, Any]]:
    """Writes and prints each row as it comes."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out or os.devnull, "w", encoding="utf-8") as file:
        file.write(json.dumps(machine()) + "\n")
        for row in found:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(shown(row), flush=True)
            yield row


if __name__ == "__main__":
    main()
