"""Prompt to image."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastldm import config
from fastldm.errors import ConfigError
from fastldm.image import Images, to_output
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.prompt import Tokenizer
from fastldm.request import Generators, Geometry, Request, text_to_image
from fastldm.runtime.engine import Engine, Job
from fastldm.runtime.plan import Guidance
from fastldm.sampling import SchedulerConfig, noise, sampler_table, scheduler_config
from fastldm.weights.files import ModelFolder, open_model
from fastldm.weights.load import load

log = logging.getLogger("fastldm")

PIPELINES = ("StableDiffusionPipeline",)
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of PIL images, or what `output_type` asks for."""

    images: Images


class Pipeline:
    """A latent diffusion model, ready to paint: `Pipeline(model)("a prompt").images[0]`."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        """
        model: a folder in diffusers' layout, or the id of one on the hub ("owner/name").
        torch_dtype: of weights and activations; float32 where None. device: "cpu" where None.
        variant: "fp16" picks `*.fp16.safetensors`. The others belong to the hub.
        Raises `FileError`, `ConfigError` or `WeightsError`, naming the file and what is wrong with it.
        """
        folder = open_model(
            model,
            revision=revision,
            variant=variant,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        _check_index(folder)
        self.scheduler: SchedulerConfig = scheduler_config(folder.read_json("scheduler/scheduler_config.json"))
        self._engine = _load_engine(folder, torch_dtype or torch.float32, torch.device(device or "cpu"))
        positions = self._engine.text_encoder.config.positions
        self._tokenizer = Tokenizer.from_folder(folder.path("tokenizer"), positions)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> Pipeline:
        """`Pipeline(model, ...)`, under the name that programs written for diffusers use."""
        return cls(model, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Paints `num_images_per_prompt` images for each prompt.

        height, width: pixels, multiples of the autoencoder's factor; the model's own where None.
        guidance_scale: s of classifier-free guidance (arXiv 2207.12598); 1 and below computes no unconditional branch.
        guidance_rescale: φ of arXiv 2305.08891, section 3.4. eta: η of DDIM (arXiv 2010.02502); others ignore it.
        generator: one torch.Generator, or one for each image; None draws from the system's entropy.
        latents: the first noise, (images, channels, height / factor, width / factor), unit variance.
        output_type: "pil", "np" (B, H, W, C) in 0..1, "pt" (B, C, H, W) in 0..1, "latent" (scaled latents).
        Raises `ArgumentError` naming the argument, before any work; `NonFiniteError` for NaN in the result.
        """
        request = text_to_image(
            self._geometry(),
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            output_type=output_type,
        )
        painted = self._paint(request)
        if request.output_type == "latent":
            return PipelineOutput(painted)
        return PipelineOutput(to_output(self._engine.decode(painted), request.output_type))

    def _geometry(self) -> Geometry:
        factor = self._engine.vae.config.factor
        unet = self._engine.unet.config
        return Geometry(channels=unet.out_channels, factor=factor, side=unet.sample_size * factor)

    def _paint(self, request: Request) -> Tensor:
        """The latents after the last step, (B, C, H, W), float32."""
        table = sampler_table(self.scheduler, request.steps, eta=request.eta)
        states = self._states(request)
        first = request.latents
        if first is None:
            first = self._draw(request)
        job = Job(
            table=table,
            guidance=_guidance(request, table.rows),
            noise=first.to(self._engine.device),
            states=states,
            draw=lambda row: self._draw(request),
        )
        steps = self._engine.sample(job)
        for latents in tqdm(steps, total=table.steps, disable=not sys.stderr.isatty(), leave=False):
            pass
        return latents

    def _states(self, request: Request) -> Tensor:
        """(G·B, L, width): the negative prompts of all images, where guided, then the prompts."""
        prompts = [*request.negative_prompts, *request.prompts] if request.guided else request.prompts
        return self._engine.encode_text(self._tokenizer(prompts)).repeat_interleave(request.images_per_prompt, dim=0)

    def _draw(self, request: Request) -> Tensor:
        geometry = self._geometry()
        size = (request.height // geometry.factor, request.width // geometry.factor)
        return noise.draw((request.batch, geometry.channels, *size), request.generator, device=self._engine.device)


def _guidance(request: Request, rows: int) -> Guidance:
    s = request.guidance_scale
    weights = np.array([1 - s, s]) if request.guided else np.ones(1)
    return Guidance(np.tile(weights, (rows, 1)), np.full(rows, request.guidance_rescale))


# ---------------------------------------------------------------------------------------------------- loading a folder


def _check_index(folder: ModelFolder) -> None:
    """model_index.json must name a pipeline and components that we have."""
    where = "model_index.json"
    index = folder.read_json(where)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(
            f"{where}: _class_name = {name!r} is not supported; supported: {', '.join(PIPELINES)}",
            field="_class_name",
        )
    for key, value in index.items():
        given = isinstance(value, list) and value[:1] != [None]
        if given and key not in COMPONENTS + UNUSED:
            raise ConfigError(f"{where}: {key!r} is no component of {name}", field=key)
        if given and key == "safety_checker":
            log.warning("%s: the model's safety checker is not run", folder.root)


def _load_engine(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> Engine:
    unet = config.unet_config(folder.read_json("unet/config.json"))
    vae = config.vae_config(folder.read_json("vae/config.json"))
    text = config.text_config(folder.read_json("text_encoder/config.json"))
    _check_together(unet, vae, text)
    with (
        folder.tensors("unet") as unet_tensors,
        folder.tensors("vae") as vae_tensors,
        folder.tensors("text_encoder") as text_tensors,
    ):
        return Engine(
            unet=load(lambda: UNet(unet), unet_tensors, dtype=dtype, device=device),
            vae=load(lambda: AutoencoderKL(vae), vae_tensors, dtype=dtype, device=device),
            text_encoder=load(lambda: TextEncoder(text), text_tensors, dtype=dtype, device=device),
        )


def _check_together(unet: config.UNetConfig, vae: config.VAEConfig, text: config.TextConfig) -> None:
    pairs = (
        ("cross_attention_dim", unet.context_dim, "the text encoder's hidden_size", text.width),
        ("out_channels", unet.out_channels, "the VAE's latent_channels", vae.latent_channels),
        (
            "in_channels",
            unet.in_channels,
            "out_channels: text to image takes nothing else",
            unet.out_channels,
        ),
    )
    for key, value, other, expected in pairs:
        if value != expected:
            field = f"unet/config.json: {key}"
            raise ConfigError(f"{field} = {value} must equal {other} = {expected}", field=field)
    if unet.added is not None:
        raise ConfigError("unet/config.json: addition_embed_type: SDXL cannot be painted yet", field="unet/config.json")
