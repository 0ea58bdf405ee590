"""Calls of every kind, drawn at random, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

import fastldm
from tests.pipeline import smallest
from tests.pipeline.pairs import generators

SAMPLERS = (
    "ddim",
    "ddpm",
    "plms",
    "lms_karras",
    "euler",
    "euler_a",
    "heun",
    "dpm2_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_sde",
    "unipc",
    "deis",
    "sa_solver",
    "lcm",
)
PROMPTS = ("", "a", "the red cat", "cat " * 90, "Ünïcödé ☃", "dog, " * 12)
STEPS = (1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 8)
SIZES = (8, 12, 16, 20)
Outcome = Tensor | str
"""The images, or the name of the error and its field."""


def _off(view: Any, tensors: dict[str, Tensor]) -> None:
    view._guidance_scale = 0.0


def _more(view: Any, tensors: dict[str, Tensor]) -> None:
    view._guidance_scale = 12.0
    view._guidance_rescale = 0.3


def _brighter(view: Any, tensors: dict[str, Tensor]) -> None:
    tensors["latents"] = 1.1 * tensors["latents"]


def _backwards(view: Any, tensors: dict[str, Tensor]) -> None:
    tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(1)


def _enough(view: Any, tensors: dict[str, Tensor]) -> None:
    view._interrupt = True


def _infinite(view: Any, tensors: dict[str, Tensor]) -> None:
    tensors["latents"] = tensors["latents"] / 0


CHANGES: tuple[Callable[[Any, dict[str, Tensor]], None], ...] = (_off, _more, _brighter, _backwards, _enough, _infinite)


@dataclass(frozen=True)
class Mixed:
    """One call. change: what its callback does after the first row. cancel: the row after which its token is cancelled,
    −1 for before the call.
    """

    call: dict[str, Any]
    seed: int | list[int]
    generator: bool
    change: Callable[[Any, dict[str, Tensor]], None] | None
    cancel: int | None

    def outcome(self, pipe: Any) -> Outcome:
        token = fastldm.CancelToken()
        if self.cancel == -1:
            token.cancel()

        def after_row(view: Any, row: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if row == 0 and self.change is not None:
                self.change(view, tensors)
            if row == self.cancel:
                token.cancel()
            return tensors

        call = dict(self.call, cancel=token)
        call |= {"generator": generators(self.seed)} if self.generator else {"seed": self.seed}
        if self.change is not None or self.cancel is not None:
            names = ["latents", "prompt_embeds"]
            call |= {"callback_on_step_end": after_row, "callback_on_step_end_tensor_inputs": names}
        try:
            images = pipe(**call).images
        except fastldm.Error as error:
            return f"{type(error).__name__}, {error.field}"
        if isinstance(images, list):
            images = np.stack([np.asarray(image) for image in images])
        return torch.as_tensor(images)


def same(a: Outcome, b: Outcome) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else isinstance(a, str) and a == b


def drawn(count: int, seed: int = 0) -> list[Mixed]:
    """All name their sampler; of a batch the latents are asked for, and of one image any type."""
    rng = np.random.default_rng(seed)
    return [_drawn(rng) for _ in range(count)]


def _drawn(rng: np.random.Generator) -> Mixed:
    def one(choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    prompts, images = int(one((1, 1, 1, 2))), int(one((1, 1, 1, 2)))
    batch = prompts * images
    call: dict[str, Any] = {
        "num_inference_steps": one(STEPS),
        "scheduler": one(SAMPLERS),
        "guidance_scale": one((1.0, 3.0, 7.5)),
        "guidance_rescale": one((0.0, 0.0, 0.7)),
        "eta": one((0.0, 0.5, 1.0)),
        "num_images_per_prompt": images,
        "output_type": one(("pil", "np", "pt", "latent")) if batch == 1 else "latent",
    }
    call |= _words(rng, one, prompts) | _task(rng, one)
    if "strength" in call:
        call["num_inference_steps"] += 1  # half of one step is none
    seeds = [int(s) for s in rng.integers(2**40, size=batch)]
    return Mixed(
        call,
        seed=seeds if one((True, False)) else seeds[0],
        generator=one((True, False)),
        change=one((None, None, None, *CHANGES)),
        cancel=one((None, None, None, None, None, None, None, -1, 0, 1)),
    )


def _words(rng: np.random.Generator, one: Callable[[Any], Any], prompts: int) -> dict[str, Any]:
    if one((True, False, False, False)):
        embeds = torch.from_numpy(rng.standard_normal((2, prompts, one((5, 77, 90)), smallest.WIDTH))).float()
        return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    return {
        "prompt": [one(PROMPTS) for _ in range(prompts)],
        "negative_prompt": one((None, "the dog", "the " * 90)),
        "clip_skip": one((None, None, 1)),
    }


def _task(rng: np.random.Generator, one: Callable[[Any], Any]) -> dict[str, Any]:
    """Text to image, image to image, or inpainting."""
    task = one(("text", "text", "text", "image", "inpaint"))
    if task == "text":
        return {"height": one(SIZES), "width": one(SIZES)}
    pixels = rng.integers(0, 256, (one(SIZES), one(SIZES), 4), dtype=np.uint8)
    found = {"image": PIL.Image.fromarray(pixels[..., :3]), "strength": one((0.5, 0.8, 1.0))}
    if task == "inpaint":
        found["mask_image"] = PIL.Image.fromarray(pixels[..., 3])
    return found
