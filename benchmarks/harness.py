"""What every benchmark shares: the machine, interleaved timing, rows of results."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy")
GPU_FIXED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
GPU_NOW = ("clocks.sm", "temperature.gpu", "power.draw")
CPU_FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def machine(device: str | None = None) -> dict[str, Any]:
    """Everything that a time depends on. device: "cpu" or "cuda"; what there is where None."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "features": [] if on_gpu else [f for f in CPU_FEATURES if found.get(f)],
        "threads": torch.get_num_threads(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        "commit": _commit(),
    } | (gpu(*GPU_FIXED) | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if on_gpu else {})


def gpu(*asked: str) -> dict[str, str]:
    """What nvidia-smi says of the first one; nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(asked, answer.split(", "), strict=False))


# ------------------------------------------------------------------------------------------------------ a device's time


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    synchronize(device)
    return time.perf_counter()


def mark(device: str) -> Any:
    """A moment: on a GPU an event among its work, which nobody waits for."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: Any, b: Any) -> float:
    """Seconds between two marks that have passed."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def interleaved(arms: Mapping[str, Callable[[], object]], runs: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of each arm, A B A B ..., after `warm_ups` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(warm_ups + runs):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if i >= warm_ups:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], of: str, to: str) -> dict[str, float]:
    """How many times faster `of` is than `to`: the median of the ratios of neighbouring runs, and their range."""
    each = [b / a for a, b in zip(times[of], times[to], strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def peak_memory() -> float:
    """The largest resident set of this process so far, in GB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def save(row: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
