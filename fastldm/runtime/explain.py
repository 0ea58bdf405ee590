"""Which implementation computes each op of a model at a size, and why; nothing is computed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

import torch

from fastldm import ops
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.ops.auto import rehearsal
from fastldm.runtime.engine import Engine
from fastldm.runtime.plan import Plan, Shape
from fastldm.weights.load import skeleton

STEPS = 20  # for which the timesteps are embedded; of no influence on who does it


PARTS = ("text", "steps", "row", "decode")


@dataclass(frozen=True)
class Explained:
    """part: "text", "steps" (once for all), "row" (of the sampler) or "decode". calls: how many a part has of these."""

    part: str
    op: str
    calls: int
    what: str
    by: str
    why: str


@torch.no_grad()
def explained(engine: Engine, shape: Shape, device: str) -> Iterator[Explained]:
    """shape: of the latents. device: "cpu" or "cuda", which need not be there."""
    for part, run in _parts(engine, shape).items():
        with ops.using("auto"), rehearsal(device) as choices:
            run()
        for choice, calls in Counter(choices).items():
            yield Explained(part, choice.op, calls, choice.what, choice.by, choice.why)


def table(rows: Sequence[Explained]) -> str:
    """Aligned columns, those that a part has most of first."""
    ordered = sorted(rows, key=lambda row: (PARTS.index(row.part), -row.calls))
    lines = [("part", "op", "calls", "for", "by", "because"), *(tuple(map(str, astuple(row))) for row in ordered)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _parts(engine: Engine, shape: Shape) -> dict[str, Callable[[], object]]:
    """What a call does, on tensors without memory."""
    unet = skeleton(lambda: UNet(engine.unet.config)).to(engine.dtype)
    vae = skeleton(lambda: AutoencoderKL(engine.vae.config)).to(engine.vae.decoder.conv_in.weight.dtype)
    text = skeleton(lambda: TextEncoder(engine.text_encoder.config)).to(engine.dtype)
    for network in (unet, vae):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan(unet, shape)

    def new(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    ids = new(shape.branches * shape.batch, shape.length, dtype=torch.int64)
    timesteps = new(STEPS, dtype=ops.compute_dtype(engine.dtype))
    weight = vae.decoder.conv_in.weight
    latents = new(shape.batch, weight.shape[1], shape.height, shape.width, dtype=weight.dtype)
    latents = latents.to(memory_format=torch.channels_last)
    return {
        "text": lambda: text(ids),
        "steps": lambda: unet.modulation(timesteps),
        "row": plan.replay,
        "decode": lambda: vae.decode(latents),
    }
