"""Which implementation computes each op of a model at a size, and why; nothing is computed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch

from fastldm import ops
from fastldm.ops.auto import rehearsal
from fastldm.runtime.engine import Engine
from fastldm.runtime.plan import Shape
from fastldm.runtime.rehearse import PARTS, Networks, parts


@dataclass(frozen=True)
class Explained:
    """part: "text" (the context too), "steps" (once for all), "row" (of the sampler) or "decode".

    calls: how many a part has of these.
    """

    part: str
    op: str
    calls: int
    what: str
    by: str
    why: str


@torch.no_grad()
def explained(engine: Engine, shape: Shape, branches: int, device: str) -> Iterator[Explained]:
    """shape: of the latents. device: "cpu" or "cuda", which need not be there."""
    for part, run in parts(Networks.of(engine), shape, branches).items():
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
