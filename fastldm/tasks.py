"""Tasks as jobs: what text to image, image to image, inpainting and instruct-pix2pix each put into the one loop.

Noise is drawn in the order in which diffusers draws it, so that a seed gives the same image there and here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastldm.errors import ArgumentError
from fastldm.model.vae import Posterior
from fastldm.request import Request, Scales
from fastldm.runtime.engine import Engine, Job
from fastldm.runtime.plan import Guidance, Inpainting
from fastldm.sampling import SamplerTable, noise
from fastldm.source import Source, repeated


@dataclass(frozen=True)
class Studio:
    """What the tasks share: the engine, the request and the sampler's table. slicing, tiling: of the encoder."""

    engine: Engine
    request: Request
    table: SamplerTable
    slicing: bool
    tiling: bool

    def draw(self) -> Tensor:
        """Unit noise of the latents' shape, (B, C, H, W)."""
        r, factor = self.request, self.engine.vae.config.factor
        shape = (r.batch, self.engine.unet.config.out_channels, r.height // factor, r.width // factor)
        return noise.draw(shape, r.generator, device=self.engine.device)

    def encoded(self, pixels: Tensor) -> Tensor:
        """A sample of the latents of pixels (n, 3, H, W) in −1..1, float32; generator k draws for image k."""
        posterior = self._posterior(pixels)
        epsilon = self._draw_for(posterior.mean.shape)
        mean, std = (repeated(t.float(), len(epsilon)) for t in (posterior.mean, posterior.std))
        return self.engine.vae.to_latents(mean + std * epsilon)

    def _draw_for(self, shape: torch.Size) -> Tensor:
        """Noise for n pictures; for a batch of them with seeds, and in image to image with a list of generators."""
        r, generator = self.request, self.request.generator
        if r.seeded or (r.task == "image_to_image" and isinstance(generator, list)):
            return noise.draw((r.batch, *shape[1:]), generator, device=self.engine.device)
        if isinstance(generator, list) and len(generator) > 1:
            generator = generator[: shape[0]]
        return noise.draw(shape, generator, device=self.engine.device)

    # ------------------------------------------------------------------------------------------------------ the tasks

    def text_to_image(self, states: Tensor) -> Job:
        first = self._first_noise()
        return self._job(states, self.table.start[1] * first)

    def image_to_image(self, states: Tensor, source: Source) -> Job:
        z0 = repeated(self.encoded(2 * source.pixels - 1), self.request.batch)
        return self._job(states, self._noised(z0, self.draw()))

    def inpaint(self, states: Tensor, source: Source) -> Job:
        """With 4 input channels the kept part is put back after every row; with 9 the network sees it."""
        r = self.request
        image = 2 * source.pixels - 1
        sees_mask = self.engine.unet.config.in_channels > self.engine.unet.config.out_channels
        z0 = None if sees_mask and source.strength == 1 else repeated(self.encoded(image), r.batch)
        first = self._first_noise()
        x = self.table.start[1] * first if z0 is None or source.strength == 1 else self._noised(z0, first)
        mask = repeated(F.interpolate(source.mask, first.shape[2:]), r.batch).to(first)
        if not sees_mask:
            assert z0 is not None
            self._draw_for(torch.Size((len(image), *first.shape[1:])))  # diffusers samples the masked image's latents
            return self._job(states, x, inpainting=Inpainting(mask, z0, first))
        masked = r.masked_image_latents
        if masked is None:
            masked = self.encoded(image * (1 - source.mask))
        extra = torch.cat((mask, repeated(masked, r.batch).to(mask)), dim=1)
        return self._job(states, x, extra_channels=extra.repeat(self._branches(states), 1, 1, 1))

    def instruct(self, states: Tensor, source: Source) -> Job:
        """Brooks et al., arXiv 2211.09800: branches without both conditions, with the image, with image and text."""
        mean = self._posterior(2 * source.pixels - 1).mean.float()  # not scaled, the model is trained so
        mean = repeated(mean, self.request.batch)
        seen = [torch.zeros_like(mean), mean, mean] if self.request.scales.branches > 1 else [mean]
        return self._job(states, self.table.start[1] * self._first_noise(), extra_channels=torch.cat(seen))

    # ----------------------------------------------------------------------------------------------------- their parts

    def _posterior(self, pixels: Tensor) -> Posterior:
        parts = []
        for part in pixels.split(1 if self.slicing else len(pixels)):
            self.request.cancel.check()
            parts.append(self.engine.encode_image(part, tiling=self.tiling))
        return Posterior(*map(torch.cat, zip(*parts, strict=True)))

    def _first_noise(self) -> Tensor:
        given = self.request.latents
        return self.draw() if given is None else given.to(self.engine.device, torch.float32)

    def _noised(self, z0: Tensor, unit: Tensor) -> Tensor:
        u0, v0 = self.table.start_from_image
        return u0 * z0 + v0 * unit

    def _branches(self, states: Tensor) -> int:
        return len(states) // self.request.batch

    def _job(
        self,
        states: Tensor,
        x: Tensor,
        *,
        extra_channels: Tensor | None = None,
        inpainting: Inpainting | None = None,
    ) -> Job:
        return Job(
            table=self.table,
            guidance=guidance(self.request.scales, self.table),
            x=x,
            states=states,
            noise=noise.RowNoise(self.table, x.shape, self.request.generator, device=self.engine.device),
            extra_channels=extra_channels,
            inpainting=inpainting,
        )


def job(
    engine: Engine,
    request: Request,
    table: SamplerTable,
    states: Tensor,
    *,
    slicing: bool = True,
    tiling: bool = False,
) -> Job:
    studio = Studio(engine, request, table, slicing, tiling)
    if request.source is None:
        return studio.text_to_image(states)
    if request.task == "inpaint":
        return studio.inpaint(states, request.source)
    if request.task == "instruct":
        return studio.instruct(states, request.source)
    return studio.image_to_image(states, request.source)


def guidance(scales: Scales, table: SamplerTable) -> Guidance:
    weights, rescale = np.tile(scales.weights, (table.rows, 1)), np.full(table.rows, scales.rescale)
    step: NDArray[np.int64] = np.cumsum(table.ends_step) - table.ends_step  # that a row belongs to
    first, end = (int(share * table.steps + 1e-9) for share in scales.interval)  # 0.29 · 100 is a little less than 29
    on: NDArray[np.bool_] = (first <= step) & (step < end)
    if not on.any():
        reason = f"guides none of {table.steps} steps"
        raise ArgumentError(f"guidance_interval = {scales.interval}: {reason}", field="guidance_interval")
    return Guidance(weights, rescale, None if on.all() else on)
