"""Stable Diffusion 1.5 at full size with random weights, on a CPU: load, paint, and compare with diffusers.

    python benchmarks/full_size.py --folder out/sd15-random --json row.json

Makes the folder with diffusers where it is absent (4 GB, float32). Each part runs in a process of its own, so that its
memory is its own:
    load     seconds, and the growth of the resident set against the weights' size in the target dtype
    image    a 512×512 image in bfloat16: 20 steps, guidance 7.5; seconds of all and of a step, peak memory
    latents  the float32 latents after 2 steps, of fastldm and of diffusers, and their relative difference
    decode   a 2048×2048 image from latents, tiled: seconds and peak memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import ROOT, machine, peak_memory, save

PROMPT = "a red cat on the table"
PARTS = ("load", "image", "latents", "decode")


def make(folder: Path) -> None:
    """Full-size SD 1.5 in diffusers' layout, with diffusers' initial weights and the tests' tokenizer."""
    import diffusers
    import transformers

    from tests.model import full_size
    from tests.oracle import tokenizer

    words = tokenizer()
    torch.manual_seed(0)
    text = {**full_size.CLIP_L, "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**full_size.SD15_VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=words,
        unet=diffusers.UNet2DConditionModel(**full_size.SD15_UNET),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def resident() -> int:
    """The resident set of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def load(folder: Path) -> dict[str, Any]:
    import fastldm

    warm = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.nn.functional.linear(warm, warm)
    import transformers  # noqa: F401  the tokenizer's library is no weight

    before, start = resident(), time.perf_counter()
    pipe = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    engine = pipe._engine
    weights = sum(
        p.numel() * p.element_size() for m in (engine.unet, engine.vae, engine.text_encoder) for p in m.parameters()
    )
    peak = peak_memory() * 1e9
    return {
        "seconds": seconds,
        "weights_gb": weights / 1e9,
        "resident_growth": (resident() - before) / weights,
        "peak_growth": (peak - before) / weights,
    }


def image(folder: Path) -> dict[str, Any]:
    import fastldm

    pipe = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)
    start = time.perf_counter()
    options: Any = {"num_inference_steps": 20, "output_type": "latent"}
    latents = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
    assert isinstance(latents, torch.Tensor)
    denoised = time.perf_counter()
    pixels = pipe._engine.decode(latents)
    done = time.perf_counter()
    return {
        "steps": 20,
        "size": list(pixels.shape),
        "seconds": done - start,
        "seconds_a_step": (denoised - start) / 20,
        "decode_seconds": done - denoised,
        "peak_memory_gb": peak_memory(),
    }


def latents(folder: Path) -> dict[str, Any]:
    import diffusers

    import fastldm

    options: Any = {"num_inference_steps": 2, "output_type": "latent"}

    def timed(paint: Callable[..., Any]) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        result = paint(PROMPT, generator=torch.Generator().manual_seed(0), **options).images
        return result, time.perf_counter() - start

    ours, our_seconds = timed(fastldm.Pipeline(folder))
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs, their_seconds = timed(peer)
    return {
        "steps": 2,
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
        "seconds": our_seconds,
        "diffusers_seconds": their_seconds,
    }


def decode(folder: Path) -> dict[str, Any]:
    import fastldm

    engine = fastldm.Pipeline(folder, torch_dtype=torch.bfloat16)._engine
    z = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0))
    start, before = time.perf_counter(), resident()
    with torch.no_grad():
        pixels = engine.decode(z, tiling=True)
    return {
        "size": list(pixels.shape),
        "seconds": time.perf_counter() - start,
        "peak_growth_gb": peak_memory() - before / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Full-size SD 1.5 with random weights on a CPU.")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "sd15-random")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(globals()[args.part](args.folder)))
        return
    if not (args.folder / "model_index.json").exists():
        make(args.folder)
    result: dict[str, Any] = {"machine": machine()}
    for part in args.parts:
        command = [sys.executable, __file__, "--folder", str(args.folder), "--part", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, json.dumps(result[part]))
    if args.json:
        save(result, args.json)


if __name__ == "__main__":
    main()
