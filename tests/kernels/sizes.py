"""Which variants of the kernels the models ask for at many sizes, by Triton's own keys; nothing is compiled.

    python -m tests.kernels.sizes

Stable Diffusion 1.5's U-Net and decoder in float16, on tensors without memory, with every op by its kernel: the
launches are recorded and their arguments bound as in a launch, to the chip sm_90. Prints a line of JSON for each size:
how many launches it makes, and the variants that no earlier size had. With --tma every op is read by TMA that can be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from triton.runtime.jit import JITFunction

from fastldm import ops
from fastldm.config import unet_config, vae_config
from fastldm.kernels import tuning
from fastldm.kernels.launch import Launch, recording
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from tests.kernels.offline import Driver
from tests.model import full_size

FIRST = ((64, 64), (96, 96), (128, 128), (32, 32), (40, 37), (37, 32))  # of the latents, (height, width)
SIDES = (32, 40, 48, 56, 72, 80, 88, 104, 128, 37, 53, 75, 99)
SIZES = tuple(dict.fromkeys((*FIRST, *((SIDES[k], SIDES[(k * n + 4) % 13]) for n in (1, 2, 3) for k in range(13)))))


def variant(one: Launch) -> str:
    """What Triton compiles once: the kernel, its arguments' types and specialisations, the tiles, the options."""
    kernel: JITFunction = one.kernel
    _, _, _, _, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
    _, specialisation, options = binder(**one.arguments, num_warps=one.warps, num_stages=one.stages, debug=False)
    return f"{kernel.fn.__name__} {specialisation} {options}"


def launched(unet: UNet, vae: AutoencoderKL, height: int, width: int) -> Iterator[Launch]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.float16)

    x = empty(2, 4, height, width).to(memory_format=torch.channels_last)
    with ops.using("fused"), recording() as recorded:
        mods = unet.modulation(torch.empty(20, device="meta"))
        unet(x, mods[0], unet.context(empty(2, 77, 768)))
        vae.decode(x[:1])
    yield from recorded


def main() -> None:
    parser = argparse.ArgumentParser(description="List the variants of the kernels at many sizes.")
    parser.add_argument("--tma", action="store_true", help="by TMA wherever it can address the tensors")
    form: AbstractContextManager[None] = tuning.tma(True) if parser.parse_args().tma else nullcontext()
    triton.runtime.driver.set_active(Driver(90))
    with torch.device("meta"):
        unet = UNet(unet_config(full_size.SD15_UNET)).half().to(memory_format=torch.channels_last)
        vae = AutoencoderKL(vae_config(full_size.SD15_VAE)).half().to(memory_format=torch.channels_last)
    seen: set[str] = set()
    with form:
        for height, width in SIZES:
            found = [variant(one) for one in launched(unet, vae, height, width)]
            new = sorted(set(found) - seen)
            seen |= set(found)
            row = {"size": [height, width], "launches": len(found), "variants": len(seen), "new": new}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
