"""What is kept of a call that is over: by its exception, and by the process."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.runtime.engine import Engine
from tests.pipeline import smallest

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> fastldm.Pipeline:
    return smallest.make(tmp_path_factory.mktemp("smallest"))


class Stop(Exception):
    pass


def tensors() -> set[int]:
    """The tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules whose deprecated names answer isinstance
        return {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}


def raising(reason: BaseException) -> Callable[..., Tensors]:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        del timestep, tensors  # which are the caller's to keep
        if row == 1:
            raise reason
        return {}

    return after_row


def with_reason(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
    del timestep, tensors
    try:
        view("a", height=-1)
    except fastldm.Error as error:
        raise Stop("two errors") from error
    return {}


def cancelling(token: fastldm.CancelToken) -> Callable[..., Tensors]:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        token.cancel()
        return tensors

    return after_row


def infinite(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
    view._guidance_scale = 100.0
    return {"latents": torch.full_like(tensors["latents"], 3e38)}


def failing_calls() -> dict[str, dict[str, Any]]:
    token = fastldm.CancelToken()
    return {
        "callback": {"callback_on_step_end": raising(Stop("no"))},
        "KeyboardInterrupt": {"callback_on_step_end": raising(KeyboardInterrupt())},
        "from another": {"callback_on_step_end": with_reason},
        "cancelled": {"callback_on_step_end": cancelling(token), "cancel": token},
        "wrong answer": {"callback_on_step_end": lambda *_: None},
        "not finite": {"callback_on_step_end": infinite},
        "argument": {"height": -1},
        "argument with an image": {"strength": 2.0, "image": PIL.Image.new("RGB", (8, 8))},
    }


@pytest.mark.parametrize("name", failing_calls())
def test_r22_an_error_that_is_kept_keeps_no_tensor(pipe: fastldm.Pipeline, name: str) -> None:
    call = {"seed": 1, "num_inference_steps": 3, **failing_calls()[name]}
    before, kept = tensors(), []
    for _ in range(5):
        try:
            pipe("the red cat", **call)
        except BaseException as error:
            kept.append(error)
    assert len(kept) == 5
    assert all(error.__traceback__ is not None for error in kept)
    assert not tensors() - before


@pytest.mark.parametrize("method", ["encode_text", "decode", "encode_image"])
def test_r22_an_error_deep_inside_keeps_no_tensor(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """As a Ctrl-C in the middle of a network would be."""
    from fastldm.ops import reference

    call = {"seed": 1, "num_inference_steps": 2, **smallest.pictures("image")}
    inside = getattr(Engine, method)

    def armed(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "linear", interrupted)
            patch.setattr(reference, "conv2d", interrupted)
            return inside(*args, **options)

    def interrupted(x: Tensor, *_: Any, **__: Any) -> Tensor:
        del x
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, method, armed)
    before = tensors()
    with pytest.raises(KeyboardInterrupt) as kept:
        pipe("the red cat", **call)
    found = tensors() - before
    mine = [t for f in frames(kept.value) if f.f_code is armed.__code__ for t in f.f_locals["args"][1:]]
    assert found <= {id(t) for t in mine} | {id(t._base) for t in mine}  # what this test's own function was handed


def frames(error: BaseException) -> Iterator[Any]:
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def test_r23_200_images_leave_nothing_behind(pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds, a fifth of them cancelled or failing."""
    smallest.quick(monkeypatch)

    def paint(k: int) -> None:
        token = fastldm.CancelToken()
        more: dict[str, Any] = [
            {},
            smallest.pictures("image"),
            smallest.pictures("inpaint"),
            {"callback_on_step_end": cancelling(token), "cancel": token},
            {"callback_on_step_end": raising(Stop()), "num_images_per_prompt": 2},
        ][k % 5]
        with suppress(fastldm.Cancelled, Stop):
            pipe("the red cat", num_inference_steps=2, seed=k, scheduler=["ddim", "euler_a"][k % 2], **more)

    def alive() -> tuple[int, int]:
        return len(tensors()), len(gc.get_objects())

    for k in range(20):
        paint(k)
    before = alive()
    for k in range(200):
        paint(k)
    after = alive()
    assert after[0] == before[0]
    assert after[1] - before[1] < 40  # one object for each failing call would be 80
