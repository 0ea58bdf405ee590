"""What becomes of bad input: fastldm beside diffusers, each outcome decided by a rule.

    python benchmarks/faults.py                                    # all cases, both engines: the tables, some minutes
    python benchmarks/faults.py --section arguments                # one table
    python benchmarks/faults.py --engine fastldm --only F25        # the cases of a fault, or with that in their names
    python benchmarks/faults.py --section files --json row.json --write docs/reliability.md

Files: each case of `fault_cases.py` damages a fresh copy of a tiny model. Each engine opens it in a process of its own
and paints two steps. Arguments: each case of `argument_cases.py` is one call of a tiny model that is loaded already,
in a process of its own. Threads: each trial of `thread_cases.py` uses a loaded model as programs do, with many calls at
once, cancelled or disturbed. The outcome is one of

- handled: the right image, bit for bit, where there is one;
- clear: an error whose message says what is wrong (the file, component, key, tensor or argument) and why: it has one of
  the case's names and one of its words, in any case of letters. The message is the text of the error and of those that
  it was raised from; what stands in a traceback as "during handling ..." is not;
- unclear: any other error; also one where loading or painting is right;
- silent: an image although the input is bad, another image than the right one, or code of the file that was run;
- hang: no end within 20 seconds (300 for trials of hundreds of calls), or more than 2 GiB of memory beyond what the
  process had;
- crash: the process is gone without an answer.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the libraries are imported, which takes seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
    }

import argparse
import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import fastldm
    from benchmarks import thread_cases
    from benchmarks.argument_bench import ArgumentBench
    from benchmarks.argument_cases import ARGUMENTS
    from benchmarks.damage import CANARY, CHECKPOINT, CKPT, FOLDER, copy_good, make_good, nothing
    from benchmarks.fault_cases import FILES, Case
    from benchmarks.thread_cases import RUNNING, RunningBench
except ImportError as error:
    sys.exit(f"{error}: install the checkout first, with: pip install -c constraints.txt -e .[test]")

from benchmarks.harness import machine, save
from benchmarks.outcomes import GOOD, MEMORY, OUTCOMES, SECONDS, AnyCase, Row, ending, row

FURTHER = ("safetensors", "tokenizers", "accelerate", "huggingface_hub")  # versions beside those of every benchmark


# ---------------------------------------------------------------------------------------------------------- the engines


def fastldm_pipeline(path: Path, good: Path) -> Any:
    return fastldm.Pipeline(path) if path.is_dir() else fastldm.Pipeline(path, config=good / FOLDER)


def diffusers_pipeline(path: Path, good: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    options: dict[str, Any] = {"local_files_only": True, "safety_checker": None}
    if path.is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(path, requires_safety_checker=False, **options)
    else:
        pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(good / FOLDER), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


ENGINES: dict[str, Callable[[Path, Path], Any]] = {"fastldm": fastldm_pipeline, "diffusers": diffusers_pipeline}


def painted(engine: str, case: Case, at: Path, good: Path) -> str:
    """The image's checksum."""
    with contextlib.chdir(at):  # where a canary would be
        pipe = ENGINES[engine](at / case.opens, good)
        if case.later is not None:
            case.later(at / case.file)
        generator = torch.Generator().manual_seed(1)
        images = pipe("the red cat", num_inference_steps=2, generator=generator, output_type="np").images
    return hashlib.sha256(np.asarray(images).tobytes()).hexdigest()


