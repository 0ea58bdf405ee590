"""What `latency.py` measured, as text: lines on a terminal, tables of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.latency_plot import plot

MARKS = ("<!-- latency: written by benchmarks/latency.py -->\n", "<!-- end of latency -->")
PACE = ("step p50 / p90 / p99", "steps/s", "TFLOP/s")
WHOLE = ("arm", "image", "text", "denoise", "VAE", "rest", "images/s", *PACE)
STEP = ("arm", *PACE, "takes", "results differ by", "rounds", "first call", "host")
BESIDE = ("arm", "takes", "results differ by", "rounds", "first call", "new size", "cold start", "memory")
Row = Mapping[str, Any]


def shown(row: Row) -> str:
    """A row as a line or a few."""
    head = f"{title(row['cell'])}: {row['arm']}" if "arm" in row else title(row["cell"])
    if why := without(row):
        return f"{head}: {why}"
    parts: list[tuple[Sequence[str], list[str]]] = [(STEP, step_cells(row))]
    if "split" in row:
        parts = [(WHOLE, whole_cells(row)), (BESIDE, beside_cells(row))]
    lines = [head]
    for names, cells in parts:
        said = (f"{name} {value}" for name, value in zip(names[1:], cells[1:], strict=True) if value)
        lines.append(f"    {', '.join(said)}")
    if row.get("merge"):
        lines.append(f"    {merged(row['merge'])}")
    if "failed" in row:
        lines.append(f"    then {row['failed']}")
    return "\n".join(lines)


def without(row: Row) -> str | None:
    """Why there are no figures, if there are none."""
    if "runs" in row:
        return None
    words = {"absent": "not installed, ", "failed": "failed: ", "skipped": "left out: "}
    return next((f"{word}{row[key]}" for key, word in words.items() if key in row), None)


def title(cell: Row) -> str:
    size = f"{Path(cell['model']).name} {cell['width']}×{cell['height']}, {cell['dtype']}, batch {cell['batch']}"
    guided = f"guidance {cell['guidance']:g}" if cell["guidance"] > 1 else "no guidance"
    if not cell["whole"]:
        return f"{size}, {guided}, one step of the U-Net"
    return f"{size}, {guided}, {cell['sampler']}, {cell['steps']} step{'s' * (cell['steps'] > 1)}"


def whole_cells(row: Row) -> list[str]:
    split = [time(row["split"][name]) for name in ("text", "denoise", "vae", "rest")]
    return [row["arm"], time(row["median"]), *split, number(row["images_per_second"]), *_step(row)]


def beside_cells(row: Row) -> list[str]:
    other, cold = row.get("new_size"), row.get("cold", {})
    changed = f"{time(other['first'])}, then {time(other['second'])}" if other else ""
    start = time(cold["seconds"]) if "seconds" in cold else cold.get("failed", "")
    gpu = f", GPU {cold['peak_gpu_memory_gb']:.2f} GB" if "peak_gpu_memory_gb" in cold else ""
    memory = f"{cold['peak_memory_gb']:.2f} GB{gpu}" if "peak_memory_gb" in cold else ""
    return [row["arm"], *_compared(row), str(row["runs"]), time(row["first"]), changed, start, memory]


def step_cells(row: Row) -> list[str]:
    host = time(row["host"]) if row.get("host") else ""
    first = time(row["first"]) if "first" in row else ""
    return [row["arm"], *_step(row), *_compared(row), str(row["runs"]), first, host]


def _step(row: Row) -> list[str]:
    if "step" not in row:
        return ["", "", ""]
    found = " / ".join(time(row["step"][name]) for name in ("p50", "p90", "p99") if name in row["step"])
    work = f"{number(row['tflops'])}, {row['of_peak']:.0%} of a large product's"
    return [f"{found} of {row['step']['count']}", number(row["steps_per_second"]), work]


def _compared(row: Row) -> list[str]:
    if "times_as_long" not in row:
        return ["", ""]
    ratio, range_ = row["times_as_long"], ""
    if ratio["low"] != ratio["high"]:
        range_ = f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    differs = f"{row['difference']:.1e}" if "difference" in row else ""
    return [f"{ratio['median']:.2f} × fastldm's time{range_}", differs]


def merged(merge: Row) -> str:
    change = f"a change of rank {merge['rank']} added to {merge['tensors']} tensors of the attention"
    return f"{change}, the first time: {time(merge['merge'])}; taken back: {time(merge['restore'])}"


def time(seconds: float) -> str:
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def number(value: float) -> str:
    """Three digits, or what stands before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------- the page


def page(path: Path, rows: Sequence[Path]) -> None:
    """Writes what the files of rows say between the marks of a page."""
    (begin, end), text = MARKS, path.read_text(encoding="utf-8")
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{path}: there is no {begin.strip()!r} with {end!r} behind it")
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in rows]
    parts = [part for run in runs for part in section(run)]
    painted = [(name, [row for row in rows if "split" in row]) for run in runs for name, rows in groups(run["rows"])]
    if painted := [(name, rows) for name, rows in painted if rows]:
        picture = path.parent / path.stem / "latency.svg"
        plot(painted, picture)
        parts.append(f"![Where the time of an image goes]({path.stem}/{picture.name})")
    path.write_text(f"{before}{begin}\n" + "\n\n".join(parts) + f"\n\n{end}{after}", encoding="utf-8")


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Those that were measured together, with the cell's title. A cell may be there twice, beside other peers."""
    return [(name, list(found)) for name, found in groupby(rows, key=lambda row: title(row["cell"]))]


def section(result: Row) -> list[str]:
    """The tables of one run."""
    here = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    features = f", {', '.join(here['features'])}" if here["features"] else ""
    parts = [f"{here['device']}{features}, {here['threads']} threads; {versions}; commit {here['commit']}."]
    for name, rows in groups(result["rows"]):
        found, others = [row for row in rows if "runs" in row], [row for row in rows if "runs" not in row]
        parts.append(f"**{name}**")
        if found and "split" in found[0]:
            parts += [table(WHOLE, map(whole_cells, found)), table(BESIDE, map(beside_cells, found))]
        elif found:
            parts.append(table(STEP, map(step_cells, found)))
        parts += [f"{merged(row['merge'])}.".capitalize() for row in found if row.get("merge")]
        parts += [f"{row['arm']}: then {row['failed']}." for row in found if "failed" in row]
        parts += [f"{row.get('arm', 'all')}: {without(row)}." for row in others]
    return parts


def table(names: Sequence[str], lines: Any) -> str:
    rows = [list(names), ["---"] * len(names), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
