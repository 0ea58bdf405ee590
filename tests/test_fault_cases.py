"""The table of bad files: its rule gives each outcome its class, and a sample of its cases ends well with fastldm."""

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
from benchmarks.damage import CHECKPOINT, UNET, nothing
from benchmarks.fault_cases import FILES, Case
from benchmarks.faults import Bench, Row, ending, markdown, rewritten, row

IMAGE = "the right image"
REFUSE = Case("F01", "a cut file", UNET, nothing, ("truncated", "incomplete"))
SAME = Case("F19", "a file rewritten later", UNET, nothing, right="same")
SAMPLE = random.Random(44).sample([case for case in FILES if case.fault not in ("F04", "F40")], 25)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(["fastldm"]) as made:
        yield made


@pytest.mark.parametrize("case", SAMPLE, ids=[f"{case.fault} {case.name}" for case in SAMPLE])
def test_our_outcome_is_clear_or_handled(bench: Bench, case: Case) -> None:
    found = bench.run(case, "fastldm")
    assert found.outcome in faults.GOOD, found


def test_nothing_is_left_behind() -> None:
    with Bench([]) as made:
        root = made.good.parent
        assert (made.good / CHECKPOINT).exists()
    assert not root.exists()


# ------------------------------------------------------------------------------------------------------------ the rule


def classed(case: Case, attempt: Callable[[], str], **limits: float) -> Row:
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
    text = markdown(rows, ["fastldm"])
    assert "| clear | 2 |" in text
    assert "| hang | 1 |" in text
    assert "| median time to an error | 12 ms |" in text
    assert "| F01 | case 0 | refuse | clear, 12 ms |" in text
    assert "| F01 | case 2 | refuse | **hang**, 20.0 s |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "F99"], "--only F99: no case"),
        (["--engine", "other"], "invalid choice"),
        (["--write", "docs/reliability.md", "--only", "F01"], "leave out --only"),
        (["--write", "no/such.md"], "is no file"),
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
    for section in faults.SECTIONS:
        assert rewritten(page, section.name, "x") != page


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_names_the_tests_of_every_fault() -> None:
    """The numbers of the faults are in the names of the tests: f21, or f03_to_f16 for all between."""
    tests = Path(__file__).parent
    named: dict[str, set[str]] = {}
    for path in tests.rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            numbers = [int(n) for n in re.findall(r"f(\d\d)(?=_|$)", name)]
            for n in range(numbers[0], numbers[1] + 1) if "_to_" in name and len(numbers) == 2 else numbers:
                named.setdefault(f"F{n:02}", set()).add(str(path.relative_to(tests)))
    page = (tests.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (F\d\d) \|.*\| (`.*`) \|$", page, re.MULTILINE)
    assert {fault: set(re.findall(r"`([^`]+)`", files)) for fault, files in rows} == named
    assert sorted(named) == [f"F{n:02}" for n in range(1, 45)]