class FileBench:
    """The good files and their images, in a folder of its own that `close` removes."""

    def __init__(self, engines: Sequence[str]) -> None:
        self.engines = engines
        self._root = Path(tempfile.mkdtemp(prefix="fastldm-"))
        try:
            self.good = self._root / "good"
            self.good.mkdir()
            make_good(self.good)
            self._images = {(e, file): self._image(e, file) for e in engines for file in (FOLDER, CHECKPOINT, CKPT)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        shutil.rmtree(self._root)

    def __enter__(self) -> FileBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, case: Case, engine: str) -> Row:
        at = self._root / "case"
        copy_good(self.good, at, files=case.opens != FOLDER)
        try:
            case.change(at / case.file)
            end = ending(lambda: painted(engine, case, at, self.good))
            image = self._images[engine, case.file if case.opens != FOLDER and case.file != FOLDER else FOLDER]
            return row(case, end, image=image, ran=(at / CANARY).exists(), at=str(at))
        finally:
            shutil.rmtree(at)

    def _image(self, engine: str, file: str) -> str:
        """Painted in this process first, so that those to come have imported all that they need."""
        case = Case("", "", file, nothing, opens=file)
        painted(engine, case, self.good, self.good)
        end = ending(lambda: painted(engine, case, self.good, self.good))
        if end.result is None:
            raise RuntimeError(f"{engine} cannot paint the undamaged {file}: {end}")
        return end.result


# ----------------------------------------------------------------------------------------------------------- the report


Rows = Sequence[dict[str, Any]]


def summary(rows: Rows, engines: Sequence[str], *, p99: bool = False) -> str:
    lines = [f"| of {len(rows)} cases | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    counts = {engine: Counter(r[engine]["outcome"] for r in rows) for engine in engines}
    lines += [f"| {kind} | {' | '.join(str(counts[e][kind]) for e in engines)} |" for kind in OUTCOMES]
    chained = {engine: sum(r[engine]["in_traceback"] for r in rows) for engine in engines}
    times = {e: [r[e]["seconds"] for r in rows if r[e]["outcome"] in ("clear", "unclear")] for e in engines}
    lines.append(f"| unclear, but with the words in its traceback | {' | '.join(str(chained[e]) for e in engines)} |")
    lines.append(f"| median time to an error | {' | '.join(_took(times[e]) for e in engines)} |")
    if p99:
        lines.append(f"| 99th percentile of it | {' | '.join(_took(times[e], 99) for e in engines)} |")
    return "\n".join(lines)


def table(rows: Rows, engines: Sequence[str]) -> str:
    lines = [f"| fault | what is wrong | right | {' | '.join(engines)} |", "|---|---|---|" + "---|" * len(engines)]
    for r in rows:
        name = r["name"].replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| {r['fault']} | {name} | {r['right']} | {' | '.join(_cell(r[e]) for e in engines)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    word = found["outcome"]
    return f"{word if word in GOOD else f'**{word}**'}, {_took([found['seconds']])}"


def _took(times: Sequence[float], percentile: float = 50) -> str:
    if not times:
        return "none"
    seconds = float(np.percentile(times, percentile))
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.{int(seconds < 0.001)}f} ms"


@dataclass(frozen=True)
class Section:
    """One table of the page, between two marks that name it.

    bench: for the engines that are asked for, where `run(case, engine)` gives a row. summary, table: of the rows.
    """

    name: str
    cases: Sequence[AnyCase]
    bench: Callable[[Sequence[str]], AbstractContextManager[Any]]
    summary: Callable[[Rows, Sequence[str]], str] = summary
    table: Callable[[Rows, Sequence[str]], str] = table


SECTIONS = {
    section.name: section
    for section in (
        Section("files", FILES, FileBench),
        Section("arguments", ARGUMENTS, ArgumentBench, partial(summary, p99=True)),
        Section("threads", RUNNING, RunningBench, thread_cases.summary, thread_cases.table),
    )
}


def rewritten(page: str, section: str, text: str) -> str:
    """The page with `text` between the section's marks."""
    begin, end = f"<!-- {section}: written by benchmarks/faults.py -->\n", f"<!-- end of {section} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no {begin.strip()!r} with {end!r} behind it")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in FURTHER}


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of bad input: fastldm beside diffusers.")
    parser.add_argument("--section", choices=list(SECTIONS), action="append", help="repeatable (default: all)")
    parser.add_argument("--only", action="append", help="a fault (F25), or a part of the cases' names; repeatable")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="repeatable (default: both)")
    parser.add_argument("--json", type=Path, help="write all rows, with what was said, to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the page")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="write the tables into this page (docs/reliability.md)"
    )
    args = parser.parse_args()
    engines = [name for name in ENGINES if name in (args.engine or ENGINES)]
    sections = [section for name, section in SECTIONS.items() if name in (args.section or SECTIONS)]
    for word in args.only or ():
        if not any(_chosen(section.cases, [word]) for section in sections):
            names = ", ".join(f"{s.name}: {s.cases[0].fault} to {s.cases[-1].fault}" for s in sections)
            parser.error(f"--only {word}: no case has it; there are {names}, and parts of names")
    if args.write and (args.only or len(engines) < len(ENGINES)):
        parser.error("--write: the page is of all cases and both engines: leave out --only and --engine")
    if args.write and not args.write.is_file():
        parser.error(f"--write {args.write}: is no file")
    if args.write:
        try:
            for section in sections:
                rewritten(args.write.read_text(encoding="utf-8"), section.name, "")
        except ValueError as error:
            parser.error(f"--write {args.write}: {error}")
    if args.json and not args.json.absolute().parent.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder for it")
    chosen = {section.name: found for section in sections if (found := _chosen(section.cases, args.only))}
    try:
        rows = measured(chosen, engines)
    except KeyboardInterrupt:
        sys.exit("stopped; the temporary files are removed")
    report(rows, engines, args)


