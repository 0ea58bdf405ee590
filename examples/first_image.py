"""Paints one image with the tiny random model of `tiny_model.py`, which it makes first where it is not there yet.

python examples/first_image.py [--prompt TEXT] [--seed N] [--steps N] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tiny_model import write_tiny_model

import fastldm

OUT = Path(__file__).resolve().parent.parent / "out"


def main() -> None:
    parser = argparse.ArgumentParser(description="Paint one image with a tiny model of random weights.")
    parser.add_argument("--prompt", default="the red cat")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that the image starts from")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=OUT / "first.png", help="the image's file")
    options = parser.parse_args()

    model = OUT / "tiny-model"
    if not model.exists():
        write_tiny_model(model)
    pipe = fastldm.Pipeline(model)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    try:
        image: Any = pipe(options.prompt, num_inference_steps=options.steps, generator=generator).images[0]
    except fastldm.Error as error:
        parser.error(str(error))
    seconds = time.perf_counter() - began

    options.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(options.out)
    print(f"{options.out}: {image.width}×{image.height}, {options.steps} steps in {seconds:.1f} s.")
    print("The model's weights are random, so the image is coloured noise and not what the prompt says.")


if __name__ == "__main__":
    main()
