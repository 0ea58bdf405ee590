"""What surrounds a call: pickling, autocast, exceptions of the caller's own, options of the bar."""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

import fastldm
from fastldm.errors import RefusedError
from tests.pipeline.pairs import Pair, paint

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt"}


def test_a_pickled_pipeline_works_in_the_process_that_reads_it(pair: Callable[..., Pair], tmp_path: Path) -> None:
    fast, file = pair().fast, tmp_path / "pipe.pickle"
    file.write_bytes(pickle.dumps(fast))
    code = f"""
import pickle, torch
torch.set_num_threads(1)
pipe = pickle.loads(open({str(file)!r}, "rb").read())
image = pipe("a cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(3)).images
torch.save(image, {str(tmp_path / "image.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "image.pt"), paint(fast, **CALL))


def test_autocast_around_a_call_changes_nothing(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    plain = paint(fast, **CALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(paint(fast, **CALL), plain)


def test_an_exception_that_the_caller_is_handling_keeps_its_frames(pair: Callable[..., Pair]) -> None:
    fast = pair().fast

    def handled() -> None:
        try:
            torch.nn.Linear(2, 2)(torch.zeros(3))
        except RuntimeError:
            with pytest.raises(fastldm.Error):
                fast("a cat", height=3)
            raise

    with pytest.raises(RuntimeError) as own:
        handled()
    assert all(frame.f_locals for frame, _ in traceback.walk_tb(own.tb))


@pytest.mark.parametrize(
    ("option", "value"), [("foo", 1), ("iterable", [1]), ("total", 3), ("file", 3), ("disable", "x"), ("ncols", "x")]
)
def test_an_option_that_the_bar_cannot_have_is_refused_at_once(
    pair: Callable[..., Pair], option: str, value: object
) -> None:
    with pytest.raises(fastldm.Error, match=option):
        pair().fast.set_progress_bar_config(**{option: value})


@pytest.mark.parametrize("name", ["_num_timesteps", "_task", "_pipeline", "scheduler", "anything"])
def test_a_callback_cannot_set_what_has_no_effect(pair: Callable[..., Pair], name: str) -> None:
    def callback(pipe: Any, *args: Any) -> Any:
        with pytest.raises(RefusedError, match=name):
            setattr(pipe, name, 3)
        return args[-1]

    pair().fast(**CALL, callback_on_step_end=callback)


def test_a_misspelt_attribute_is_refused(pair: Callable[..., Pair]) -> None:
    with pytest.raises(AttributeError, match="'scheduler'"):
        pair().fast.schedular = "euler"


def test_from_pipe_takes_samplers_by_name_and_no_other_model(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    other = fastldm.Pipeline.from_pipe(fast, scheduler="euler")
    assert (other.scheduler.kind, fast.scheduler.kind) == ("euler", "ddim")
    with pytest.raises(fastldm.Error) as caught:
        fastldm.Pipeline.from_pipe(fast, model=pair().folder)
    assert caught.value.field == "model"


def test_the_bar_waits_for_nobody(pair: Callable[..., Pair]) -> None:
    """tqdm's lock of the process may be held for ever by whom a signal reached in its midst."""
    fast = pair().fast
    with ThreadPoolExecutor(1) as pool, tqdm.get_lock():
        assert pool.submit(paint, fast, **CALL).result(timeout=60) is not None


def test_bars_begin_and_end_in_many_threads_beside_the_callers_own(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = pair().fast
    monkeypatch.setattr(fast, "_bar", {"file": StringIO()})

    def ours(seed: int) -> None:
        for k in range(150):
            fast.set_progress_bar_config(file=StringIO(), disable=bool((k + seed) % 2))
            with fast.progress_bar(total=2) as bar:
                bar.update()

    def theirs() -> None:
        for _ in range(150):
            tqdm(total=2, file=StringIO()).close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            for done in [*(pool.submit(ours, k) for k in range(4)), pool.submit(theirs), pool.submit(theirs)]:
                done.result(timeout=60)
    finally:
        sys.setswitchinterval(interval)


def test_a_bar_is_drawn_below_those_that_are_there(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = pair().fast
    monkeypatch.setattr(fast, "_bar", {"file": StringIO(), "disable": False})
    with tqdm(total=1, file=StringIO()), fast.progress_bar(total=1) as first, fast.progress_bar(total=1) as second:
        assert (first.pos, second.pos) == (1, 2)
    with fast.progress_bar(total=1) as alone:
        assert alone.pos == 0
