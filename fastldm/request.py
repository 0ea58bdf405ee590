"""The validated call: every argument checked once, by name, before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastldm.arguments import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_NOISE,
    MAX_PIXELS,
    MAX_STEPS,
    MAX_TOKENS,
    Arguments,
    Generators,
    flag,
    generators,
    integer,
    is_plain,
    number,
    numbers,
    seeded,
    tensor,
    texts,
    wrong,
)
from fastldm.cancel import CancelToken
from fastldm.errors import ArgumentError, brief
from fastldm.image import MAX_SIDE, OUTPUT_TYPES
from fastldm.source import Source, read_source

Task = Literal["text_to_image", "image_to_image", "inpaint", "instruct"]
Family = Literal["sd"]


@dataclass(frozen=True)
class Defaults:
    """What a call does that does not say it."""

    steps: int = 50
    strength: float = 1.0
    guidance: float = 7.5
    image_guidance: float = 1.5


DEFAULTS: dict[tuple[Family, Task], Defaults] = {  # those of diffusers' pipelines
    ("sd", "text_to_image"): Defaults(),
    ("sd", "image_to_image"): Defaults(strength=0.8),
    ("sd", "inpaint"): Defaults(),
    ("sd", "instruct"): Defaults(steps=100),
}
CALLBACK_TENSORS: dict[Task, tuple[str, ...]] = {  # what a callback may read and change
    "text_to_image": ("latents", "prompt_embeds", "negative_prompt_embeds"),
    "image_to_image": ("latents", "prompt_embeds", "negative_prompt_embeds"),
    "inpaint": ("latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"),
    "instruct": ("latents", "prompt_embeds", "image_latents"),
}


@dataclass(frozen=True)
class Geometry:
    """What a model prescribes."""

    channels: int  # of its latents
    extra_channels: int  # that its U-Net reads behind them: a mask and an image, an image, or none
    factor: int  # pixels per latent pixel, along one side
    side: int  # pixels of an image where nobody says otherwise
    window: int  # tokens of a prompt
    width: int  # of a token's embedding
    text_layers: int
    device: torch.device
    family: Family = "sd"

    @property
    def branches(self) -> int:
        """Of a call with guidance."""
        return 3 if self.task == "instruct" else 2

    @property
    def task(self) -> Task | None:
        """The one task of a U-Net with extra channels; None where it has none and serves all others."""
        return {0: None, self.channels: "instruct"}.get(self.extra_channels, "inpaint")


@dataclass(frozen=True)
class Scales:
    """How strongly a call is guided by its text, and for instruct-pix2pix by its image; a callback may change it.

    interval: from which share of the steps on, and up to which.
    """

    task: Task
    text: float
    image: float
    rescale: float
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def branches(self) -> int:
        """Of the network in each row. A guidance of 1 or less is the conditional branch alone."""
        if self.text <= 1 or (self.task == "instruct" and self.image < 1):
            return 1
        return 3 if self.task == "instruct" else 2

    @property
    def weights(self) -> list[float]:
        """Of the branches: unconditional, (image,) text. arXiv 2207.12598, equation 6; 2211.09800, equation 3."""
        s, s_image = self.text, self.image
        return {1: [1.0], 2: [1 - s, s], 3: [1 - s_image, s_image - s, s]}[self.branches]


Callback = Callable[..., Any]
"""callback(pipe, index of the row, timestep, {name: tensor}) -> {name: tensor}"""


@dataclass(frozen=True)
class Words:
    """What is to be painted, in words or as embeddings (prompts, tokens, width), and what is not."""

    prompts: tuple[str, ...]  # none where there are embeddings
    negative_prompts: tuple[str, ...]  # likewise
    embeds: Tensor | None
    negative_embeds: Tensor | None
    clip_skip: int
    images_per_prompt: int

    @property
    def count(self) -> int:
        """Of the prompts."""
        return len(self.prompts) if self.embeds is None else len(self.embeds)

    @property
    def batch(self) -> int:
        return self.count * self.images_per_prompt


@dataclass(frozen=True)
class Request:
    """One call, checked. There are `batch` images: so many for each prompt, one prompt after the other."""

    task: Task
    words: Words
    height: int
    width: int
    steps: int
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    scales: Scales
    eta: float
    generator: Generators
    seeded: bool  # each image by itself: it has the noise that its seed alone would give it
    latents: Tensor | None
    source: Source | None
    masked_image_latents: Tensor | None
    output_type: str
    callback: Callback | None
    callback_tensors: tuple[str, ...]
    cancel: CancelToken

    @property
    def batch(self) -> int:
        return self.words.batch

    def begin(self, steps: int) -> int:
        """The first of `steps` steps that is run: with strength s, the last int(s · steps) are."""
        strength = 1.0 if self.source is None else self.source.strength
        if int(steps * strength) < 1:
            raise wrong("strength", strength, f"leaves none of {steps} steps")
        return steps - int(steps * strength)


def checked(geometry: Geometry, given: Arguments) -> Request:
    """Raises `ArgumentError` naming the argument, its value and what it may be."""
    words = checked_words(geometry, given)
    if not isinstance(given.output_type, str) or given.output_type not in OUTPUT_TYPES:
        raise wrong("output_type", given.output_type, f"must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
    flag("return_dict", given.return_dict)
    task = _task(geometry, given)
    defaults = DEFAULTS[geometry.family, task]
    steps, timesteps, sigmas = _schedule(defaults, given)
    scales = _scales(task, defaults, given)
    check_lengths(geometry, words, guided=scales.branches > 1)
    size = pixels(geometry, given.height, given.width)
    source = _source(geometry, task, defaults, given, size)
    if source is not None:
        if len(source.pixels) not in (1, words.count):
            raise ArgumentError(f"image: {len(source.pixels)} images for {words.count} prompts", field="image")
        size = source.size
    shape = (geometry.channels, *(side // geometry.factor for side in size))
    callback, tensors = _callback(geometry, task, given)
    asked = Request(
        task=task,
        words=words,
        height=size[0],
        width=size[1],
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        scales=scales,
        eta=number("eta", given.eta, 0, 1),
        generator=_generators(geometry, given, words.batch),
        seeded=given.seed is not None,
        latents=_first_latents(given.latents, (words.batch, *shape), task, source),
        source=source,
        masked_image_latents=_masked_latents(given.masked_image_latents, geometry, shape, words.count),
        output_type=str(given.output_type),
        callback=callback,
        callback_tensors=tensors,
        cancel=_cancel(given.cancel),
    )
    if timesteps is None and sigmas is None:
        asked.begin(steps)
    return asked


# ----------------------------------------------------------------------------------------------------------- the words


def checked_words(geometry: Geometry, given: Arguments) -> Words:
    prompts, count = _prompts(geometry, given)
    images = integer("num_images_per_prompt", given.num_images_per_prompt, 1, MAX_IMAGES)
    if count * images > MAX_IMAGES:
        reason = f"{count} prompts make {count * images} images, over {MAX_IMAGES}"
        raise wrong("num_images_per_prompt", images, reason)
    negative_prompts, embeds, negative_embeds = _embeddings(geometry, given, count)
    return Words(prompts, negative_prompts, embeds, negative_embeds, _clip_skip(geometry, given), images)


def check_lengths(geometry: Geometry, words: Words, *, guided: bool) -> None:
    """A negative prompt is cut and filled to the length of the embeddings, which must be one that it can have."""
    if words.embeds is None or words.negative_embeds is not None or not guided:
        return
    if not 2 <= (length := words.embeds.shape[1]) <= geometry.window:
        reason = f"are needed in the shape of prompt_embeds: a prompt has 2 to {geometry.window} tokens, not {length}"
        raise ArgumentError(f"negative_prompt_embeds: {reason}", field="negative_prompt_embeds")


def _prompts(geometry: Geometry, given: Arguments) -> tuple[tuple[str, ...], int]:
    """The prompts, and how many there are; none where their embeddings are given."""
    embeds = given.prompt_embeds
    if embeds is None:
        prompts = texts("prompt", given.prompt)
        return prompts, len(prompts)
    if given.prompt is not None:
        raise ArgumentError("prompt_embeds: stands in place of prompt, give one of them", field="prompt_embeds")
    if not isinstance(embeds, Tensor) or embeds.is_nested or embeds.ndim != 3:
        raise _no_embedding("prompt_embeds", embeds, f"(prompts, tokens, {geometry.width})")
    count, tokens = embeds.shape[:2]
    if not (1 <= count <= MAX_IMAGES and 1 <= tokens <= MAX_TOKENS):
        raise _no_embedding("prompt_embeds", embeds, f"(1 to {MAX_IMAGES}, 1 to {MAX_TOKENS}, {geometry.width})")
    return (), count


def _no_embedding(name: str, value: object, shape: str) -> ArgumentError:
    what = f"a {type(value).__name__}"
    if isinstance(value, Tensor) and not value.is_nested:
        what = f"of shape {tuple(value.shape)}"
    return ArgumentError(f"{name}: is {what}, must be a tensor {shape}", field=name)


def _embeddings(
    geometry: Geometry, given: Arguments, count: int
) -> tuple[tuple[str, ...], Tensor | None, Tensor | None]:
    """The negative prompts, and both embeddings, as far as they are given."""
    embeds: Any = given.prompt_embeds
    length = geometry.window if embeds is None else embeds.shape[1]
    shape = (count, length, geometry.width)
    positive = tensor("prompt_embeds", embeds, shape)
    if given.negative_prompt_embeds is None:
        return _negative_prompts(given.negative_prompt, count), positive, None
    if given.negative_prompt is not None:
        reason = "stands in place of negative_prompt, give one of them"
        raise ArgumentError(f"negative_prompt_embeds: {reason}", field="negative_prompt_embeds")
    return (), positive, tensor("negative_prompt_embeds", given.negative_prompt_embeds, shape)


def _negative_prompts(value: object, count: int) -> tuple[str, ...]:
    if value is None:
        return ("",) * count
    prompts = texts("negative_prompt", value)
    if isinstance(value, str):
        return prompts * count
    if len(prompts) != count:
        raise wrong("negative_prompt", value, f"has {len(prompts)} entries for {count} prompts")
    return prompts


def _clip_skip(geometry: Geometry, given: Arguments) -> int:
    if given.clip_skip is None:
        return 0
    if given.prompt_embeds is not None:
        raise wrong("clip_skip", given.clip_skip, "prompt_embeds are not encoded any more")
    return integer("clip_skip", given.clip_skip, 0, geometry.text_layers - 1)


# --------------------------------------------------------------------------------------------------- task and schedule


def _task(geometry: Geometry, given: Arguments) -> Task:
    """What is asked for, by which images are given and what the model's input channels are for."""
    task = _known_task(geometry, given.image, given.mask_image)
    _only_with(task, ("inpaint",), given, "padding_mask_crop", "masked_image_latents")
    if flag("overlay", given.overlay):
        _only_with(task, ("inpaint",), given, "overlay")
    _only_with(task, ("image_to_image", "inpaint"), given, "strength")
    _only_with(task, ("instruct",), given, "image_guidance_scale")
    return task


