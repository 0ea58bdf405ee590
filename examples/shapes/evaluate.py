"""How well a model paints the scenes: held-out captions are painted, looked at by the judge, and counted.

    python examples/shapes/evaluate.py MODEL [--captions 500] [--steps 20] [--guidance 7.5] [--sampler dpmpp_2m]
        [--seed 0] [--batch 8] [--sheet out.png] [--json out.json] [--page page.md]
    python examples/shapes/evaluate.py guidance MODEL ...     the same at guidance 1, 3, 5, 7.5 and 15
    python examples/shapes/evaluate.py samplers MODEL ...     distances of latents to a 500-step solution, at 1 and 7.5

MODEL is a folder in diffusers' layout, or whatever else fastldm reads. Image i starts from the noise of seed + i.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from judge import PROPERTIES, Verdict, judge
from numpy.typing import NDArray
from PIL import ImageDraw
from scenes import KINDS, Scene, caption, random_scene, render
from torch import Tensor, nn
from tqdm import tqdm

import fastldm
from fastldm.sampling import SchedulerConfig, named

Images = NDArray[np.uint8]

SCENES_SEED, REFERENCE_SEED = 3_000_000, 4_000_000
CAPTIONS: Mapping[str, int] = {"report": 500, "guidance": 100, "samplers": 8}
GUIDANCE = (1.0, 3.0, 5.0, 7.5, 15.0)
SAMPLERS = ("ddim", "euler", "heun", "plms", "dpmpp_2m", "dpmpp_3m", "unipc", "deis")
SAMPLER_STEPS = (5, 10, 20, 50)
SAMPLER_GUIDANCE = (1.0, 7.5)
TRUTH, TRUTH_STEPS = "dpmpp_2m", 500
SHEET, SHEET_COLUMNS = 32, 8  # pictures in a sheet


# ------------------------------------------------------------------------------------------------------------- painting


class Case(NamedTuple):
    kind: str
    scene: Scene
    caption: str


@dataclass(frozen=True)
class Settings:
    steps: int = 20
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    seed: int = 0
    batch: int = 8


def cases(seed: int, count: int) -> list[Case]:
    """Captions whose content no training has seen, of every kind in turn."""
    made = []
    for i in range(count):
        rng, kind = np.random.default_rng((SCENES_SEED + seed, i)), KINDS[i % len(KINDS)]
        scene = random_scene(rng, kind, held_out=True)
        made.append(Case(kind, scene, caption(scene, rng)))
    return made


def paint(pipe: Any, captions: Sequence[str], how: Settings, *, scheduler: object = None, latents: bool = False) -> Any:
    """-> (N, H, W, 3) in 0..1, or latents (N, C, H, W)"""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for first in tqdm(range(0, len(captions), how.batch), unit="batch", disable=None):
        done = pipe(
            list(captions[first : first + how.batch]),
            scheduler=scheduler or how.sampler,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            seed=how.seed + first,
            output_type="latent" if latents else "np",
        )
        parts.append(done.images)
    return torch.cat(parts) if latents else np.concatenate(parts)


def in_bytes(images: NDArray[np.floating[Any]]) -> Images:
    return np.rint(images * 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- counting


class Rate(NamedTuple):
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        n, share = self.total, self.share
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def as_json(self) -> dict[str, object]:
        low, high = self.interval()
        return {"right": self.right, "of": self.total, "share": self.share, "low": low, "high": high}


def rates(judged: Sequence[tuple[str, Verdict]]) -> dict[str, dict[str, Rate]]:
    """{"all" or a kind: {a property, or "scene" for all of a scene's: its rate}}"""
    right: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for kind, verdict in judged:
        outcomes = [("scene", verdict.right), *((check.name, check.right) for check in verdict.checks)]
        for name, true in outcomes:
            for group in ("all", kind):
                total[group, name] += 1
                right[group, name] += true
    names = ("scene", *PROPERTIES)
    table = {
        group: {name: Rate(right[group, name], total[group, name]) for name in names if total[group, name]}
        for group in ("all", *KINDS)
    }
    return {group: row for group, row in table.items() if row}


# ------------------------------------------------------------------------------------------------------------- distance


class Features(nn.Module):
    """A convolutional network of fixed random weights. (N, 3, H, W) in −1..1 -> (N, 72)

    Not the judge's features: these are blind to what the judge does not look for, texture, noise and smeared edges.
    Each layer gives its channels' means, the last one's also their deviations over the picture.
    """

    def __init__(self, widths: Sequence[int] = (12, 20, 20), seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kernels, before = [], 3
        for width in widths:
            self.kernels.append(torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5)
            before = width

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
            found.append(x.mean((2, 3)))
        return torch.cat([*found, x.std((2, 3))], 1)


@torch.no_grad()
def features(images: Images) -> NDArray[np.float64]:
    network = Features()
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([network(part.float() / 127.5 - 1) for part in x.split(64)]).double().numpy()


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features (Heusel et al., arXiv 1706.08500)."""
    offset = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * values.clip(0) ** 0.5) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ second @ root).clip(0) ** 0.5
    return float(offset @ offset + np.trace(first) + np.trace(second) - 2 * mixed.sum())


def references(count: int, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features of two sets of rendered pictures: no model comes nearer to one than the other is."""
    made = []
    for seed in (REFERENCE_SEED, REFERENCE_SEED + 1):
        rngs = (np.random.default_rng((seed, i)) for i in range(count))
        scenes = [random_scene(rng, KINDS[i % len(KINDS)], held_out=True) for i, rng in enumerate(rngs)]
        made.append(features(np.stack([render(scene, side) for scene in scenes])))
    return made[0], made[1]


# -------------------------------------------------------------------------------------------------------------- reports


class Report(NamedTuple):
    rates: dict[str, dict[str, Rate]]
    frechet: float
    floor: float
    images: Images
    verdicts: list[Verdict]

    def as_json(self) -> dict[str, object]:
        rows = {group: {name: rate.as_json() for name, rate in row.items()} for group, row in self.rates.items()}
        return {"rates": rows, "frechet": self.frechet, "frechet_of_renders": self.floor}


def evaluate(pipe: Any, asked: Sequence[Case], how: Settings) -> Report:
    images = in_bytes(paint(pipe, [case.caption for case in asked], how))
    verdicts = [judge(case.caption, image) for case, image in zip(asked, images, strict=True)]
    counted = rates([(case.kind, verdict) for case, verdict in zip(asked, verdicts, strict=True)])
    first, second = references(len(asked), images.shape[1])
    return Report(counted, frechet(features(images), first), frechet(second, first), images, verdicts)


def report(pipe: Any, asked: Sequence[Case], how: Settings) -> tuple[dict[str, Any], str, list[Cell]]:
    done = evaluate(pipe, asked, how)
    rows = [[group, *(str(row.get(name, "")) for name in ("scene", *PROPERTIES))] for group, row in done.rates.items()]
    table = markdown(["of scenes", "fully right", *PROPERTIES], rows)
    distance = f"Fréchet distance to rendered pictures: {done.frechet:.4f}; of other rendered ones: {done.floor:.4f}.\n"
    cells = [Cell(*cell) for cell in zip(done.images, (case.caption for case in asked), done.verdicts, strict=True)]
    return done.as_json(), f"{table}\n{distance}", cells[:SHEET]


def guidance(pipe: Any, asked: Sequence[Case], how: Settings) -> tuple[dict[str, Any], str, list[Cell]]:
    """The sheet has a row for each caption, with a picture for each scale."""
    reports = {scale: evaluate(pipe, asked, replace(how, guidance=scale)) for scale in GUIDANCE}
    names = ("scene", "colour", "shape", "size", "relation", "count")
    rows = []
    for scale, done in reports.items():
        counted = [str(done.rates["all"].get(name, "")) for name in names]
        rows.append([f"{scale:g}", *counted, f"{done.frechet:.4f}"])
    table = markdown(["guidance", "fully right", *names[1:], "Fréchet distance"], rows)
    cells = [
        Cell(done.images[i], f"{scale:g}: {case.caption}", done.verdicts[i])
        for i, case in enumerate(asked[:SHEET_COLUMNS])
        for scale, done in reports.items()
    ]
    return {f"{scale:g}": done.as_json() for scale, done in reports.items()}, table, cells


def samplers(pipe: Any, asked: Sequence[Case], how: Settings) -> tuple[dict[str, Any], str, list[Cell]]:
    """A table of `distances` for each of `SAMPLER_GUIDANCE`, the nearest at 20 steps first."""
    figures: dict[str, Any] = {}
    tables = []
    for scale in SAMPLER_GUIDANCE:
        found = distances(pipe, [case.caption for case in asked], replace(how, guidance=scale))
        ranked = sorted(found, key=lambda name: found[name][20])
        rows = [[name, *(f"{found[name][steps]:.4f}" for steps in SAMPLER_STEPS)] for name in ranked]
        tables.append(markdown([f"guidance {scale:g}", *(f"{steps} steps" for steps in SAMPLER_STEPS)], rows))
        figures[f"{scale:g}"] = found
    return (
        {"guidance": SAMPLER_GUIDANCE, "truth": f"{TRUTH}, {TRUTH_STEPS} steps", "distances": figures},
        "\n".join(tables),
        [],
    )


def distances(pipe: Any, captions: Sequence[str], how: Settings) -> dict[str, dict[int, float]]:
    """|x − x*| / |x*| of the latents, x* the solution in 500 steps, mean over the captions. All begin at t = T."""

    def solved(name: str, steps: int) -> Tensor:
        latents = paint(pipe, captions, replace(how, steps=steps), scheduler=whole(name, pipe.scheduler), latents=True)
        return latents.double().flatten(1)

    truth = solved(TRUTH, TRUTH_STEPS)
    found: dict[str, dict[int, float]] = {}
    for name in SAMPLERS:
        errors = {steps: (solved(name, steps) - truth).norm(dim=1) / truth.norm(dim=1) for steps in SAMPLER_STEPS}
        found[name] = {steps: float(error.mean()) for steps, error in errors.items()}
    return found


def whole(name: str, base: SchedulerConfig) -> SchedulerConfig:
    """With the last timestep of the training as the first, as with all but "trailing" a few steps begin far from it."""
    return replace(named(name, base), timestep_spacing="trailing", set_alpha_to_one=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------------------------------------------------------- sheet


class Cell(NamedTuple):
    image: Images
    text: str
    verdict: Verdict


def sheet(cells: Sequence[Cell], columns: int) -> PIL.Image.Image:
    """Pictures with their captions below; what the judge found wrong in red, and a frame around it."""
    said = [[(text, "black") for text in textwrap.wrap(cell.text, 24)] for cell in cells]
    for texts, cell in zip(said, cells, strict=True):
        texts += [(text, "red") for check in cell.verdict.wrong for text in textwrap.wrap(complaint(check), 24)]
    side, line, lines = cells[0].image.shape[0], 11, max(map(len, said))
    width, height = max(side, 128) + 12, side + 12 + lines * line
    rows = -(-len(cells) // columns)
    page = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    for i, cell in enumerate(cells):
        x, y = i % columns * width + 6, i // columns * height + 6
        if not cell.verdict.right:
            draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="red", width=2)
        page.paste(PIL.Image.fromarray(cell.image), (x, y))
        for number, (text, colour) in enumerate(said[i]):
            draw.text((x, y + side + 3 + number * line), text, fill=colour, font_size=10)
    return page


def complaint(check: Any) -> str:
    found = "unclear" if check.found is None else check.found
    return f"{check.name}: {found}, not {check.asked}"


# ----------------------------------------------------------------------------------------------------------------- main

COMMANDS: Mapping[str, Callable[[Any, Sequence[Case], Settings], tuple[dict[str, Any], str, list[Cell]]]] = {
    "report": report,
    "guidance": guidance,
    "samplers": samplers,
}


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description="Measure how well a model paints the scenes of shapes.")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), default="report", help="what to measure")
    parser.add_argument("model", help="its folder")
    parser.add_argument("--captions", type=int, help=", ".join(f"{n} for {name}" for name, n in CAPTIONS.items()))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--guidance", type=float, default=default.guidance)
    parser.add_argument("--sampler", default=default.sampler)
    parser.add_argument("--seed", type=int, default=default.seed, help="of the captions and the noise")
    parser.add_argument("--batch", type=int, default=default.batch, help="pictures at once")
    parser.add_argument("--sheet", type=Path, help="a PNG file for the first pictures")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--page", type=Path, help="a page with marks of this command, between which the table goes")
    options = parser.parse_args()

    how = Settings(options.steps, options.guidance, options.sampler, options.seed, options.batch)
    try:
        pipe = fastldm.Pipeline(options.model)
        asked = cases(options.seed, options.captions or CAPTIONS[options.command])
        figures, table, cells = COMMANDS[options.command](pipe, asked, how)
    except fastldm.Error as error:
        parser.error(str(error))
    print(table, end="")
    settings = {"command": options.command, "captions": len(asked), **vars(how)}
    if options.json:
        write(options.json, json.dumps({**settings, **figures}, indent=2) + "\n")
    if options.page:
        write(options.page, rewritten(options.page.read_text(encoding="utf-8"), options.command, table))
    if options.sheet and cells:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(cells, len(GUIDANCE) if options.command == "guidance" else SHEET_COLUMNS).save(options.sheet)


def rewritten(page: str, command: str, table: str) -> str:
    """The page with `table` between the marks of a command. Raises `ValueError` where it has none."""
    begin, end = f"<!-- {command} -->\n", f"<!-- end of {command} -->"
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page has no {begin.strip()} with {end} behind it")
    return f"{before}{begin}\n{table}\n{end}{after}"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
