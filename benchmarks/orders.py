"""How the error falls with the number of steps, on Gaussian data: the table and the plot of docs/samplers.md.

    python -m benchmarks.orders

prints the table and writes docs/samplers.svg. NumPy alone; a few seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fastldm.sampling import SamplerTable, sampler_table, scheduler_config
from tests.sampling.test_orders import FINE, errors, local_error

PLOT = Path(__file__).resolve().parent.parent / "docs" / "samplers.svg"
HIGH, LOW = 3.0, 0.15  # of σ / α: exact down to the first, the error counts at the second
STEPS = (24, 48, 96, 192, 384)  # between the two; multiples of 6 end the cycles of singlestep solvers
# A schedule on which 2.5 n steps equidistant in log σ are n above HIGH, n from there to LOW, and the rest.
BAR = 1 / (1 + np.geomspace(LOW * (LOW / HIGH) ** 0.5, HIGH**2 / LOW, 1000) ** 2)
LOG = {"trained_betas": [float(b) for b in 1 - BAR / np.append(1.0, BAR[:-1])], "use_exponential_sigmas": True}
LOCAL = {"use_exponential_sigmas": True, "beta_start": 0.00085, "beta_end": 0.012}
NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
# label, class, what differs from its defaults, steps in a cycle
LINES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("DDIM", "DDIMScheduler", {**FINE, "clip_sample": False}, 1),
    ("PLMS", "PNDMScheduler", {**FINE, "skip_prk_steps": True}, 1),
    ("Euler", "EulerDiscreteScheduler", {}, 1),
    ("Heun", "HeunDiscreteScheduler", {}, 1),
    ("DPM2", "KDPM2DiscreteScheduler", {}, 1),
    ("LMS", "LMSDiscreteScheduler", {}, 1),
    ("DPM-Solver 2M", "DPMSolverMultistepScheduler", NOISE, 1),
    ("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", {}, 1),
    ("DPM-Solver++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}, 1),
    ("DPM-Solver++ 2S", "DPMSolverSinglestepScheduler", {}, 2),
    ("DPM-Solver++ 3S", "DPMSolverSinglestepScheduler", {"solver_order": 3}, 3),
    ("UniPC-2", "UniPCMultistepScheduler", {}, 1),
    ("UniPC-3", "UniPCMultistepScheduler", {"solver_order": 3}, 1),
    ("DEIS-2", "DEISMultistepScheduler", {}, 1),
    ("DEIS-3", "DEISMultistepScheduler", {"solver_order": 3}, 1),
    ("Flow Euler", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    ("Flow Heun", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 1),
)
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")


def global_error(name: str, config: dict[str, Any], steps: int) -> tuple[int, float]:
    """The relative error at LOW after (about) `steps` steps from HIGH with exact history, and how many they were."""

    def table(count: int) -> SamplerTable:
        return sampler_table(scheduler_config({"_class_name": name, **config}), count)

    def inside(ratio: np.ndarray) -> np.ndarray:
        return np.flatnonzero((ratio <= HIGH * 1.001) & (ratio >= LOW * 0.999))

    log = "trained_betas" in config
    total = 5 * steps // 2 + 1 if log else round(steps * 100 / len(inside(errors(name, table(100))[0])))
    made = table(total)
    ratio, _ = errors(name, made)
    points = inside(ratio)
    _, found = errors(name, made, float(ratio[points[0]]))
    return len(points) - 1, float(found[points[-1] - 1])


def svg(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Log-log lines on white, so that they can be read on dark pages, too."""
    left, top, width, height, decades = 62, 16, 500, 560, (-10, 0)

    def at(n: float, e: float) -> str:
        x = left + width * math.log(n / 20, 480 / 20)
        return f"{x:.1f},{top + height * (decades[1] - math.log10(e)) / (decades[1] - decades[0]):.1f}"

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 630" font-family="sans-serif" font-size="13">',
        '<rect width="760" height="630" fill="white"/>',
        f'<clipPath id="in"><rect x="{left}" y="{top}" width="{width}" height="{height}"/></clipPath>',
    ]
    for k in range(decades[0], decades[1] + 1):
        y = float(at(20, 10.0**k).split(",")[1])
        out.append(f'<path d="M{left},{y}h{width}" stroke="#ddd"/>' + text(54, y + 4, f"1e{k}", 'text-anchor="end"'))
    for n in STEPS:
        x = float(at(n, 1).split(",")[0])
        out.append(f'<path d="M{x},{top}v{height}" stroke="#ddd"/>' + text(x, 594, str(n), 'text-anchor="middle"'))
    out.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#333"/>')
    out.append(text(left + width / 2, 616, "steps from σ/α = 3 to 0.15", 'text-anchor="middle"'))
    out.append(text(-296, 14, "relative error at 0.15", 'text-anchor="middle" transform="rotate(-90)"'))
    for p in (1, 2, 3):
        ends = [at(n, 0.5 * (20 / n) ** p) for n in (20, 480)]
        out.append(f'<path clip-path="url(#in)" d="M{ends[0]}L{ends[1]}" stroke="#999" stroke-dasharray="3 5"/>')
        x, y = map(float, at(440, 0.5 * (20 / 440) ** p).split(","))
        out.append(text(x, y - 6, f"slope {p}", 'text-anchor="end" fill="#666" font-style="italic"'))
    for i, (label, line) in enumerate(curves.items()):
        dash = ("", 'stroke-dasharray="7 3"')[i // len(COLOURS)]
        y, style = 30 + 24 * i, f'fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" {dash}'
        out.append(f'<path clip-path="url(#in)" d="M{"L".join(at(n, e) for n, e in line)}" {style}/>')
        out.append(f'<path d="M576,{y}h30" {style}/>' + text(614, y + 4, label))
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    curves = {}
    print(f"| sampler | local slope | {STEPS[0]} steps | {' | '.join(map(str, STEPS[1:]))} | global slope |")
    print("|---" * 8 + "|")
    for label, name, config, phase in LINES:
        discrete = name.startswith("Flow") or "num_train_timesteps" in config
        local = [local_error(name, config if discrete else {**LOCAL, **config}, n, phase) for n in (100, 300)]
        line = curves[label] = [global_error(name, config if discrete else {**LOG, **config}, n) for n in STEPS]
        slope = math.log(line[2][1] / line[4][1], line[4][0] / line[2][0])
        cells = " | ".join(f"{e:.1e}" for _, e in line)
        print(f"| {label} | {math.log(local[0] / local[1], 3):.2f} | {cells} | {slope:.2f} |")
    PLOT.write_text(svg(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
