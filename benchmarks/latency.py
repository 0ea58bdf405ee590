"""From a prompt to pixels, and a denoising step: fastldm beside its peers, on whatever this machine is.

    python benchmarks/latency.py                       # what this machine can do in a few minutes
    python benchmarks/latency.py --model sd15 --size 768 --steps 30 --sampler euler_a --dtype float16
    python benchmarks/latency.py --model path/to/model.safetensors --peers diffusers --json rows.json
    python benchmarks/latency.py --standard --json benchmarks/results/h200/latency.json      # what a GPU is asked for
    python benchmarks/latency.py --page docs/performance.md --rows rows.json                 # the page from the rows

A model is a folder or a file, `shapes`, which comes with fastldm, or `sd15`, `sd21` or `sdxl`: the published shape with
random weights, of SDXL the U-Net alone. All arms have the same weights and noise and are run in turn in one process,
A B A B ..., so that what a busy machine does to one it does to the others: quote the ratios of a run, never the seconds
of two runs. Everything here computes the same function up to rounding; what approximates is not measured by this.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from benchmarks import painters, random_models, steps
    from benchmarks.cells import COMPILED, GUIDANCE, SIZES, Asked, Cell, standard, usual
    from benchmarks.harness import GPU_NOW, gpu, machine, now, peak_memory, ratios, save
    from benchmarks.latency_table import page, shown
    from fastldm.assets import SHAPES
    from fastldm.errors import ArgumentError, ConfigError, Error, FileError, WeightsError
    from fastldm.weights.keymap import addresses
except ImportError as error:
    sys.exit(f"{error}: install the checkout first, with: pip install -c constraints.txt -e .[test]")

DTYPES = ("float32", "bfloat16", "float16")
RUNS, SPLITS, COLD_STARTS = 30, 5, 3
WARM_UPS = {"cpu": 0, "cuda": 3}  # rounds after the first call of each, which is timed alone
STEPS_A_ROUND = {"cpu": 1, "cuda": 10}
SHARE = 0.5  # of a cell's time for its rounds; the rest is for what is measured once
LONG = 60.0  # seconds: an arm whose first image takes as long is not asked for another size, nor in a new process
RANK = 16  # of the change to the attention's weights
US = "fastldm"
SAID = "first image: "
ASKED_WRONG = (ArgumentError, ConfigError, FileError, WeightsError)  # the model or the options, of whoever asked
Row = dict[str, Any]


@dataclass(frozen=True)
class How:
    """device: "cpu" or "cuda". backend: of fastldm. cold: whether to start new processes."""

    device: str
    backend: str
    runs: int
    cold: bool


# ---------------------------------------------------------------------------------------------------- arms taking turns


def attempted(row: Row, work: Callable[[], Any]) -> Any:
    """What `work` gives; None, and the row says why, where it cannot. A peer that does not run is a row, too."""
    if "failed" in row or "absent" in row:
        return None
    if missing := painters.absent(row["arm"]):
        row["absent"] = missing
        return None
    try:
        return work()
    except Exception as problem:
        if row["arm"] == US and isinstance(problem, ASKED_WRONG):
            raise
        if row["arm"] == US:
            traceback.print_exc()
        row["failed"] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
        return None


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = now(device)
    result = work()
    return now(device) - start, result


def rounds(
    arms: Mapping[str, Callable[[], Any]], rows: Mapping[str, Row], runs: int, warm_ups: int, seconds: float
) -> dict[str, list[Any]]:
    """What each arm gives in each round, at least in one; no round begins after so many seconds."""
    found: dict[str, list[Any]] = {name: [] for name in arms}
    end = time.perf_counter() + seconds
    for i in range(warm_ups + runs):
        if i > warm_ups and time.perf_counter() > end:
            break
        for name, arm in arms.items():
            result = attempted(rows[name], arm)
            if i >= warm_ups and result is not None:
                found[name].append(result)
    return {name: results for name, results in found.items() if results and "failed" not in rows[name]}


def first_calls(
    makers: Mapping[str, Callable[[], tuple[Any, Any]]], rows: Mapping[str, Row], device: str
) -> dict[str, tuple[Any, Any]]:
    """What each maker gives: an arm, and the result of its first call. Both are timed together: some compile in it."""
    made = {}
    for name, make in makers.items():
        done = attempted(rows[name], functools.partial(timed, make, device))
        if done is not None:
            rows[name]["first"], made[name] = done
    return made


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The smallest value that at least so many percent do not exceed; what so few values can tell."""
    ordered, known = sorted(seconds), {50: 1, 90: 10, 99: 100}
    ranks = {n: -(-n * len(ordered) // 100) for n, least in known.items() if len(ordered) >= least}
    return {f"p{n}": ordered[rank - 1] for n, rank in ranks.items()}


def step_rates(seconds: Sequence[float], flops: float, peak: float) -> Row:
    """peak: TFLOP/s. Nothing where there is no step but the first."""
    if not seconds:
        return {}
    step = percentiles(seconds)
    tflops = flops / step["p50"] / 1e12
    return {
        "step": {**step, "count": len(seconds)},
        "steps_per_second": 1 / step["p50"],
        "tflops": tflops,
        "of_peak": tflops / peak,
    }


# ------------------------------------------------------------------------------------------------ from prompt to pixels


def whole(cell: Cell, peers: Sequence[str], how: How, folder: str, seconds: float, cold: bool) -> list[Row]:
    """A row for each arm. seconds: for its rounds. cold: whether to start new processes."""
    order, peak = painters.Order(cell, folder, how.device, how.backend), steps.peak(cell.dtype, how.device)
    rows = {name: new_row(cell, name) for name in (US, *peers)}
    made = first_calls({name: functools.partial(_painter, name, order) for name in rows}, rows, how.device)
    made_by = {name: painter for name, (painter, _) in made.items()}
    arms = {name: functools.partial(timed, functools.partial(p.paint, cell), how.device) for name, p in made_by.items()}
    times = rounds(arms, rows, how.runs, WARM_UPS[how.device], seconds)
    splitters = {name: functools.partial(made_by[name].split, cell) for name in times}
    splits = rounds(splitters, rows, SPLITS, 0, seconds / 4)
    unet = random_models.unet_config_of(cell.model)
    if unet is None and US in made_by:
        unet = made_by[US].pipe._engine.unet.config
    flops = steps.flops(unet, cell) if unet else 0.0
    for name in splits:
        spent = [each for each, _ in times[name]]
        rows[name] |= {"runs": len(spent), "seconds": spent, "median": statistics.median(spent)}
        rows[name]["images_per_second"] = cell.batch / rows[name]["median"]
        parts = [parts for parts, _ in splits[name]]
        rows[name]["split"] = {part: statistics.median(each[part] for each in parts) for part in parts[0]}
        rows[name] |= step_rates([each for _, found in splits[name] for each in found], flops, peak)
        if rows[name]["first"] < LONG:
            rows[name]["new_size"] = attempted(rows[name], functools.partial(_resized, made_by[name], cell, how.device))
    compare(rows, {name: [each for each, _ in times[name]] for name in splits})
    _differences(rows, {name: made_by[name] for name in splits}, cell)
    if US in splits:
        rows[US]["merge"] = attempted(rows[US], functools.partial(_merged, made_by[US].pipe._engine))
    for held in (made, made_by, arms, splitters):
        held.clear()  # their memory is no business of the processes that follow
    gc.collect()
    for name in splits:
        if cold and rows[name]["first"] < LONG:
            rows[name]["cold"] = _cold(name, order, COLD_STARTS if how.device == "cuda" and name == US else 1)
    return list(rows.values())


def new_row(cell: Cell, arm: str) -> Row:
    return {"cell": asdict(cell), "arm": arm}


def _painter(name: str, order: painters.Order) -> tuple[painters.Painter, Any]:
    painter = painters.PAINTERS[name](order)
    return painter, painter.paint(order.cell)


def compare(rows: Mapping[str, Row], times: Mapping[str, list[float]]) -> None:
    """How many times as long as fastldm the others take, from neighbouring runs."""
    for name in times.keys() - {US} if US in times else ():
        least = min(len(times[US]), len(times[name]))
        pairs = {each: times[each][:least] for each in (US, name)}
        rows[name]["times_as_long"] = ratios(pairs, US, name)


def _differences(rows: Mapping[str, Row], made: Mapping[str, painters.Painter], cell: Cell) -> None:
    """How far the images are from fastldm's, relative to their size."""
    if US not in made:
        return
    own = torch.as_tensor(made[US].paint(cell, output_type="np"))
    for name in made.keys() - {US}:
        other = torch.as_tensor(made[name].paint(cell, output_type="np"))
        rows[name]["difference"] = float((own - other).norm() / other.norm())


def _resized(painter: painters.Painter, cell: Cell, device: str) -> dict[str, float]:
    """The first image of another size, and the second."""
    other = replace(cell, width=cell.width * 3 // 2 // 64 * 64, height=cell.height * 3 // 2 // 64 * 64)
    first, second = (timed(lambda: painter.paint(other), device)[0] for _ in range(2))
    return {"width": other.width, "height": other.height, "first": first, "second": second}


def _merged(engine: Any) -> Row:
    """Seconds to add, the first time, a change of low rank to every product of the attention, and to take it back."""
    weights, device = engine.weights["unet"], engine.device.type
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, at in addresses(engine.unet).items():
        if ".attn" in name and name.endswith(".weight"):
            rows, columns = at.stop - at.start, engine.unet.get_parameter(at.parameter).shape[1]
            down = torch.randn(RANK, columns, device=device)
            factors[name] = 1e-3 * torch.randn(rows, RANK, device=device), down

    def merge() -> None:
        for name, (up, down) in factors.items():
            weights.merge(name, up @ down)

    merging, restoring = (timed(work, device)[0] for work in (merge, weights.restore))
    return {"tensors": len(factors), "rank": RANK, "merge": merging, "restore": restoring}


def _cold(name: str, order: painters.Order, starts: int) -> Row:
    """From the start of a process to its first image, and what memory it had taken by then."""
    words = json.dumps([name, asdict(order.cell), order.model, order.device, order.backend])
    seconds, said = [], {}
    for _ in range(starts):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--first-image", words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            late = threading.Timer(2 * LONG, process.kill)
            late.start()
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith(SAID)), None)
            seconds.append(time.perf_counter() - start)
            process.stdout.read()
        late.cancel()
        if line is None:
            return {"failed": f"exit code {process.returncode}"}
        said = json.loads(line.removeprefix(SAID))
    return {"starts": starts, "seconds": statistics.median(seconds), **said}


def first_image(words: str) -> None:
    """In a process of its own."""
    name, cell, *rest = json.loads(words)
    order = painters.Order(Cell(**cell), *rest)
    painters.PAINTERS[name](order).paint(order.cell)
    memory = {"peak_memory_gb": peak_memory()}
    if order.device == "cuda":
        memory["peak_gpu_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
    print(SAID + json.dumps(memory), flush=True)


# ---------------------------------------------------------------------------------------------------- a step of a U-Net


@torch.no_grad()
def step(cell: Cell, peers: Sequence[str], how: How, seconds: float) -> list[Row]:
    """A row for each arm. seconds: for its rounds."""
    peak = steps.peak(cell.dtype, how.device)
    job = steps.Job.random(replace(cell, sampler="ddim"), torch.device(how.device), how.backend)
    rows = {name: new_row(job.cell, name) for name in (US, *peers)}
    made = first_calls({name: functools.partial(_stepper, name, job, how.device) for name in rows}, rows, how.device)
    if how.device == "cpu":
        for name in rows.keys() - {COMPILED}:
            rows[name].pop("first", None)  # there was no step in it
    count, results = STEPS_A_ROUND[how.device], dict[str, Tensor]()
    keeping = {name: functools.partial(_keeping, results, name, arm) for name, (arm, _) in made.items()}
    arms = {name: functools.partial(steps.intervals, arm, how.device, count) for name, arm in keeping.items()}
    times = rounds(arms, rows, how.runs, WARM_UPS[how.device], seconds)
    flops = steps.flops(job.unet.config, cell)
    for name, found in times.items():
        rows[name] |= {"runs": len(found), "seconds": found} | step_rates([*chain(*found)], flops, peak)
        if name != US and US in times:
            own, other = results[US].float(), results[name].float()
            rows[name]["difference"] = float((own - other).norm() / other.norm())
    compare(rows, {name: [statistics.median(each) for each in found] for name, found in times.items()})
    if how.device == "cuda" and US in times:
        rows[US]["host"] = attempted(rows[US], functools.partial(steps.host_time, job))
    return list(rows.values())


def _stepper(name: str, job: steps.Job, device: str) -> tuple[steps.Step, object]:
    """On a GPU with a first step, in which some compile; on a CPU a step takes too long for that."""
    arm = steps.ARMS[name](job)
    return arm, arm() if device == "cuda" or name == COMPILED else None


def _keeping(results: dict[str, Tensor], name: str, arm: steps.Step) -> Tensor:
    results[name] = arm()
    return results[name]


# ------------------------------------------------------------------------------------------------------------ the cells


def measured(asked: Asked, how: How, seconds: float, keep: Path) -> Iterator[Row]:
    """The rows of all cells, each as soon as it is done. keep: for models with random weights.

    Each cell has an equal share of what is left of the time; none begins when it is over.
    """
    end, cold, lost = time.perf_counter() + seconds, how.cold, False
    for i, (cell, peers) in enumerate(asked):
        left = end - time.perf_counter()
        if left < 0 or lost:
            yield {"cell": asdict(cell), "skipped": "the GPU had failed" if lost else f"the {seconds:g} s were over"}
            continue
        share = SHARE * left / (len(asked) - i)
        if cell.whole:
            starts, cold = cold, False
            rows = whole(cell, peers, how, _folder(cell, how.device, keep), share, starts)
        else:
            rows = step(cell, peers, how, share)
        after = gpu(*GPU_NOW) if how.device == "cuda" else {}
        yield from ({**row, **({"gpu_after": after} if after else {})} for row in rows)
        # After such an error nothing that follows in this process would be true.
        lost = any(word in row.get("failed", "") for row in rows for word in ("CUDA error", "Error [CUDA]"))
        if not lost:
            _forget(how.device)


def _forget(device: str) -> None:
    """What a cell leaves: compiled code, and memory."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _folder(cell: Cell, device: str, keep: Path) -> str:
    if cell.model == "shapes":
        return str(SHAPES)
    if cell.model not in SIZES:
        return cell.model
    folder = keep / f"{cell.model}-{cell.dtype}"
    if not folder.exists():
        random_models.write(cell.model, folder, getattr(torch, cell.dtype), torch.device(device))
    return str(folder)


# ---------------------------------------------------------------------------------------------------------- the command


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From a prompt to pixels: fastldm beside its peers.")
    add = parser.add_argument
    add("--model", help=f"{', '.join(SIZES)}, a folder or a file")
    add("--size", type=_size, metavar="WxH", help="pixels, or one number for both; default: 512, or the name's own")
    add("--batch", type=_positive, help="images at once; default: 1")
    add("--steps", type=_positive, help="default: 20")
    add("--sampler", help="as `fastldm samplers` lists them; default: euler_a")
    add("--guidance", type=float, help=f"1 is without; default: {GUIDANCE:g}")
    add("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 elsewhere")
    add("--step", action="store_true", help="one step of the U-Net alone; for sdxl always")
    add("--standard", action="store_true", help="what others publish figures of, on a GPU")
    add("--peers", nargs="*", choices=[n for n in painters.PAINTERS if n != US], help="default: what suits the machine")
    add("--backend", choices=("reference", "auto", "fused"), help="of fastldm; default: auto on a GPU, else reference")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--runs", type=_positive, default=RUNS, help="timed rounds, as the time allows (default: %(default)s)")
    add("--seconds", type=float, help="about what all of it may take; default: 90 on a CPU, 500 on a GPU")
    add("--no-cold", action="store_true", help="no new processes")
    add("--keep", type=Path, help="a folder for models with random weights, to have them again")
    add("--json", type=Path, help="write the rows to this file")
    add("--page", type=Path, help="measure nothing: write --rows into this page")
    add("--rows", type=Path, nargs="+", help="what --json has written")
    add("--first-image", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str | None:
    """What is wrong with options that are each right."""
    own = ("size", "batch", "steps", "sampler", "guidance", "dtype")
    given = [name for name in own if getattr(options, name) is not None] + ["step"] * options.step
    if options.page and not options.rows:
        return "--page needs --rows"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: there is no GPU here"
    if options.standard and (options.model or options.device != "cuda"):
        return "--standard has its own models, and needs a GPU"
    if given and not options.model:
        return f"--{given[0]} needs --model"
    if options.step and options.model not in random_models.MODELS:
        return f"--step needs --model {' or '.join(random_models.MODELS)}"
    return None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    found = _positive(width), _positive(height or width)
    if any(n % 8 or n < 64 for n in found):
        raise argparse.ArgumentTypeError(f"{text}: must be multiples of 8, at least 64")
    return found


def cells_of(options: argparse.Namespace) -> Asked:
    if options.standard or options.model is None:
        asked = standard() if options.standard else usual(options.device)
    else:
        side = SIZES.get(options.model, 512)
        width, height = options.size or (side, side)
        dtype = options.dtype or ("float16" if options.device == "cuda" else "float32")
        given = {name: getattr(options, name) for name in ("steps", "batch", "sampler", "guidance")}
        cell = Cell(options.model, width, height, dtype, whole=not options.step and options.model != "sdxl")
        asked = [(replace(cell, **{k: v for k, v in given.items() if v is not None}), ("diffusers",))]
    if options.peers is None:
        return asked
    return [(cell, tuple(options.peers)) for cell in dict.fromkeys(cell for cell, _ in asked)]


def main() -> int:
    options = parsed()
    if options.first_image:
        first_image(options.first_image)
    elif options.page:
        page(options.page, options.rows)
    else:
        return run(options)
    return 0


def run(options: argparse.Namespace) -> int:
    """1 if fastldm itself failed somewhere."""
    on_gpu = options.device == "cuda"
    backend = options.backend or ("auto" if on_gpu else "reference")
    how = How(options.device, backend, options.runs, cold=not options.no_cold)
    seconds, failed = options.seconds or (500 if on_gpu else 90), False
    result: Row = {"machine": machine(how.device), "how": asdict(how), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        for row in measured(cells_of(options), how, seconds, options.keep or Path(temporary)):
            result["rows"].append(row)
            failed |= row.get("arm") == US and "failed" in row
            print(shown(row), flush=True)
            if options.json:
                save(result, options.json)  # as they come: a run that is cut short keeps what it measured
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Error as error:
        sys.exit(f"latency.py: {error}")
