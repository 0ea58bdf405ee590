"""What becomes of bad input: fastldm beside diffusers, on the same files, each outcome decided by a rule.

    python benchmarks/faults.py                                    # all cases, both engines: the table, some minutes
    python benchmarks/faults.py --engine fastldm --only F25        # the cases of a fault, or with that in their names
    python benchmarks/faults.py --json row.json --write docs/reliability.md

Each case of `fault_cases.py` damages a fresh copy of a tiny model. Each engine opens it in a process of its own and
paints two steps. The outcome is one of

- handled: the image of the undamaged model, bit for bit, where loading is right;
- clear: an error whose message says what is damaged (the file, component, key or tensor) and why: it has one of the
  case's names and one of its words, in any case of letters. The message is the text of the error and of those that it
  was raised from; what stands in a traceback as "during handling ..." is not;
- unclear: any other error; also one where loading is right;
- silent: an image although the file is bad, another image than the right one, or code of the file that was run;
- hang: no end within 20 seconds, or more than 2 GiB of memory beyond what the process had;
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
import faulthandler
import hashlib
import logging
import multiprocessing
import shutil
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import fastldm
    from benchmarks.damage import CANARY, CHECKPOINT, CKPT, FOLDER, copy_good, make_good, nothing
    from benchmarks.fault_cases import FILES, Case
except ImportError as error:
    sys.exit(f"{error}: install the checkout first, with: pip install -c constraints.txt -e .[test]")

from benchmarks.harness import machine, save

SECONDS, MEMORY = 20.0, 2 << 30
POLL = 0.01
OUTCOMES = ("handled", "clear", "unclear", "silent", "hang", "crash")
GOOD = ("handled", "clear")
LONGEST = 20_000  # characters of a message that are read
FURTHER = ("safetensors", "tokenizers", "accelerate", "huggingface_hub")  # versions beside those of every benchmark
Attempt = Callable[[], str]
"""Does something that may fail, and returns what marks the result."""


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


# ------------------------------------------------------------------------------------------------------------ a process


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. result: what it returned. message: of its error; traceback: all that a traceback shows."""

    seconds: float
    result: str | None = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    stopped: str | None = None
    died: str | None = None


