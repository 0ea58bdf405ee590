"""What `latency.py` measures: a model, a size, a dtype, a sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

SIZES = {"shapes": 128, "sd15": 512, "sd21": 768, "sdxl": 1024}  # the names, with the pixels of their own size
GUIDANCE = 7.5
COMPILED = "diffusers-compiled"


@dataclass(frozen=True)
class Cell:
    """model: a name of `SIZES` or a path. width, height: pixels. dtype: torch's name of it.

    whole: from the prompt to pixels, with that sampler and so many steps; else one step of the U-Net, of DDIM.
    """

    model: str
    width: int
    height: int
    dtype: str
    steps: int = 20
    batch: int = 1
    sampler: str = "euler_a"
    guidance: float = GUIDANCE
    whole: bool = True

    @property
    def branches(self) -> int:
        return 2 if self.guidance > 1 else 1


Asked = list[tuple[Cell, tuple[str, ...]]]
"""Cells, each with who stands beside fastldm."""


def usual(device: str) -> Asked:
    """What a machine is measured by when nobody says."""
    if device == "cuda":
        beside = ("diffusers", "fastldm-reference")
        return [
            (Cell("sd15", 512, 512, "float16"), beside),
            (Cell("sdxl", 1024, 1024, "float16", whole=False), beside),
            (Cell("sd15", 512, 512, "float16", whole=False), (COMPILED,)),
        ]
    shapes = Cell("shapes", 128, 128, "float32", sampler="dpmpp_2m")
    return [(cell, ("diffusers",)) for cell in (shapes, Cell("sd15", 512, 512, "bfloat16", whole=False))]


def standard() -> Asked:
    """What others publish figures of, on a GPU: their samplers, steps and batches."""
    sd15, xl = Cell("sd15", 512, 512, "float16"), Cell("sdxl", 1024, 1024, "float16", whole=False)
    step = replace(sd15, whole=False)
    cells = [
        replace(sd15, steps=30),
        replace(sd15, steps=50, sampler="plms"),
        replace(sd15, steps=4, sampler="lcm", guidance=1.0),
        replace(sd15, model="sd21", steps=1, sampler="euler", guidance=1.0),
        *(replace(step, batch=n) for n in (4, 16)),
        replace(sd15, batch=4),
        Cell("sd21", 768, 768, "float16", whole=False),
        replace(xl, batch=4),
    ]
    beside = ("diffusers", "fastldm-reference")
    first = [*((cell, beside) for cell in (step, sd15, xl)), *((cell, (COMPILED,)) for cell in (step, xl))]
    return [*first, *((cell, beside) for cell in cells), (sd15, (COMPILED,))]
