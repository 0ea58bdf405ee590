"""A model's kernels compiled ahead of its calls, from its configurations alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastldm.asked import Asked
from fastldm.assemble import assemble
from fastldm.errors import ArgumentError
from fastldm.runtime.build import RUN, planned, vae_dtype
from fastldm.runtime.plan import Shape
from fastldm.runtime.rehearse import Networks
from fastldm.runtime.warmup import Warmed, asked_chip, warm_up

INSTRUCT = 2  # times the latents' channels, that such a U-Net reads


def warmup(
    asked: Asked,
    sizes: Sequence[tuple[int, int]] = (),
    *,
    images: int = 1,
    dtype: torch.dtype = torch.float16,
    target: str | None = None,
    jobs: int | None = None,
) -> Warmed:
    """Compiles what calls of these sizes, (height, width) in pixels, launch, with guidance and without.

    sizes: the model's own where there are none. images: at once. target: a chip such as "sm_90"; None is the GPU that
    is here. No weight is read. Raises as `Pipeline` does for the model, and `ArgumentError` for the rest.
    """
    chip = asked_chip(target)
    with assemble(asked) as made:
        unet, vae, text = (planned(name, made.parts[name]).config for name in RUN)
    factor, own = vae.factor, unet.sample_size * vae.factor
    for height, width in sizes:
        if width % factor or height % factor or not (width and height):
            raise ArgumentError(f"size = {width}x{height}: must be multiples of {factor}", field="size")
    guided = 3 if unet.in_channels == INSTRUCT * unet.out_channels else 2
    calls = [
        (Shape(images, height // factor, width // factor, text.positions), branches)
        for height, width in sizes or [(own, own)]
        for branches in (guided, 1)
    ]
    return warm_up(Networks(unet, vae, text, dtype, vae_dtype(vae, dtype)), calls, capability=chip, jobs=jobs)
