"""The tables of bad input: the rule gives each outcome its class, and a sample of the cases ends well with fastldm."""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks import faults
from benchmarks.argument_bench import USUAL, ArgumentBench
from benchmarks.argument_cases import ARGUMENTS, Call
from benchmarks.damage import CHECKPOINT, UNET, nothing
from benchmarks.fault_cases import FILES, Case
from benchmarks.faults import SECTIONS, FileBench, rewritten, summary, table
from benchmarks.outcomes import GOOD, AnyCase, Ending, Row, ending, row

IMAGE = "the right image"
REFUSE = Case("F01", "a cut file", UNET, nothing, ("truncated", "incomplete"))
SAME = Case("F19", "a file rewritten later", UNET, nothing, right="same")
SAMPLE = random.Random(44).sample([case for case in FILES if case.fault not in ("F04", "F40")], 25)
CALLS = random.Random(24).sample(ARGUMENTS, 15)


@pytest.fixture(scope="module")
def bench() -> Iterator[FileBench]:
    with FileBench(["fastldm"]) as made:
        yield made


@pytest.fixture(scope="module")
def calls() -> Iterator[ArgumentBench]:
    with ArgumentBench(["fastldm"]) as made:
        yield made


@pytest.mark.parametrize("case", SAMPLE, ids=[f"{case.fault} {case.name}" for case in SAMPLE])
def test_our_outcome_is_clear_or_handled(bench: FileBench, case: Case) -> None:
    found = bench.run(case, "fastldm")
    assert found.outcome in GOOD, found


@pytest.mark.parametrize("case", CALLS, ids=[f"{case.fault} {case.name}" for case in CALLS])
def test_our_outcome_of_a_call_is_clear_or_handled(calls: ArgumentBench, case: Call) -> None:
    found = calls.run(case, "fastldm")
    assert found.outcome in GOOD, found


def test_nothing_is_left_behind() -> None:
    with FileBench([]) as made:
        root = made.good.parent
        assert (made.good / CHECKPOINT).exists()
    assert not root.exists()


# ------------------------------------------------------------------------------------------------------------ the rule


def classed(case: AnyCase, attempt: Callable[[], str], **limits: float) -> Row:
    return row(case, ending(attempt, **limits), image=IMAGE, at="/tmp/x")


def failing(message: str, cause: str | None = None, context: str | None = None) -> Callable[[], str]:
    def attempt() -> NoReturn:
        if context is not None:
            try:
                raise ValueError(context)
            except ValueError:
                raise RuntimeError(message)  # noqa: B904  the case is that of an error by accident in another's handling
        raise RuntimeError(message) from (None if cause is None else ValueError(cause))

    return attempt


def test_an_image_of_a_bad_file_is_silent() -> None:
    assert classed(REFUSE, lambda: "an image").outcome == "silent"
    assert classed(REFUSE, lambda: IMAGE).outcome == "silent"


def test_the_right_image_is_handled_and_another_is_silent() -> None:
    assert classed(SAME, lambda: IMAGE).outcome == "handled"
    assert classed(SAME, lambda: "an image").outcome == "silent"


def test_an_error_is_clear_by_the_thing_and_the_reason() -> None:
    assert classed(REFUSE, failing("the UNET is Truncated")).outcome == "clear"
    assert classed(REFUSE, failing("the unet cannot be read")).outcome == "unclear"
    assert classed(REFUSE, failing("a file is truncated")).outcome == "unclear"
    assert classed(SAME, failing("the unet is truncated")).outcome == "unclear"


def test_the_folder_of_the_files_has_no_say() -> None:
    found = row(REFUSE, ending(failing("/tmp/unet/x.json is incomplete")), image=IMAGE, at="/tmp/unet")
    assert found == Row("unclear", found.seconds, "RuntimeError: x.json is incomplete")


def test_a_cause_speaks_and_what_was_being_handled_is_noted() -> None:
    assert classed(REFUSE, failing("the unet fails", cause="it is incomplete")).outcome == "clear"
    found = classed(REFUSE, failing("the unet fails", context="it is incomplete"))
    assert (found.outcome, found.in_traceback) == ("unclear", True)
    assert not classed(REFUSE, failing("the unet fails", context="somehow")).in_traceback


def test_no_end_is_a_hang() -> None:
    start = time.perf_counter()
    found = classed(REFUSE, lambda: time.sleep(60) or "", seconds=0.3)
    assert (found.outcome, found.said) == ("hang", "no end in 0.3 s")
    assert time.perf_counter() - start < 5


def test_preparing_has_no_share_in_time_or_memory() -> None:
    def prepare() -> bytes:
        time.sleep(0.5)
        return b"x" * (300 << 20)

    def attempt(made: bytes) -> str:
        time.sleep(0.05)  # long enough for its memory to be looked at
        return str(len(made))

    end = ending(attempt, prepare=prepare, seconds=0.4, memory=256 << 20)
    assert (end.result, end.stopped) == (str(300 << 20), None)
    assert 0.05 <= end.seconds < 0.4


def test_what_cannot_be_prepared_is_no_outcome() -> None:
    with pytest.raises(RuntimeError, match="RuntimeError: no model"):
        ending(lambda _: "an image", prepare=failing("no model"))


def test_unbounded_memory_is_a_hang() -> None:
    def grow() -> str:
        kept = []
        while True:
            kept.append(b"x" * (16 << 20))

    found = classed(REFUSE, grow, memory=256 << 20)
    assert (found.outcome, found.said) == ("hang", "more than 0.25 GiB of memory")


