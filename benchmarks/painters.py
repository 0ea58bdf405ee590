"""The same prompt painted by fastldm and by its peers, from the same weights, with the time of each stage.

`PAINTERS["diffusers"](order).paint(cell)`; what one needs that is not installed says `absent("diffusers")`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastldm
from benchmarks.cells import COMPILED, Cell
from benchmarks.harness import between, mark, now, synchronize
from fastldm.sampling import scheduler_config
from fastldm.sampling.config import CLASSES
from fastldm.sampling.names import named

PROMPT = "a large green triangle above a small yellow circle"
SEED = 0
NEEDS = dict.fromkeys(("diffusers", COMPILED), ("diffusers", "transformers", "importlib_metadata"))
Stages = Mapping[str, tuple[object, str]]


@dataclass(frozen=True)
class Order:
    """A cell, where its model is, and where it is painted. backend: of fastldm."""

    cell: Cell
    model: str
    device: str
    backend: str


class Painter:
    """A pipeline. stages: (object, method) of what `split` times, "text" and "vae"."""

    def __init__(self, pipe: Any, stages: Stages, device: str) -> None:
        self.pipe, self.device, self._stages = pipe, device, stages
        pipe.set_progress_bar_config(disable=True)

    def paint(self, cell: Cell, *, output_type: str = "pil", at_step: Callable[[], None] | None = None) -> Any:
        """The images, all there. at_step: called after each step."""

        def stepped(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            assert at_step is not None
            at_step()
            return {}

        found = self.pipe(
            PROMPT,
            width=cell.width,
            height=cell.height,
            num_inference_steps=cell.steps,
            num_images_per_prompt=cell.batch,
            guidance_scale=cell.guidance,
            generator=torch.Generator().manual_seed(SEED),
            output_type=output_type,
            callback_on_step_end=None if at_step is None else stepped,
            callback_on_step_end_tensor_inputs=[],
        ).images
        synchronize(self.device)
        return found

    def split(self, cell: Cell) -> tuple[dict[str, float], list[float]]:
        """Seconds of text, denoise, vae and rest, which is all else; and of each step but the first."""
        marks: list[Any] = []
        with self._timed() as spans:
            start = now(self.device)
            self.paint(cell, at_step=lambda: marks.append(mark(self.device)))
            total = now(self.device) - start
        text, vae = (sum(end - begin for begin, end in spans[name]) for name in ("text", "vae"))
        denoise = spans["vae"][0][0] - spans["text"][-1][1]
        parts = {"text": text, "denoise": denoise, "vae": vae, "rest": total - text - denoise - vae}
        return parts, [between(a, b) for a, b in pairwise(marks)]

    @contextmanager
    def _timed(self) -> Iterator[dict[str, list[tuple[float, float]]]]:
        spans: dict[str, list[tuple[float, float]]] = {name: [] for name in self._stages}
        with ExitStack() as replaced:
            for name, (owner, method) in self._stages.items():
                timed = _timing(getattr(owner, method), spans[name], self.device)
                # In the instance's own dictionary, past what a frozen class or a module does with attributes.
                replaced.enter_context(mock.patch.dict(vars(owner), {method: timed}))
            yield spans


def _timing(function: Callable[..., Any], spans: list[tuple[float, float]], device: str) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        start = now(device)
        result = function(*arguments, **options)
        spans.append((start, now(device)))
        return result

    return timed


# ----------------------------------------------------------------------------------------------------------- who paints


def ours(order: Order) -> Painter:
    return _ours(order, order.backend)


def reference(order: Order) -> Painter:
    """fastldm's plain PyTorch, eager."""
    return _ours(order, "reference")


def _ours(order: Order, backend: str) -> Painter:
    pipe = fastldm.Pipeline(
        order.model,
        torch_dtype=getattr(torch, order.cell.dtype),
        device=order.device,
        scheduler=order.cell.sampler,
        backend=backend,
    )
    engine = pipe._engine
    return Painter(pipe, {"text": (engine, "encode_text"), "vae": (engine, "decode")}, order.device)


def diffusers_eager(order: Order) -> Painter:
    return _peer(_diffusers(order), order.device)


def diffusers_compiled(order: Order) -> Painter:
    """As its own guide to speed has it."""
    pipe = _diffusers(order)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.fuse_qkv_projections()
    pipe.unet = compiled(pipe.unet)
    pipe.vae.decode = compiled(pipe.vae.decode)
    return _peer(pipe, order.device)


def compiled(function: Any) -> Any:
    """For one size, as fast as it gets."""
    return torch.compile(function, mode="max-autotune", fullgraph=True, dynamic=False)


def _peer(pipe: Any, device: str) -> Painter:
    return Painter(pipe, {"text": (pipe.text_encoder, "forward"), "vae": (pipe.vae, "decode")}, device)


def _diffusers(order: Order) -> Any:
    diffusers = quiet_diffusers()
    options = {"torch_dtype": getattr(torch, order.cell.dtype), "safety_checker": None}
    if Path(order.model).is_file():
        pipe = diffusers.StableDiffusionPipeline.from_single_file(order.model, **options)
    else:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(order.model, **options)
    chosen = named(order.cell.sampler, scheduler_config(dict(pipe.scheduler.config)))
    cls = next(hub for hub, (kind, _) in CLASSES.items() if kind == chosen.kind)
    pipe.scheduler = getattr(diffusers, cls).from_config(dict(chosen.config))
    return pipe.to(order.device)


def quiet_diffusers() -> Any:
    """The library; from then on it says only what is wrong, so that the table can be read."""
    warnings.filterwarnings("ignore", module="diffusers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


PAINTERS: Mapping[str, Callable[[Order], Painter]] = {
    "fastldm": ours,
    "fastldm-reference": reference,
    "diffusers": diffusers_eager,
    COMPILED: diffusers_compiled,
}


def absent(name: str) -> str | None:
    """How to install what a painter lacks; None where it is there."""
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    return f"pip install {' '.join(missing)}" if missing else None
