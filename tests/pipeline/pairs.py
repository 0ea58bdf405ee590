"""The same model twice: diffusers' pipeline, and ours loaded from the folder that it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import fastldm
from tests import oracle

MODELS = {
    "sd1": (oracle.SD1, "epsilon"),
    "sd2": (oracle.SD2, "v_prediction"),
    "uneven": (oracle.UNEVEN, "sample"),
}
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}


@dataclass(frozen=True)
class Pair:
    ref: StableDiffusionPipeline
    fast: fastldm.Pipeline
    folder: Path

    def errors(self, **call: Any) -> dict[str, float]:
        """Relative errors of a call's latents and of the images decoded from them.

        "seed" in the call becomes a generator, a list of seeds a list of generators, fresh for each side.
        """
        mine, theirs = self.both(output_type="latent", **call)
        images = decoded(self.fast, mine), decoded(self.ref, theirs)
        return {
            "latents": oracle.relative_error(mine, theirs),
            "images": oracle.relative_error(*images),
        }

    def both(self, **call: Any) -> tuple[Any, Any]:
        return paint(self.fast, **call), paint(self.ref, **call)


def paint(pipe: Callable[..., Any], *, seed: int | list[int] = 3, **call: Any) -> Any:
    return pipe(generator=generators(seed), **call).images


def generators(seed: int | list[int]) -> torch.Generator | list[torch.Generator]:
    if isinstance(seed, list):
        return [torch.Generator().manual_seed(s) for s in seed]
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor) -> Tensor:
    if isinstance(pipe, fastldm.Pipeline):
        return pipe._engine.decode(latents)
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


def make(folder: Path, model: str = "sd1", scheduler: str = "ddim", *, levels: int = 2) -> Pair:
    unet, prediction_type = MODELS[model]
    ref = oracle.stable_diffusion(unet, prediction_type=prediction_type, levels=levels)
    ref.scheduler = SCHEDULERS[scheduler].from_config(ref.scheduler.config)
    oracle.saved(ref, folder)
    return Pair(ref, fastldm.Pipeline(folder), folder)


def of_task(channels: int, kind: Any, unet: dict[str, Any], folder: Path) -> Pair:
    """kind: the class of diffusers' pipeline. channels: that its U-Net reads."""
    parts = dict(oracle.stable_diffusion().components)
    parts.pop("image_encoder")
    torch.manual_seed(1)
    parts["unet"] = UNet2DConditionModel(
        in_channels=channels, out_channels=4, cross_attention_dim=24, sample_size=16, **unet
    )
    oracle.saved(kind(**parts, requires_safety_checker=False), folder)
    ref = kind.from_pretrained(folder, safety_checker=None)  # so that both read the same scheduler_config.json
    ref.set_progress_bar_config(disable=True)
    return Pair(ref, fastldm.Pipeline(folder), folder)