def _known_task(geometry: Geometry, image: object, mask_image: object) -> Task:
    if image is None and mask_image is not None:
        raise wrong("image", None, "a mask needs the image that it is laid on")
    if geometry.task == "inpaint" and mask_image is None:
        raise wrong("mask_image", None, "this model's U-Net was trained for inpainting: it needs image and mask_image")
    if geometry.task == "instruct" and image is None:
        raise wrong("image", None, "this model's U-Net was trained to edit images: it needs one")
    if geometry.task == "instruct" and mask_image is not None:
        raise ArgumentError("mask_image: this model edits whole images and takes no mask", field="mask_image")
    if geometry.task is not None:
        return geometry.task
    if mask_image is not None:
        return "inpaint"
    return "text_to_image" if image is None else "image_to_image"


def _only_with(task: Task, tasks: tuple[Task, ...], given: Arguments, *names: str) -> None:
    for name in names:
        if getattr(given, name) is not None and task not in tasks:
            raise ArgumentError(f"{name}: belongs to {' and '.join(tasks)}, this call is {task}", field=name)


def _schedule(defaults: Defaults, given: Arguments) -> tuple[int, tuple[float, ...] | None, tuple[float, ...] | None]:
    """The number of steps, and the caller's own schedule where one is given."""
    if given.timesteps is not None and given.sigmas is not None:
        raise ArgumentError("timesteps: give timesteps or sigmas, not both", field="timesteps")
    asked = defaults.steps if given.num_inference_steps is None else given.num_inference_steps
    steps = integer("num_inference_steps", asked, 1, MAX_STEPS)
    timesteps, sigmas = numbers("timesteps", given.timesteps), numbers("sigmas", given.sigmas)
    own = timesteps if sigmas is None else sigmas
    return (steps if own is None else min(len(own), MAX_STEPS)), timesteps, sigmas