def _chosen(cases: Sequence[AnyCase], only: Sequence[str] | None) -> list[AnyCase]:
    return [c for c in cases if only is None or any(w == c.fault or w.lower() in c.name.lower() for w in only)]


def measured(chosen: dict[str, list[AnyCase]], engines: Sequence[str]) -> dict[str, Rows]:
    torch.set_num_threads(1)
    logging.disable()
    interrupted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)  # a fork's own handlers may swallow the exception
        raise KeyboardInterrupt

    def compared(bench: Any, case: AnyCase) -> dict[str, Any]:
        if interrupted:
            raise KeyboardInterrupt
        each = {engine: asdict(bench.run(case, engine)) for engine in engines}
        cells = "  ".join(f"{e}: {_cell(each[e]).replace('*', ''):18}" for e in engines)
        print(f"{case.fault}  {case.name[:60]:60}  {case.right:6}  {cells}", flush=True)
        return {"fault": case.fault, "name": case.name, "right": case.right, **each}

    signal.signal(signal.SIGINT, interrupt)
    found: dict[str, Rows] = {}
    for name, cases in chosen.items():
        with SECTIONS[name].bench(engines) as bench:
            found[name] = [compared(bench, case) for case in cases]
    return found


def report(found: dict[str, Rows], engines: Sequence[str], args: argparse.Namespace) -> None:
    here = machine()
    here["versions"] |= {package: version or "not installed" for package, version in versions().items()}
    page = args.write.read_text(encoding="utf-8") if args.write else ""
    for name, rows in found.items():
        head, table = SECTIONS[name].summary(rows, engines), SECTIONS[name].table(rows, engines)
        text = f"{conditions(here)}\n\n{head}\n\n{table}"
        print(f"\n{name}\n\n{text if args.markdown else head}")
        page = rewritten(page, name, text) if args.write else ""
    if args.json:
        save({"machine": here, "seconds": SECONDS, "memory": MEMORY, "sections": found}, args.json)
    if args.write:
        args.write.write_text(page, encoding="utf-8")


def conditions(here: dict[str, Any]) -> str:
    used = ", ".join(f"{package} {version}" for package, version in here["versions"].items() if package != "triton")
    return f"{here['device']}, one thread; {used}."


if __name__ == "__main__":
    main()