def test_a_dead_process_is_a_crash() -> None:
    aborted, left = classed(REFUSE, lambda: os.abort()), classed(REFUSE, lambda: os._exit(3))
    assert (aborted.outcome, aborted.said) == ("crash", "SIGABRT")
    assert (left.outcome, left.said) == ("crash", "exit status 3")


def test_code_that_ran_is_silent_whatever_came_of_it() -> None:
    end = ending(failing("the unet is truncated"))
    assert row(REFUSE, end, image=IMAGE, ran=True).outcome == "silent"


# ----------------------------------------------------------------------------------------------- the cases and the page


def test_the_cases_cover_every_fault_and_say_what_is_right() -> None:
    assert {case.fault for case in FILES} == {f"F{number:02}" for number in range(1, 45)}
    assert len({(case.fault, case.name) for case in FILES}) == len(FILES) >= 100
    for case in FILES:
        assert case.right in ("refuse", "same", "either")
        assert bool(case.says) == (case.right != "same"), case.name
        assert case.called


def test_the_calls_cover_every_fault_and_say_what_is_right() -> None:
    assert {case.fault for case in ARGUMENTS} == {f"A{number:02}" for number in range(1, 25)}
    assert len({(case.fault, case.name) for case in ARGUMENTS}) == len(ARGUMENTS) >= 100
    for case in ARGUMENTS:
        assert case.right in ("refuse", "accept", "either")
        assert bool(case.says) == (case.right != "accept"), case.name
        assert case.called
        assert case.like is None or case.right != "refuse", case.name


def test_a_call_is_right_by_the_image_of_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the image is the prompt."""
    monkeypatch.setattr(ArgumentBench, "_ending", lambda *args: Ending(0.1, result=args[3]["prompt"]))
    bench = object.__new__(ArgumentBench)

    def outcome(right: str, prompt: str, like: str | None = None) -> str:
        equal = None if like is None else {"prompt": like}
        case = Call("A01", "", "text_to_image", {"prompt": prompt}, ("height",), ("integer",), right, equal)
        return bench.run(case, "fastldm").outcome

    assert outcome("accept", "a cat", like="a cat") == outcome("either", "a cat", like="a cat") == "handled"
    assert outcome("accept", "a cat", like="a dog") == outcome("either", "a cat", like="a dog") == "silent"
    assert outcome("accept", f"{USUAL}a cat") == outcome("either", f"{USUAL}a cat") == "handled"
    assert outcome("accept", "(1, 32, 64, 3), finite, a cat") == "silent"
    assert outcome("accept", USUAL.replace("finite", "not finite")) == "silent"
    assert outcome("refuse", f"{USUAL}a cat") == "silent"


def test_the_page_is_rewritten_between_its_marks() -> None:
    page = "a\n<!-- files: written by benchmarks/faults.py -->\nold\n<!-- end of files -->\nb\n"
    new = rewritten(page, "files", "new")
    assert new == page.replace("old", "\nnew\n")
    assert rewritten(new, "files", "new") == new
    with pytest.raises(ValueError, match="end of files"):
        rewritten("a\n", "files", "new")


def test_the_table_has_a_line_for_each_case_and_counts_them() -> None:
    good = {"outcome": "clear", "seconds": 0.0123, "in_traceback": False}
    rows = [{"fault": "F01", "name": f"case {i}", "right": "refuse", "fastldm": good} for i in range(3)]
    rows[2]["fastldm"] = {"outcome": "hang", "seconds": 20.0, "in_traceback": False}
    text = summary(rows, ["fastldm"], p99=True) + "\n" + table(rows, ["fastldm"])
    assert "| clear | 2 |" in text
    assert "| hang | 1 |" in text
    assert "| median time to an error | 12 ms |" in text
    assert "| 99th percentile of it | 12 ms |" in text
    assert "percentile" not in summary(rows, ["fastldm"])
    assert "| F01 | case 0 | refuse | clear, 12 ms |" in text
    assert "| F01 | case 2 | refuse | **hang**, 20.0 s |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "F99"], "--only F99: no case"),
        (["--only", "F01", "--section", "arguments"], "--only F01: no case"),
        (["--section", "other"], "invalid choice"),
        (["--engine", "other"], "invalid choice"),
        (["--write", "docs/reliability.md", "--only", "F01"], "leave out --only"),
        (["--write", "no/such.md"], "is no file"),
        (["--write", "README.md"], "end of files"),
        (["--json", "no/such/row.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_said_before_any_work(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults.py", *arguments])
    monkeypatch.setattr(faults, "measured", lambda *_: pytest.fail("cases were run"))
    with pytest.raises(SystemExit) as caught:
        faults.main()
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_page_stands_in_the_docs_with_its_marks() -> None:
    page = (Path(faults.__file__).parent.parent / "docs/reliability.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert rewritten(page, name, "x") != page


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_names_the_tests_of_every_fault() -> None:
    """The numbers of the faults are in the names of the tests: f21, or f03_to_f16 for all between; a06 of arguments."""
    tests = Path(__file__).parent
    named: dict[str, set[str]] = {}
    for path in tests.rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found = re.findall(r"(?<=_)([af])(\d\d)(?=_|$)", name)
            numbers = [int(n) for _, n in found]
            for n in range(numbers[0], numbers[1] + 1) if "_to_" in name and len(numbers) == 2 else numbers:
                named.setdefault(f"{found[0][0].upper()}{n:02}", set()).add(str(path.relative_to(tests)))
    page = (tests.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([AF]\d\d) \|.*\| (`.*`) \|$", page, re.MULTILINE)
    assert {fault: set(re.findall(r"`([^`]+)`", files)) for fault, files in rows} == named
    assert sorted(named) == [f"A{n:02}" for n in range(1, 25)] + [f"F{n:02}" for n in range(1, 45)]
