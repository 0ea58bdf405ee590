"""How long a denoising step takes: fastldm beside diffusers, on the shapes of Stable Diffusion 1.5.

    python benchmarks/latency.py                      # float32 and bfloat16, 512×512, guidance on
    python benchmarks/latency.py --dtype bfloat16 --runs 7 --json row.json

Both run the same random weights in one process, in turn (A B A B ...), so that what a busy machine does to one it does
to the other: quote the ratio of a run, never the seconds of two runs. A step is the guided U-Net and the sampler.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from fastldm import config, ops
    from fastldm.model.unet import UNet
    from fastldm.runtime.plan import Guidance, Plan, Shape
    from fastldm.sampling import sampler_table, scheduler_config
    from fastldm.weights.load import load
except ImportError as error:
    sys.exit(f"{error}: install the checkout first, with: pip install -c constraints.txt -e .[test]")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import interleaved, machine, peak_memory, ratios, save

SCALE = 7.5
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class InMemory:
    """A state dict, as `load` reads tensors."""

    where = "memory"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.infos: Any = {k: SimpleNamespace(shape=tuple(v.shape), dtype=v.dtype) for k, v in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def diffusers_unet(dtype: torch.dtype) -> Any:
    """diffusers' U-Net of SD 1.5 with random weights of a plausible size."""
    from diffusers import UNet2DConditionModel

    levels = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=levels,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in unet.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        if p.ndim > 1:
            p.normal_(0, fan_in**-0.5, generator=generator)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    return unet


def diffusers_step(unet: Any, x: Tensor, states: Tensor, steps: int) -> Callable[[], Tensor]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[0]

    @torch.no_grad()
    def step() -> Tensor:
        e = unet(torch.cat([x, x]), t, encoder_hidden_states=states).sample
        uncond, cond = e.chunk(2)
        return scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample

    return step


def fastldm_step(unet: UNet, x: Tensor, states: Tensor, steps: int) -> Callable[[], Tensor]:
    table = sampler_table(scheduler_config(SCHEDULER), steps)
    guidance = Guidance(np.tile([1 - SCALE, SCALE], (table.rows, 1)), np.zeros(table.rows))
    plan = Plan(unet, Shape(batch=1, height=x.shape[2], width=x.shape[3], length=states.shape[1]))
    modulation = unet.modulation(torch.from_numpy(table.timesteps).float())

    @torch.no_grad()
    def step() -> Tensor:
        plan.start(x.float(), states=states)
        plan.fill(slice(0, 1), table, guidance, modulation)
        plan.replay(2)
        return plan.state[0]

    return step


@torch.no_grad()
def step_row(dtype: torch.dtype, size: int, runs: int, steps: int) -> dict[str, Any]:
    """One line of the table: seconds a step of each, the ratio, and how far apart their results are."""
    peer = diffusers_unet(dtype)
    unet = load(lambda: UNet(config.SD15_UNET), InMemory(peer.state_dict()), dtype=dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, size // 8, size // 8, generator=generator).to(dtype)
    states = torch.randn(2, 77, 768, generator=generator).to(dtype)
    arms = {
        "fastldm": fastldm_step(unet, x, states, steps),
        "diffusers": diffusers_step(peer, x, states, steps),
    }
    ours, theirs = (arm().float() for arm in arms.values())
    times = interleaved(arms, runs, warm_ups=0)
    return {
        "model": "sd15",
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "runs": runs,
        "seconds": times,
        "median_seconds": {name: statistics.median(t) for name, t in times.items()},
        "times_faster_than_diffusers": ratios(times, "fastldm", "diffusers"),
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A denoising step of SD 1.5's shape: fastldm beside diffusers.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the row to this file")
    args = parser.parse_args()
    if args.size < 64 or args.size % 8:
        parser.error(f"--size {args.size}: must be a multiple of 8, at least 64")
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: must be at least 1")
    with ops.using("reference"):
        rows = []
        for dtype in args.dtype or ["float32", "bfloat16"]:
            rows.append(step_row(getattr(torch, dtype), args.size, args.runs, steps=20))
            gc.collect()
            print_row(rows[-1])
    result: dict[str, Any] = {"machine": machine(), "rows": rows, "peak_memory_gb": peak_memory()}
    print(f"on {result['machine']['device']}, {', '.join(result['machine']['features'])}, 2 models in memory")
    if args.json:
        save(result, args.json)


def print_row(row: Mapping[str, Any]) -> None:
    seconds, ratio = row["median_seconds"], row["times_faster_than_diffusers"]
    print(
        f"SD 1.5 {row['size']}×{row['size']} {row['dtype']:9} step: fastldm {seconds['fastldm']:6.2f} s, "
        f"diffusers {seconds['diffusers']:6.2f} s, ratio {ratio['median']:.2f} "
        f"({ratio['low']:.2f} to {ratio['high']:.2f} over {row['runs']} pairs), "
        f"difference {row['relative_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
