"""Cancelling a call: from anywhere, at any moment, within a row, and nothing else is touched."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime.engine import Engine
from fastldm.runtime.plan import Row
from tests.pipeline import smallest
from tests.pipeline.smallest import CALL, NEXT

ROW, TEXT, DECODE = Row.compute.__code__, Engine.encode_text.__code__, AutoencoderKL.decode.__code__


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> fastldm.Pipeline:
    return smallest.make(tmp_path_factory.mktemp("smallest"))


class Events:
    """The calls of Python functions in this thread, counted; the token is cancelled at one of them."""

    def __init__(self, at: int | CodeType | None = None, token: fastldm.CancelToken | None = None) -> None:
        self.at, self.token = at, token
        self.count = 0
        self.rows_after = 0
        self.seen: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        self.count += 1
        self.seen.add(frame.f_code)
        if self.token is None:
            return
        if self.token.cancelled:
            self.rows_after += frame.f_code is ROW
        elif self.at in (self.count, frame.f_code):
            self.token.cancel()

    def watch(self, paint: Callable[[], Any]) -> Any:
        sys.setprofile(self)
        try:
            return paint()
        finally:
            sys.setprofile(None)


def test_r07_r09_at_500_random_moments_of_a_call(pipe: fastldm.Pipeline) -> None:
    """A moment is the call of one of the thousands of Python functions that a call runs through.

    Whatever it is, the call raises `Cancelled` with at most one row begun after it; only when the images are made
    already, it returns them. The next call gives its image, bit for bit.
    """
    whole = Events()
    pipe(**CALL)  # what is called once in a process
    image, after = whole.watch(lambda: pipe(**CALL)).images, pipe(**NEXT).images
    moments = np.random.default_rng(0).integers(1, whole.count + 1, size=500)
    cancelled = 0
    for moment in moments:
        token = fastldm.CancelToken()
        events = Events(int(moment), token)
        try:
            found = events.watch(lambda: pipe(**CALL, cancel=token)).images  # noqa: B023
            assert torch.equal(found, image)
            assert moment > whole.count - 40, "lost"
        except fastldm.Cancelled as error:
            cancelled += error.field == "cancel"
        assert token.cancelled
        assert events.rows_after <= 1
        assert torch.equal(pipe(**NEXT).images, after)
    assert cancelled > 450


@pytest.mark.parametrize("place", [TEXT, ROW, DECODE], ids=["text encoder", "row", "decoder"])
def test_r07_in_every_part(pipe: fastldm.Pipeline, place: CodeType) -> None:
    token = fastldm.CancelToken()
    events = Events(place, token)
    with pytest.raises(fastldm.Cancelled):
        events.watch(lambda: pipe(**CALL, cancel=token))
    assert events.rows_after == 0
    assert (DECODE in events.seen) == (place is DECODE)


def test_r07_r09_at_500_random_moments_from_another_thread(pipe: fastldm.Pipeline) -> None:
    """Four calls at once, with the same arguments. Whoever is cancelled has begun at most one row more; the others get
    their image.
    """
    image, after = pipe(**CALL).images, pipe(**NEXT).images
    rng = np.random.default_rng(0)
    delays = rng.uniform(0, 4 * duration(pipe), size=(4, 125)).tolist()

    def paints(lane: int) -> int:
        return sum(one(pipe, delay, image, after) for delay in delays[lane])

    with ThreadPoolExecutor(4) as pool:
        cancelled = sum(pool.map(paints, range(4)))
    assert cancelled  # how many depends on how busy the machine is


def one(pipe: fastldm.Pipeline, delay: float, image: Tensor, after: Tensor) -> bool:
    """Whether the call was cancelled."""
    token = fastldm.CancelToken()
    rows: list[bool] = []  # whether each ended after the token was cancelled

    def after_row(view: Any, row: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows.append(known)
        return tensors

    known = False

    def cancel() -> None:
        nonlocal known
        time.sleep(delay)
        token.cancel()
        known = True

    other = threading.Thread(target=cancel)
    other.start()
    try:
        assert torch.equal(pipe(**CALL, cancel=token, callback_on_step_end=after_row).images, image)
        cancelled = False
    except fastldm.Cancelled:
        cancelled = True
    other.join()
    assert sum(rows) <= 1
    assert torch.equal(pipe(**NEXT).images, after)
    return cancelled


def duration(pipe: fastldm.Pipeline) -> float:
    start = time.perf_counter()
    pipe(**CALL)
    return time.perf_counter() - start


@pytest.mark.parametrize("last", [0, 1, 2])
def test_r07_from_the_callback(pipe: fastldm.Pipeline, last: int) -> None:
    """After the last row, too: there is no image then, either."""
    token, rows = fastldm.CancelToken(), []

    def after_row(view: Any, row: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows.append(row)
        if row == last:
            token.cancel()
        return tensors

    with pytest.raises(fastldm.Cancelled):
        pipe(**CALL, cancel=token, callback_on_step_end=after_row)
    assert rows == list(range(last + 1))


@pytest.mark.parametrize("half", ["_moments", "_image"], ids=["encoded", "decoded"])
def test_r07_between_the_images_of_a_batch(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    """The autoencoder takes one at a time, as long as it slices; the token is cancelled in the second of three."""
    token, sizes, work = fastldm.CancelToken(), [], getattr(AutoencoderKL, half)

    def cancelling(self: AutoencoderKL, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(sizes) == 2:
            token.cancel()
        return work(self, x)

    monkeypatch.setattr(AutoencoderKL, half, cancelling)
    with pytest.raises(fastldm.Cancelled):
        pipe(**CALL | {"prompt": ["a", "b", "c"]}, image=torch.zeros(3, 3, 8, 8), cancel=token)
    assert sizes == [1, 1]


def test_r07_a_token_stays_cancelled(pipe: fastldm.Pipeline) -> None:
    """A call that is given it does not begin; but what is wrong with its arguments comes first."""
    token = fastldm.CancelToken()
    assert not token.cancelled
    token.cancel()
    token.cancel()
    assert token.cancelled
    for _ in range(3):
        events = Events()
        with pytest.raises(fastldm.Cancelled, match="token"):
            events.watch(lambda: pipe(**CALL, cancel=token))
        assert not events.seen & {TEXT, ROW, DECODE}
    with pytest.raises(fastldm.Error, match="height"):
        pipe("a", height=-1, cancel=token)


def test_r07_a_token_serves_many_calls_until_it_is_cancelled(pipe: fastldm.Pipeline) -> None:
    token = fastldm.CancelToken()
    images = [pipe(**CALL, cancel=token).images for _ in range(2)]
    assert torch.equal(*images)
    token.cancel()
    with pytest.raises(fastldm.Cancelled):
        pipe(**CALL, cancel=token)


def test_r09_one_token_stops_its_calls_and_no_other(pipe: fastldm.Pipeline) -> None:
    """Of eight calls at once, all within their second row, four share a token that is cancelled there."""
    image, token, barrier = pipe(**CALL).images, fastldm.CancelToken(), threading.Barrier(8)

    def paints(k: int) -> object:
        def after_row(view: Any, row: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if row == 1 and barrier.wait(60) == 0:
                token.cancel()
            if row == 1:
                barrier.wait(60)
            return tensors

        mine = token if k % 2 else fastldm.CancelToken()
        try:
            return pipe(**CALL, cancel=mine, callback_on_step_end=after_row).images
        except fastldm.Cancelled:
            return None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(paints, range(8)))
    for k, one_image in enumerate(found):
        assert one_image is None if k % 2 else torch.equal(one_image, image)


def test_a_token_says_what_it_is() -> None:
    token = fastldm.CancelToken()
    assert repr(token) == "CancelToken(cancelled=False)"
    token.cancel()
    assert repr(token) == "CancelToken(cancelled=True)"
