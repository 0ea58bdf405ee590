"""Prompt to image."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastldm import drop_in, ops, request, tasks, text
from fastldm.arguments import MAX_IMAGES, Arguments, Generators, integer
from fastldm.asked import NEEDED, Asked
from fastldm.assemble import assemble
from fastldm.assets import SHAPES
from fastldm.callback import Watched
from fastldm.cancel import CancelToken
from fastldm.components import Decoding
from fastldm.errors import ArgumentError, FileError, brief
from fastldm.image import Images, to_output, to_unit, uint8_to_pil
from fastldm.request import Callback, Request
from fastldm.runtime import explain, memory
from fastldm.runtime.build import engine_from, planned
from fastldm.runtime.engine import Engine, Job
from fastldm.runtime.place import asked_backend, asked_device, asked_dtype, device_type
from fastldm.runtime.plan import Shape
from fastldm.runtime.rehearse import Networks
from fastldm.runtime.warmup import Warmed, asked_chip, warm_up
from fastldm.sampling import SamplerTable, SchedulerConfig, noise, sampler_table
from fastldm.sampling.choice import chosen
from fastldm.surface import Surface, geometry


class PipelineOutput(NamedTuple):
    """images: a list of PIL images, or what `output_type` asks for. No safety checker is run."""

    images: Images
    nsfw_content_detected: None = None

    def __getitem__(self, key: Any) -> Any:
        """By place or by name."""
        return getattr(self, key) if isinstance(key, str) and key in self._fields else tuple.__getitem__(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self)


class Pipeline(Surface):
    """A latent diffusion model, ready to paint: `Pipeline(model)("a prompt").images[0]`."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
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
        unet: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        prediction_type: str | None = None,
        extract_ema: bool = False,
        use_safetensors: bool | None = None,
        backend: str = "reference",
        **others: Any,
    ) -> None:
        """
        model: a folder in diffusers' layout, the id of one on the hub ("owner/name"), or a single file in the original
        layout, `.safetensors` or `.ckpt`, on disk or by its address on the hub. Without one it is the embedded model of
        coloured shapes, or with components all five of them; those of another Pipeline are shared, not copied.
        torch_dtype, dtype (one of them): of weights and activations, float32 where None, bfloat16 or float16. With
        float16 an autoencoder that says `force_upcast` runs in float32. device: "cpu" where None.
        variant: "fp16" picks `*.fp16.safetensors`. revision to token belong to the hub. use_safetensors: True refuses
        pickles.
        unet, vae, text_encoder: in place of the model's own: a folder, a file, or a module of diffusers or
        transformers. tokenizer: a folder with its files, or one of transformers. scheduler: what the property takes.
        For a single file alone: config: a folder in diffusers' layout with its configurations. original_config: its
        yaml file, in place of the one beside it. prediction_type: "epsilon" or "v_prediction", in place of what it
        shows. extract_ema: take its averaged weights.
        backend: who computes: "reference" is plain PyTorch, the yardstick; "auto" chooses for each op, as `explain()`
        tells, and captures graphs on a GPU; "fused" has our kernels alone.
        others: what diffusers' pipelines take beside, as docs/drop-in.md lists it.
        Raises `ArgumentError` naming the argument; `FileError`, `ConfigError` or `WeightsError` naming the file.
        """
        drop_in.check_options(drop_in.LOADING, others, known=_LOADING)
        if all(part is None for part in (model, unet, vae, text_encoder, tokenizer)):
            model = SHAPES  # a sampler alone is for it
        asked = Asked(
            model,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            config=config,
            original_config=original_config,
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            prediction_type=prediction_type,
            extract_ema=extract_ema,
            use_safetensors=use_safetensors,
        )
        runs_in, runs_on, by = asked_dtype(torch_dtype, dtype), asked_device(device), asked_backend(backend)
        self._decoding, self._bar = Decoding(), {}
        self._name = None if model is None else os.fspath(model)
        with assemble(asked) as made:
            self._scheduler = made.scheduler
            self._tokenizer = made.tokenizer(planned("text_encoder", made.parts["text_encoder"]).config)
            runs_in, runs_on = runs_in or made.dtype, runs_on or made.device
            self._engine = engine_from(made.parts, dtype=runs_in, device=runs_on, backend=by)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """`Pipeline(model, ...)`, under the name that programs written for diffusers use."""
        if pretrained_model_name_or_path is None:
            raise ArgumentError("pretrained_model_name_or_path = None: must be a path or a name", field="model")
        return cls(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """`Pipeline(model, ...)`, and an error if `model` is no single file."""
        if not Asked(pretrained_model_link_or_path).is_file:
            what = os.fspath(pretrained_model_link_or_path)
            raise FileError(f"{brief(what)} is no single file: pass a folder to Pipeline(...)", field="model")
        return cls(pretrained_model_link_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """Another pipeline of the same components, shared where they are ours; options replace single ones.

        torch_dtype, dtype, device: where the new one runs; the other is not moved.
        """
        components = getattr(pipeline, "components", None)
        if not isinstance(components, Mapping):
            raise ArgumentError(f"pipeline: {type(pipeline).__name__} has no components", field="pipeline")
        if "model" in options:
            raise ArgumentError("model: the components are those of the other pipeline", field="model")
        if isinstance(options.get("scheduler"), str):
            options["scheduler"] = chosen(options["scheduler"], chosen(components.get("scheduler"), _ANY))
        if isinstance(pipeline, Pipeline):
            options.setdefault("backend", pipeline._engine.backend)
        runs_in = asked_dtype(options.pop("torch_dtype", None), options.pop("dtype", None))
        runs_on = asked_device(options.pop("device", None))
        needed = {name: components.get(name) for name in NEEDED}
        if all(part is None for part in needed.values()):
            raise ArgumentError(
                f"pipeline: {type(pipeline).__name__} has none of {', '.join(NEEDED)}", field="pipeline"
            )
        return cls(**{**needed, **options}).to(runs_on, runs_in)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
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
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        image_guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        masked_image_latents: Tensor | None = None,
        padding_mask_crop: int | None = None,
        overlay: bool = False,
        scheduler: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cancel: CancelToken | None = None,
        **others: Any,
    ) -> PipelineOutput:
        """Paints `num_images_per_prompt` images for each prompt.

        image: to start from, or with a model for it to edit: a PIL image of any mode, an array or tensor in 0..1 or
        uint8, or a list with one for each prompt. mask_image: likewise; white is painted anew, black is kept.
        strength: the share of the steps that is run on the image, 0.8; 1 for inpainting starts from noise alone.
        height, width: pixels, multiples of the autoencoder's factor; the image's or the model's own where None. PIL
        images are resized to them.
        num_inference_steps: 50, for instruct-pix2pix 100. timesteps, sigmas: the caller's own, in place of a number.
        guidance_scale: s of classifier-free guidance (arXiv 2207.12598), 7.5; 1 and below computes no unconditional
        branch. guidance_rescale: φ of arXiv 2305.08891, section 3.4. guidance_interval: (lo, hi), shares of the steps
        that are run: guidance from step int(lo · steps) to before int(hi · steps), in the others the prompt's branch
        alone, which saves the products of the rest (arXiv 2404.07724); None guides all. image_guidance_scale: of
        instruct-pix2pix (arXiv 2211.09800), 1.5. eta: η of DDIM (arXiv 2010.02502) and TCD; others ignore it.
        generator: one torch.Generator, or one for each image; None draws from the system's entropy. seed: in place of
        generator; image k has the generator seeded with seed + k, or with the k-th of a list.
        latents: the first noise, (images, channels, height / factor, width / factor), unit variance.
        prompt_embeds, negative_prompt_embeds: in place of the prompts, (prompts, tokens, width), as `encode_prompt`
        gives them. clip_skip: of the text encoder's layers, how many of the last are left out, for the prompt.
        masked_image_latents: for 9-channel models, in place of the encoded masked image.
        padding_mask_crop: paint only the box around the mask, this many pixels wider, in the model's own size.
        overlay: lay the image's own pixels over the result where the mask is black, bit for bit.
        scheduler: for this call, what the property of this name takes.
        output_type: "pil", "np" (B, H, W, C) in 0..1, "pt" (B, C, H, W) in 0..1, "latent" (scaled latents).
        return_dict: of no effect: the result is both, a tuple and an object with names.
        callback_on_step_end: called after every row as f(pipe, row, timestep, tensors), returns its tensors, which take
        effect; see `CallView`. callback_on_step_end_tensor_inputs: the names of those that it gets.
        cancel: a token that ends the call, from wherever, within a row, or one image's encoding or decoding.
        Raises `ArgumentError` naming the argument, before any work; `NonFiniteError` for NaN in the result;
        `Cancelled`; `ForkError` in a fork of the process that made the pipeline. Whatever is raised, by a callback or
        by Ctrl-C, leaves the pipeline as it was.
        """
        drop_in.check_options(drop_in.CALL, others, known=_ARGUMENTS)
        given = Arguments(
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
            guidance_interval=guidance_interval,
            image_guidance_scale=image_guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            seed=seed,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            masked_image_latents=masked_image_latents,
            padding_mask_crop=padding_mask_crop,
            overlay=overlay,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            cancel=cancel,
        )
        outer = sys.exception()  # what the caller is handling
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(self.device.type)
        try:
            return self._called(given, scheduler)
        except BaseException as error:
            torch.set_grad_enabled(grad)  # a signal may have come while torch was about to
            torch.set_autocast_enabled(self.device.type, autocast)
            _forget(error, outer)
            raise

    def explain(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        device: str | torch.device | None = None,
    ) -> None:
        """Prints which implementation `ops.using("auto")` chooses for each op of a call with guidance, and why.

        Nothing is computed. device: "cpu" or "cuda", which need not be there; the pipeline's own where None.
        Raises `ArgumentError` naming the argument.
        """
        engine = self._engine
        model = geometry(engine, self._tokenizer)
        side = [n // model.factor for n in request.pixels(model, height, width)]
        images = integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        shape = Shape(images, side[0], side[1], self._tokenizer.length)
        rows = explain.explained(engine, shape, model.branches, device_type(device) or engine.device.type)
        print(explain.table(list(rows)))

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        num_images_per_prompt: int = 1,
        target: str | None = None,
        jobs: int | None = None,
    ) -> Warmed:
        """Compiles the kernels of text to image in these sizes, side by side; where rows are captured, captures them.

        The processes run the caller's script up to `if __name__ == "__main__":`, which must guard it.

        sizes: (height, width) in pixels; the model's own where there are none. target: a chip such as "sm_90", which
        need not be here; None is the GPU that is. jobs: processes, one for each processor where None.
        Raises `ArgumentError` naming the argument.
        """
        engine, how = self._engine, replace(self._decoding)
        model, chip = geometry(engine, self._tokenizer), asked_chip(target)
        images = integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        checked = [request.pixels(model, *size) for size in sizes] or [request.pixels(model, None, None)]
        calls = [
            (Shape(images, height // model.factor, width // model.factor, self._tokenizer.length), branches)
            for height, width in checked
            for branches in (model.branches, 1)
        ]
        workers = None if jobs is None else integer("jobs", jobs, 1, 256)
        warmed = warm_up(Networks.of(engine), calls, capability=chip, jobs=workers)
        for shape, branches in calls:
            engine.prepare(shape, branches, decoded=1 if how.slicing else images, tiling=how.tiling)
        return warmed

    def _called(self, given: Arguments, scheduler: object) -> PipelineOutput:
        """What of the pipeline may change is read once, so that who changes it does so for the next call."""
        engine, config = self._engine, self._scheduler
        engine.check_process()  # first: checking an argument may take several threads, too
        asked = request.checked(geometry(engine, self._tokenizer), given)
        return self._painted(asked, engine, config if scheduler is None else chosen(scheduler, config))

    @torch.no_grad()
    def _painted(self, asked: Request, engine: Engine, config: SchedulerConfig) -> PipelineOutput:
        table, how = _table(config, asked), replace(self._decoding)
        tasks.guidance(asked.scales, table)  # refuses an interval without a step
        memory.check(engine, _call(asked, table, how, self._tokenizer.length))
        asked.cancel.check()
        states = text.states(engine, self._tokenizer, asked.words, asked.scales.branches)
        asked.cancel.check()
        job = tasks.job(engine, asked, table, states, slicing=how.slicing, tiling=how.tiling)
        painted = self._run(asked, engine, job)
        images: Images = painted
        if asked.output_type != "latent":
            images = _finished(asked, engine, _decoded(asked, engine, painted, how))
        return PipelineOutput(images)

    def _run(self, asked: Request, engine: Engine, job: Job) -> Tensor:
        """The latents after the last row, (B, C, H, W), float32."""
        with engine.begin(job) as run:
            watched = Watched(self, asked, run) if asked.callback is not None else None
            asked.cancel.check()
            with self.progress_bar(total=job.table.steps) as bar:
                for row in run:
                    bar.update(int(job.table.ends_step[row]))
                    if watched is not None and not watched.goes_on(row):
                        break
                    asked.cancel.check()
            return run.result()


def _table(config: SchedulerConfig, asked: Request) -> SamplerTable:
    """The sampler's table, from the step on at which `strength` begins."""
    build = partial(sampler_table, config, asked.steps, eta=asked.eta)
    build = partial(build, timesteps=asked.timesteps, sigmas=asked.sigmas)
    own = asked.timesteps is not None or asked.sigmas is not None
    begin = asked.begin(build().steps if own else asked.steps)
    table = build(begin=begin)
    if table.brownian is not None:
        noise.brownian_interval()  # to miss it now, before any work
    return table


def _call(asked: Request, table: SamplerTable, how: Decoding, window: int) -> memory.Call:
    """What its memory depends on. window: tokens of a prompt in words."""
    return memory.Call(
        batch=asked.batch,
        branches=asked.scales.branches,
        alone=asked.scales.branches > 1 and asked.scales.interval != (0.0, 1.0),
        height=asked.height,
        width=asked.width,
        steps=table.rows,
        slicing=how.slicing,
        tiling=how.tiling,
        encodes=0 if asked.source is None else len(asked.source.pixels),
        tokens=window if asked.words.embeds is None else asked.words.embeds.shape[1],
        plans=1 if asked.callback is None else 2,
        output_type=asked.output_type,
    )


def _decoded(asked: Request, engine: Engine, latents: Tensor, how: Decoding) -> Tensor:
    pixels = []
    for part in latents.split(1 if how.slicing else len(latents)):
        pixels.append(engine.decode(part, tiling=how.tiling))
        asked.cancel.check()
    return torch.cat(pixels)


def _finished(asked: Request, engine: Engine, pixels: Tensor) -> Images:
    """What the caller asked for, of decoded pixels."""
    source = asked.source
    if source is not None and source.overlay:
        images: Images = to_output(source.laid_over(to_unit(pixels).float()), asked.output_type)
    elif asked.output_type == "pil":
        with engine.using():
            images = uint8_to_pil(ops.to_uint8(pixels).cpu().numpy())
    else:
        images = to_output(to_unit(pixels), asked.output_type)
    if source is not None and source.crop is not None:
        assert isinstance(images, list)
        return source.crop.filled_in(images)
    return images


def _forget(error: BaseException, outer: BaseException | None) -> None:
    """Clears the frames of ours that an exception came through, so that holding it does not hold their tensors.

    outer: an exception that came before, whose frames are its own.
    """
    seen = {id(outer)}
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_globals.get("__name__", "").partition(".")[0] in ("fastldm", "torch", "torchsde"):
                with suppress(RuntimeError):  # it is still running
                    frame.clear()
        link = link.__cause__ or link.__context__


_ANY = SchedulerConfig("ddim")  # what a whole scheduler takes the place of
_LOADING, _ARGUMENTS = (
    tuple(inspect.signature(function).parameters)[1:-1] for function in (Pipeline.__init__, Pipeline.__call__)
)