def ending(attempt: Attempt, *, seconds: float = SECONDS, memory: int = MEMORY) -> Ending:
    """Runs the attempt in a process of its own, which has the modules of this one, and watches it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking: this process runs no threads of torch
        process = context.Process(target=_child, args=(attempt, theirs, seconds), daemon=True)
        start = time.perf_counter()
        process.start()
    theirs.close()
    try:
        before = _resident(process.pid)
        while not ours.poll(POLL):
            if time.perf_counter() - start > seconds:
                return Ending(seconds, stopped=f"no end in {seconds:g} s")
            if _resident(process.pid) - before > memory:
                return Ending(time.perf_counter() - start, stopped=f"more than {memory / 2**30:g} GiB of memory")
        return Ending(**ours.recv())
    except EOFError:
        process.join()
        return Ending(time.perf_counter() - start, died=_death(process.exitcode))
    finally:
        process.kill()
        process.join()
        ours.close()


def _child(attempt: Attempt, pipe: Connection, seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it, too, and ends this process
    signal.alarm(int(seconds) + 10)  # where the parent itself is gone
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        answer: dict[str, Any] = {"result": attempt()}
    except BaseException as error:
        answer = {
            "error": type(error).__name__,
            "message": "\n".join(str(e)[:LONGEST] for e in _chain(error, contexts=False)),
            "traceback": "\n".join(str(e)[:LONGEST] for e in _chain(error, contexts=True)),
        }
    pipe.send({"seconds": time.perf_counter() - start, **answer})


def _chain(error: BaseException, *, contexts: bool) -> Iterator[BaseException]:
    """The error, what it was raised from, and with `contexts` what was being handled when it was raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        shown = contexts and not found.__suppress_context__
        found = found.__cause__ or (found.__context__ if shown else None)


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _death(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


# ---------------------------------------------------------------------------------------------------------- the outcome


@dataclass(frozen=True)
class Row:
    """One case of one engine. in_traceback: an unclear error whose traceback has the words of a clear one."""

    outcome: str
    seconds: float
    said: str
    in_traceback: bool = False


def row(case: Case, end: Ending, *, image: str, ran: bool = False, at: str = "") -> Row:
    """image: the undamaged model's. ran: whether code of the file was run. at: where the files are, left out."""
    if end.died is not None:
        return Row("crash", end.seconds, end.died)
    if ran:
        return Row("silent", end.seconds, "code of the file was run")
    if end.stopped is not None:
        return Row("hang", end.seconds, end.stopped)
    if end.error is None:
        same = end.result == image
        handled = same and case.right != "refuse"
        return Row("handled" if handled else "silent", end.seconds, f"{'the same' if same else 'another'} image")
    message, traceback = (text.replace(f"{at}/", "") for text in (end.message, end.traceback))
    said = f"{end.error}: {message}"
    if says(case, message):
        return Row("clear", end.seconds, said[:400])
    return Row("unclear", end.seconds, said[:400], in_traceback=says(case, traceback))


def says(case: Case, message: str) -> bool:
    """Whether a message says what is damaged and why."""
    text = message.lower()
    return all(any(word.lower() in text for word in words) for words in (case.called, case.says))


class Bench:
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

    def __enter__(self) -> Bench:
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


@dataclass(frozen=True)
class Section:
    """One table of the page, between two marks that name it."""

    name: str
    cases: Sequence[Case]


SECTIONS = (Section("files", FILES),)


def summary(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    lines = [f"| of {len(rows)} cases | {' | '.join(engines)} |", "|---|" + "---|" * len(engines)]
    counts = {engine: Counter(r[engine]["outcome"] for r in rows) for engine in engines}
    lines += [f"| {kind} | {' | '.join(str(counts[e][kind]) for e in engines)} |" for kind in OUTCOMES]
    chained = {engine: sum(r[engine]["in_traceback"] for r in rows) for engine in engines}
    times = {e: [r[e]["seconds"] for r in rows if r[e]["outcome"] in ("clear", "unclear")] for e in engines}
    lines.append(f"| unclear, but with the words in its traceback | {' | '.join(str(chained[e]) for e in engines)} |")
    lines.append(f"| median time to an error | {' | '.join(_took(times[e]) for e in engines)} |")
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    lines = [f"| fault | what is wrong | right | {' | '.join(engines)} |", "|---|---|---|" + "---|" * len(engines)]
    for r in rows:
        name = r["name"].replace("|", "\\|").replace("<", "\\<")
        lines.append(f"| {r['fault']} | {name} | {r['right']} | {' | '.join(_cell(r[e]) for e in engines)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    word = found["outcome"]
    return f"{word if word in GOOD else f'**{word}**'}, {_took([found['seconds']])}"


def _took(times: Sequence[float]) -> str:
    if not times:
        return "none"
    seconds = statistics.median(times)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def markdown(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    return f"{summary(rows, engines)}\n\n{table(rows, engines)}"


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
    parser = argparse.ArgumentParser(description="What becomes of bad files: fastldm beside diffusers.")
    parser.add_argument("--only", action="append", help="a fault (F25), or a part of the cases' names; repeatable")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="repeatable (default: both)")
    parser.add_argument("--json", type=Path, help="write all rows, with what was said, to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the page")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="write the tables into this page (docs/reliability.md)"
    )
    args = parser.parse_args()
    engines = [name for name in ENGINES if name in (args.engine or ENGINES)]
    chosen = {section.name: _chosen(section.cases, args.only) for section in SECTIONS}
    for word in args.only or ():
        if not any(_chosen(section.cases, [word]) for section in SECTIONS):
            parser.error(f"--only {word}: no case has it; faults are F01 to F44, and names such as {FILES[0].name!r}")
    if args.write and (args.only or len(engines) < len(ENGINES)):
        parser.error("--write: the page is of all cases and both engines: leave out --only and --engine")
    if args.write and not args.write.is_file():
        parser.error(f"--write {args.write}: is no file")
    if args.json and not args.json.absolute().parent.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder for it")
    try:
        sections = measured(chosen, engines)
    except KeyboardInterrupt:
        sys.exit("stopped; the temporary files are removed")
    report(sections, engines, args)


def _chosen(cases: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    return [c for c in cases if only is None or any(w == c.fault or w.lower() in c.name.lower() for w in only)]


def measured(chosen: dict[str, list[Case]], engines: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    logging.disable()
    found: dict[str, list[dict[str, Any]]] = {}
    interrupted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)  # a fork's own handlers may swallow the exception
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    with Bench(engines) as bench:
        for section, cases in chosen.items():
            rows = found[section] = []
            for case in cases:
                if interrupted:
                    raise KeyboardInterrupt
                each = {engine: asdict(bench.run(case, engine)) for engine in engines}
                rows.append({"fault": case.fault, "name": case.name, "right": case.right, **each})
                cells = "  ".join(f"{e}: {_cell(each[e]).replace('*', ''):18}" for e in engines)
                print(f"{case.fault}  {case.name[:60]:60}  {case.right:6}  {cells}", flush=True)
    return found


def report(sections: dict[str, list[dict[str, Any]]], engines: Sequence[str], args: argparse.Namespace) -> None:
    here = machine()
    here["versions"] |= {package: version or "not installed" for package, version in versions().items()}
    texts = {name: f"{conditions(here)}\n\n{markdown(rows, engines)}" for name, rows in sections.items()}
    for name, rows in sections.items():
        print(f"\n{texts[name] if args.markdown else summary(rows, engines)}")
    if args.json:
        save({"machine": here, "seconds": SECONDS, "memory": MEMORY, "sections": sections}, args.json)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        for name, text in texts.items():
            page = rewritten(page, name, text)
        args.write.write_text(page, encoding="utf-8")


def conditions(here: dict[str, Any]) -> str:
    used = ", ".join(f"{package} {version}" for package, version in here["versions"].items() if package != "triton")
    return f"{here['device']}, one thread; {used}."


if __name__ == "__main__":
    main()
