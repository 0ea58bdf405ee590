"""Coverage-guided fuzzing of the readers of files that anyone may have written; needs `pip install atheris`.

    python -m tests.fuzz header -max_total_time=300
    python -m tests.fuzz config -max_total_time=300

From the root of the repository. What follows the target's name is libFuzzer's: `-runs=N`, `-max_len=N`, a file to run
alone. The corpus is kept in out/fuzz/<target>, begun from `seeds()`. A finding ends the run with its traceback and is
written to out/fuzz; once mended, it becomes a test.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import atheris

TARGETS = ("header", "config")
OUT = Path("out/fuzz")
AS_BYTES = 0.2  # share of the mutations that libFuzzer makes without knowing the format


def main(name: str, *options: str) -> None:
    with atheris.instrument_imports(include=["fastldm"]):
        target = importlib.import_module(f"tests.fuzz.{name}")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        made = None if rng.random() < AS_BYTES else target.mutated(data, rng)
        return atheris.Mutate(data, max_size) if made is None or len(made) > max_size else made

    corpus = OUT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    alone = [option for option in options if not option.startswith("-")]
    arguments = [f"-artifact_prefix={OUT}/{name}-", "-max_len=8192", "-timeout=10", *options]
    atheris.Setup([sys.argv[0], *arguments, *([] if alone else [str(corpus)])], target.one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [libFuzzer's options]")
    main(*sys.argv[1:])
