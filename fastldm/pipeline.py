"""Prompt to image."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastldm import request, tasks
from fastldm.assemble import Asked, assemble
from fastldm.errors import ArgumentError, FileError, brief
from fastldm.image import Images, to_output, to_unit
from fastldm.request import Generators, Geometry, Request
from fastldm.runtime.build import engine_from, planned
from fastldm.runtime.engine import Engine
from fastldm.sampling import SamplerTable, SchedulerConfig, noise, sampler_table
from fastldm.sampling.choice import chosen


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
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        config: str | os.PathLike[str] | None = None,
        original_config: str | os.PathLike[str] | None = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        prediction_type: str | None = None,
        extract_ema: bool = False,
    ) -> None:
        """
        model: a folder in diffusers' layout, the id of one on the hub ("owner/name"), or a single file in the original
        layout, `.safetensors` or `.ckpt`, on disk or by its address on the hub.
        torch_dtype, dtype (one of them): of weights and activations, float32 where None, bfloat16 or float16. With
        float16 an autoencoder that says `force_upcast` runs in float32. device: "cpu" where None.
        variant: "fp16" picks `*.fp16.safetensors`. revision to token belong to the hub.
        vae, text_encoder: in place of the model's own: a folder, for the VAE also a file, or a module of diffusers or
        transformers. tokenizer: a folder with its files, or one of transformers. scheduler: what the property takes.
        For a single file alone: config: a folder in diffusers' layout with its configurations. original_config: its
        yaml file, in place of the one beside it. prediction_type: "epsilon" or "v_prediction", in place of what it
        shows. extract_ema: take its averaged weights.
        Raises `ArgumentError` naming the argument; `FileError`, `ConfigError` or `WeightsError` naming the file.
        """
        wanted = _dtype(torch_dtype, dtype), _device(device)
        asked = Asked(
            model,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            config=config,
            original_config=original_config,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prediction_type=prediction_type,
            extract_ema=extract_ema,
        )
        self._slicing, self._tiling = True, False
        with assemble(asked) as made:
            self._scheduler = made.scheduler if scheduler is None else chosen(scheduler, made.scheduler)
            self._tokenizer = made.tokenizer(planned("text_encoder", made.parts["text_encoder"]).config)
            self._engine: Engine = engine_from(made.parts, dtype=wanted[0], device=wanted[1])

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> Pipeline:
        """`Pipeline(model, ...)`, under the name that programs written for diffusers use."""
        return cls(model, **options)

    @classmethod
    def from_single_file(cls, model: str | os.PathLike[str], **options: Any) -> Pipeline:
        """`Pipeline(model, ...)`, and an error if `model` is no single file."""
        if not Asked(model).is_file:
            raise FileError(f"{os.fspath(model)} is no single file: pass a folder to Pipeline(...)", field="model")
        return cls(model, **options)

    @property
    def scheduler(self) -> SchedulerConfig:
        """The sampler and its numbers; `.config` is what diffusers' `X.from_config` takes.

        Assign a name of `fastldm.samplers()`, which keeps the model's betas and prediction type, a scheduler object of
        diffusers, or (its class, a configuration). It holds for the calls that follow.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: object) -> None:
        self._scheduler = chosen(value, self._scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        masked_image_latents: Tensor | None = None,
        padding_mask_crop: int | None = None,
        overlay: bool = False,
        output_type: str = "pil",
    ) -> PipelineOutput:
        """Paints `num_images_per_prompt` images for each prompt.

        image: to start from, or with a model for it to edit: a PIL image of any mode, an array or tensor in 0..1 or
        uint8, or a list with one for each prompt. mask_image: likewise; white is painted anew, black is kept.
        strength: the share of the steps that is run on the image, 0.8; 1 for inpainting starts from noise alone.
        height, width: pixels, multiples of the autoencoder's factor; the image's or the model's own where None. PIL
        images are resized to them.
        num_inference_steps: 50, for instruct-pix2pix 100. timesteps, sigmas: the caller's own, in place of a number.
        guidance_scale: s of classifier-free guidance (arXiv 2207.12598); 1 and below computes no unconditional branch.
        guidance_rescale: φ of arXiv 2305.08891, section 3.4. eta: η of DDIM (arXiv 2010.02502); others ignore it.
        image_guidance_scale: of instruct-pix2pix (arXiv 2211.09800), 1.5.
        generator: one torch.Generator, or one for each image; None draws from the system's entropy.
        latents: the first noise, (images, channels, height / factor, width / factor), unit variance.
        masked_image_latents: for 9-channel models, in place of the encoded masked image.
        padding_mask_crop: paint only the box around the mask, this many pixels wider, in the model's own size.
        overlay: lay the image's own pixels over the result where the mask is black, bit for bit.
        output_type: "pil", "np" (B, H, W, C) in 0..1, "pt" (B, C, H, W) in 0..1, "latent" (scaled latents).
        Raises `ArgumentError` naming the argument, before any work; `NonFiniteError` for NaN in the result.
        """
        asked = request.checked(
            self._geometry(),
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            mask_image=mask_image,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            image_guidance_scale=image_guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            masked_image_latents=masked_image_latents,
            padding_mask_crop=padding_mask_crop,
            overlay=overlay,
            output_type=output_type,
        )
        painted = self._paint(asked)
        if asked.output_type == "latent":
            return PipelineOutput(painted)
        pixels = self._engine.decode(painted, slicing=self._slicing, tiling=self._tiling)
        return PipelineOutput(self._finished(asked, pixels))

    def enable_vae_slicing(self, enabled: bool = True) -> None:
        """Decode one image of a batch at a time, with the memory of one. This is the default."""
        self._slicing = enabled

    def enable_vae_tiling(self, enabled: bool = True) -> None:
        """Decode large images in overlapping tiles of the autoencoder's size: little memory, slightly other pixels."""
        self._tiling = enabled

    def disable_vae_slicing(self) -> None:
        self.enable_vae_slicing(False)

    def disable_vae_tiling(self) -> None:
        self.enable_vae_tiling(False)

    def _geometry(self) -> Geometry:
        factor, unet = self._engine.vae.config.factor, self._engine.unet.config
        return Geometry(
            channels=unet.out_channels,
            extra_channels=unet.in_channels - unet.out_channels,
            factor=factor,
            side=unet.sample_size * factor,
        )

    def _paint(self, asked: Request) -> Tensor:
        """The latents after the last step, (B, C, H, W), float32."""
        table = self._table(asked)
        steps = self._engine.sample(tasks.job(self._engine, asked, table, self._states(asked)))
        with tqdm(total=table.steps, disable=not _on_a_terminal(), leave=False) as bar:
            for latents in steps:  # noqa: B007  the last is the result
                bar.update()
        return latents.clone()  # the plan's state is a larger buffer

    def _table(self, asked: Request) -> SamplerTable:
        """The sampler's table, from the step on at which `strength` begins."""
        build = partial(sampler_table, self._scheduler, asked.steps, eta=asked.eta)
        build = partial(build, timesteps=asked.timesteps, sigmas=asked.sigmas)
        own = asked.timesteps is not None or asked.sigmas is not None
        begin = asked.begin(build().steps if own else asked.steps)
        table = build(begin=begin)
        if table.brownian is not None:
            noise.brownian_interval()  # to miss it now, before any work
        return table

    def _states(self, asked: Request) -> Tensor:
        """(G·B, L, width): what each branch reads, the fully conditioned one last."""
        unguided = 0 if not asked.guided else 2 if asked.task == "instruct" else 1
        prompts = [*asked.negative_prompts * unguided, *asked.prompts]
        return self._engine.encode_text(self._tokenizer(prompts)).repeat_interleave(asked.images_per_prompt, dim=0)

    def _finished(self, asked: Request, pixels: Tensor) -> Images:
        source = asked.source
        unit = to_unit(pixels)
        if source is not None and source.overlay:
            unit = source.laid_over(unit.float())
        images = to_output(unit, asked.output_type)
        if source is not None and source.crop is not None:
            assert isinstance(images, list)
            return source.crop.filled_in(images)
        return images


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _dtype(torch_dtype: object, dtype: object) -> torch.dtype:
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ArgumentError(f"dtype = {brief(dtype)}: torch_dtype says {brief(torch_dtype)}", field="dtype")
    name, value = ("dtype", dtype) if torch_dtype is None else ("torch_dtype", torch_dtype)
    value = torch.float32 if value is None else value
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        raise ArgumentError(f"{name} = {brief(value)}: must be one of {', '.join(map(str, DTYPES))}", field=name)
    return value


def _device(value: object) -> torch.device:
    try:
        device = torch.device("cpu" if value is None else value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ArgumentError(f'device = {brief(value)}: must be "cpu", "cuda" or "cuda:N"', field="device") from None
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f'device = {brief(value)}: must be "cpu", "cuda" or "cuda:N"', field="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device = {brief(value)}: there are {torch.cuda.device_count()} GPUs here", field="device")
    return device


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