def _scales(task: Task, defaults: Defaults, given: Arguments) -> Scales:
    scale, image_scale = given.guidance_scale, given.image_guidance_scale
    return check_scales(
        Scales(
            task,
            text=defaults.guidance if scale is None else scale,  # type: ignore[arg-type]
            image=defaults.image_guidance if image_scale is None else image_scale,  # type: ignore[arg-type]
            rescale=given.guidance_rescale,  # type: ignore[arg-type]
            interval=_interval(given.guidance_interval),
        )
    )


def _interval(value: object) -> tuple[float, float]:
    if value is None:
        return 0.0, 1.0
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong("guidance_interval", value, "must be two numbers from 0 to 1, the first the smaller")
    low, high = (number("guidance_interval", share, 0, 1) for share in value)
    if not low < high:
        raise wrong("guidance_interval", value, "must be two numbers from 0 to 1, the first the smaller")
    return low, high


def check_scales(scales: Scales) -> Scales:
    """With plain floats, each in its range."""
    return replace(
        scales,
        text=number("guidance_scale", scales.text, 0, MAX_GUIDANCE),
        image=number("image_guidance_scale", scales.image, 0, MAX_GUIDANCE),
        rescale=number("guidance_rescale", scales.rescale, 0, 1),
    )


def _callback(geometry: Geometry, task: Task, given: Arguments) -> tuple[Callback | None, tuple[str, ...]]:
    """The function, and the names of the tensors that it is handed; diffusers' own callbacks say them themselves."""
    function, name = given.callback_on_step_end, "callback_on_step_end_tensor_inputs"
    if function is not None and not callable(function):
        raise wrong("callback_on_step_end", function, "must be callable")
    names: Any = getattr(function, "tensor_inputs", given.callback_on_step_end_tensor_inputs)
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise wrong(name, names, "must be a list of names")
    strange = [n for n in names if n not in CALLBACK_TENSORS[task]]
    if strange:
        choices = ", ".join(CALLBACK_TENSORS[task])
        raise ArgumentError(f"{name}: {brief(strange[0])} is none of {choices}, for {task}", field=name)
    if "masked_image_latents" in names and not geometry.extra_channels:
        raise wrong(name, names, "this model's U-Net does not read masked_image_latents")
    return function, tuple(names)


