"""What shapes cannot show, for each family of Stable Diffusion: head counts, scale of the latents, schedule, sizes.

The numbers are those of the published models: `v1-inference.yaml` of CompVis/stable-diffusion, `v2-inference-v.yaml` of
Stability-AI/stablediffusion, `sd_xl_base.yaml` and `sd_xl_refiner.yaml` of Stability-AI/generative-models, and the
`scheduler_config.json` that stands beside each on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_HEAD_DIM = 64  # of every CLIP and OpenCLIP text transformer in use


@dataclass(frozen=True)
class Text:
    """A text encoder in an original checkpoint: its prefix and its layout, "clip" or "open_clip".

    read: how many layers are run, where the U-Net reads one before the last; None: all that there are.
    projected: whether its pooled output is used, and so its projection needed.
    """

    prefix: str
    layout: str
    read: int | None = None
    projected: bool = False


@dataclass(frozen=True)
class Family:
    """Models that share all that shapes cannot show.

    heads: of each level of the U-Net; None: as many as give 64 channels to each. classes: what diffusers has for each
    task. pixels: the side of an image. runs: whether a pipeline can paint with it.
    """

    name: str
    context_dim: int
    heads: int | None
    texts: Mapping[str, Text]
    classes: Mapping[str, str]
    scaling_factor: float
    pixels: int
    scheduler: Mapping[str, Any]
    runs: bool

    def unet_heads(self, channels: Sequence[int]) -> list[int]:
        return [self.heads or max(c // 64, 1) for c in channels]


TASKS = {0: "text-to-image", 4: "instruct-pix2pix", 5: "inpainting"}
"""Channels of the U-Net's input behind the four of the latents -> what the model was trained for."""

_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
_PNDM = {"_class_name": "PNDMScheduler", **_SCHEDULE, "skip_prk_steps": True}
_DDIM = {"_class_name": "DDIMScheduler", **_SCHEDULE}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **_SCHEDULE,
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
_SD = "StableDiffusion"
_SD_CLASSES = {
    "text-to-image": f"{_SD}Pipeline",
    "inpainting": f"{_SD}InpaintPipeline",
    "instruct-pix2pix": f"{_SD}InstructPix2PixPipeline",
}
_XL_CLASSES = {task: name.replace(_SD, f"{_SD}XL") for task, name in _SD_CLASSES.items()}

SD1 = Family(
    name="Stable Diffusion 1.x",
    context_dim=768,
    heads=8,
    texts={"text_encoder": Text("cond_stage_model.transformer.", "clip")},
    classes=_SD_CLASSES,
    scaling_factor=0.18215,
    pixels=512,
    scheduler=_PNDM,
    runs=True,
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    context_dim=1024,
    heads=None,
    texts={"text_encoder": Text("cond_stage_model.model.", "open_clip", read=23)},
    classes=_SD_CLASSES,
    scaling_factor=0.18215,
    pixels=512,
    scheduler=_DDIM,
    runs=True,
)
SDXL = Family(
    name="Stable Diffusion XL base",
    context_dim=2048,
    heads=None,
    texts={
        "text_encoder": Text("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": Text("conditioner.embedders.1.model.", "open_clip", projected=True),
    },
    classes=_XL_CLASSES,
    scaling_factor=0.13025,
    pixels=1024,
    scheduler=_EULER,
    runs=False,
)
REFINER = Family(
    name="Stable Diffusion XL refiner",
    context_dim=1280,
    heads=None,
    texts={"text_encoder_2": Text("conditioner.embedders.0.model.", "open_clip", projected=True)},
    classes={"text-to-image": f"{_SD}XLImg2ImgPipeline"},
    scaling_factor=0.13025,
    pixels=1024,
    scheduler=_EULER,
    runs=False,
)
FAMILIES = (SD1, SD2, SDXL, REFINER)