def _cancel(value: object) -> CancelToken:
    if value is None:
        return CancelToken()
    if not isinstance(value, CancelToken):
        raise wrong("cancel", value, "must be a fastldm.CancelToken")
    return value


# --------------------------------------------------------------------------------------------------- images and latents


def pixels(geometry: Geometry, height: object, width: object) -> tuple[int, int]:
    """(height, width) of an image; the model's own side where None. Raises `ArgumentError` naming the argument."""
    sides = []
    for name, value in (("height", height), ("width", width)):
        side = geometry.side if value is None else integer(name, value, geometry.factor, MAX_SIDE)
        if side % geometry.factor:
            raise wrong(name, value, f"must be a multiple of {geometry.factor}")
        sides.append(side)
    if sides[0] * sides[1] > MAX_PIXELS:
        raise wrong("height", height, f"{sides[0]}×{sides[1]} is over {MAX_PIXELS} pixels")
    return sides[0], sides[1]


def _source(
    geometry: Geometry, task: Task, defaults: Defaults, given: Arguments, size: tuple[int, int]
) -> Source | None:
    if task == "text_to_image":
        return None
    strength = number("strength", defaults.strength if given.strength is None else given.strength, 0, 1)
    if given.overlay and given.output_type == "latent":
        raise wrong("overlay", given.overlay, "needs pixels, output_type is 'latent'")
    padding = given.padding_mask_crop
    if padding is not None:
        if given.output_type != "pil":
            raise wrong("output_type", given.output_type, "must be 'pil' with padding_mask_crop")
        padding = integer("padding_mask_crop", padding, 0, MAX_SIDE)
    own_size = given.height is None and given.width is None and padding is None
    return read_source(
        geometry,
        image=given.image,
        mask_image=given.mask_image,
        strength=strength,
        size=None if own_size else size,
        padding_mask_crop=padding,
        overlay=bool(given.overlay),
    )


def _generators(geometry: Geometry, given: Arguments, batch: int) -> Generators:
    if given.seed is None:
        return generators(given.generator, batch, geometry.device)
    if given.generator is not None:
        raise ArgumentError("seed: stands in place of generator, give one of them", field="seed")
    return seeded(given.seed, batch)


def _first_latents(value: object, shape: Sequence[int], task: Task, source: Source | None) -> Tensor | None:
    if value is not None and source is not None and (task == "image_to_image" or source.strength < 1):
        raise ArgumentError("latents: the run starts from the image, with noise from `generator`", field="latents")
    found = tensor("latents", value, shape)
    if found is not None and not (most := float(found.abs().max())) <= MAX_NOISE:
        raise ArgumentError(
            f"latents: reach {most:g}, must be noise of variance 1, within ±{MAX_NOISE:g}", field="latents"
        )
    return found


def _masked_latents(value: object, geometry: Geometry, shape: Sequence[int], prompts: int) -> Tensor | None:
    if value is None:
        return None
    if geometry.task != "inpaint":
        raise ArgumentError("masked_image_latents: this model's U-Net does not read them", field="masked_image_latents")
    one_for_each = isinstance(value, Tensor) and is_plain(value) and value.shape[:1] == (prompts,)
    return tensor("masked_image_latents", value, (prompts if one_for_each else 1, *shape))
