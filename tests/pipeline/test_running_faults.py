"""What goes wrong while a call runs: the caller's function, signals, forks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.model.unet import UNet
from tests.pipeline import smallest
from tests.pipeline.smallest import CALL, NEXT

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("smallest")
    smallest.make(at)
    return at


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder)


# ----------------------------------------------------------------------------------------- R04: calls from the callback


@pytest.mark.parametrize("through", ["view", "pipeline"])
@pytest.mark.parametrize("times", [1, 20])
def test_r04_a_callback_calls_the_pipeline(pipe: fastldm.Pipeline, through: str, times: int) -> None:
    outer, inner = pipe(**CALL).images, pipe(**NEXT).images
    found: list[Tensor] = []

    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        again = view if through == "view" else pipe
        found.extend(again(**NEXT).images for _ in range(times if row == 1 else 0))
        return tensors

    assert torch.equal(pipe(**CALL, callback_on_step_end=after_row).images, outer)
    assert len(found) == times
    assert all(torch.equal(image, inner) for image in found)


def test_r04_calls_within_calls(pipe: fastldm.Pipeline) -> None:
    """Ten deep, each with guidance of its own, which its callback changes."""
    call = CALL | {"num_inference_steps": 2}

    def halved(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        view._guidance_scale /= 2
        return tensors

    def painted(depth: int) -> list[Tensor]:
        found: list[Tensor] = []

        def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
            if row == 0 and depth:
                found.extend(painted(depth - 1))
            return halved(view, row, timestep, tensors)

        return [pipe(**call, guidance_scale=9.0 + depth, callback_on_step_end=after_row).images, *found]

    alone = [pipe(**call, guidance_scale=9.0 + d, callback_on_step_end=halved).images for d in range(9, -1, -1)]
    together = painted(9)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


# ------------------------------------------------------------------------------------- R05: the callback raises or lies


class Stop(Exception):
    pass


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_karras", "euler_a"])
def test_r05_a_callback_raises_at_each_of_50_steps(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    smallest.quick(monkeypatch)
    call = CALL | {"num_inference_steps": 50, "scheduler": sampler}
    image = pipe(**call).images
    after = pipe(**NEXT).images
    for last in range(50):
        reason = Stop(last)

        def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
            if row == last:  # noqa: B023
                raise reason  # noqa: B023
            return tensors

        with pytest.raises(Stop) as caught:
            pipe(**call, callback_on_step_end=after_row)
        assert caught.value is reason
        assert torch.equal(pipe(**NEXT).images, after)
    assert torch.equal(pipe(**call).images, image)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError])
def test_r05_whatever_a_callback_raises_comes_through(pipe: fastldm.Pipeline, kind: type[BaseException]) -> None:
    reason = kind("mine")
    after = pipe(**NEXT).images

    def after_row(*_: Any) -> Tensors:
        raise reason

    with pytest.raises(kind) as caught:
        pipe(**CALL, callback_on_step_end=after_row)
    assert caught.value is reason
    assert torch.equal(pipe(**NEXT).images, after)


LATENTS = (2, 4, 4, 4)
WRONG: dict[str, object] = {
    "None": None,
    "a list": [],
    "a tensor": torch.zeros(LATENTS),
    "a tuple": ({},),
    "a name": "latents",
    "an unknown name": {"latent": torch.zeros(LATENTS)},
    "a name that is no string": {1: torch.zeros(LATENTS)},
    "a name of another task": {"image_latents": torch.zeros(LATENTS)},
    "latents: None": {"latents": None},
    "latents: a list": {"latents": [[0.0]]},
    "latents: an array": {"latents": np.zeros(LATENTS, np.float32)},
    "latents: a number": {"latents": 1.0},
    "latents: taller": {"latents": torch.zeros(2, 4, 8, 4)},
    "latents: wider": {"latents": torch.zeros(2, 4, 4, 5)},
    "latents: of one image": {"latents": torch.zeros(1, 4, 4, 4)},
    "latents: of four images": {"latents": torch.zeros(4, 4, 4, 4)},
    "latents: without the batch": {"latents": torch.zeros(4, 4, 4)},
    "latents: of one channel": {"latents": torch.zeros(2, 1, 4, 4)},
    "latents: without dimensions": {"latents": torch.zeros(())},
    "latents: empty": {"latents": torch.zeros(0, 4, 4, 4)},
    "latents: integers": {"latents": torch.zeros(LATENTS, dtype=torch.int64)},
    "latents: booleans": {"latents": torch.zeros(LATENTS, dtype=torch.bool)},
    "latents: complex": {"latents": torch.zeros(LATENTS, dtype=torch.complex64)},
    "latents: on meta": {"latents": torch.zeros(LATENTS, device="meta")},
    "latents: sparse": {"latents": torch.zeros(LATENTS).to_sparse()},
    "latents: NaN": {"latents": torch.full(LATENTS, torch.nan)},
    "latents: one infinity": {"latents": torch.zeros(LATENTS).index_put((torch.tensor(1),), torch.tensor(torch.inf))},
    "latents: over float32": {"latents": torch.full(LATENTS, 1e300, dtype=torch.float64)},
    "embeds: narrower": {"prompt_embeds": torch.zeros(4, 77, 23)},
    "embeds: of three rows": {"prompt_embeds": torch.zeros(3, 77, 24)},
    "embeds: of one branch": {"prompt_embeds": torch.zeros(2, 77, 24)},
    "embeds: no tokens": {"prompt_embeds": torch.zeros(4, 0, 24)},
    "embeds: integers": {"prompt_embeds": torch.zeros(4, 77, 24, dtype=torch.int32)},
    "embeds: on meta": {"prompt_embeds": torch.zeros(4, 77, 24, device="meta")},
    "embeds: NaN": {"prompt_embeds": torch.full((4, 77, 24), torch.nan)},
    "negative: of another length": {"negative_prompt_embeds": torch.zeros(2, 76, 24)},
    "negative: None": {"negative_prompt_embeds": None},
    "negative: infinite": {"negative_prompt_embeds": torch.full((2, 77, 24), torch.inf)},
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_r05_a_callback_returns_what_is_none_of_its_tensors(pipe: fastldm.Pipeline, answer: Any) -> None:
    after = pipe(**NEXT).images
    rows: list[int] = []

    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Any:
        rows.append(row)
        return answer

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    with pytest.raises(fastldm.Error) as caught:
        pipe(
            **CALL,
            num_images_per_prompt=2,
            callback_on_step_end=after_row,
            callback_on_step_end_tensor_inputs=names,
        )
    assert caught.value.field == "callback_on_step_end"
    assert "callback_on_step_end" in str(caught.value)
    assert rows == [0]
    assert torch.equal(pipe(**NEXT).images, after)


@pytest.mark.parametrize("name", ["_guidance_scale", "_guidance_rescale"])
@pytest.mark.parametrize("value", [None, "7", torch.nan, -1.0, 1e9, torch.ones(2)], ids=str)
def test_r05_a_callback_sets_a_guidance_that_is_none(pipe: fastldm.Pipeline, name: str, value: object) -> None:
    def after_row(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        setattr(view, name, value)
        return tensors

    with pytest.raises(fastldm.Error) as caught:
        pipe(**CALL, callback_on_step_end=after_row)
    assert caught.value.field == "callback_on_step_end"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_r05_a_callback_may_return_another_float(pipe: fastldm.Pipeline, dtype: torch.dtype) -> None:
    def half(view: Any, row: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        return {"latents": (0.5 * tensors["latents"]).to(dtype)}

    def half_in_float32(*args: Any) -> Tensors:
        return {"latents": half(*args)["latents"].float()}

    images = [pipe(**CALL, callback_on_step_end=f).images for f in (half, half_in_float32)]
    assert torch.equal(*images)


def test_r05_what_is_not_finite_by_itself_is_not_blamed_on_the_callback(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet, "forward", lambda self, x, modulation, context: x[:, :4] * torch.nan)
    with pytest.raises(fastldm.Error, match="not finite after the last step") as caught:
        pipe(**CALL, callback_on_step_end=lambda view, row, timestep, tensors: tensors)
    assert caught.value.field == "latents"


# ----------------------------------------------------------------------------------------------------- R06: signals


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # within a __del__ Python drops it
def test_r06_a_signal_at_500_random_moments(pipe: fastldm.Pipeline) -> None:
    armed = False

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    pipe(**CALL)
    start = time.perf_counter()
    image, after = pipe(**CALL).images, pipe(**NEXT).images
    longest = time.perf_counter() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    rng = random.Random(0)
    interrupted = 0
    try:
        for _ in range(500):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
                found = pipe(**CALL).images
                armed = False
                assert torch.equal(found, image)
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.is_grad_enabled()
            assert torch.equal(pipe(**NEXT).images, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 250


# ------------------------------------------------------------------------------------------------------- R16: forks

FORKS = """
import os, sys, time
import torch
import fastldm

folder = sys.argv[1]
torch.set_num_threads(4)
torch.randn(400, 400) @ torch.randn(400, 400)
torch.randn(1 << 22).exp_()  # starts the threads of OpenMP, which a fork does not have
pipe = fastldm.Pipeline(folder)
call = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
image = pipe("a", **call).images
ids = torch.zeros(1, 77, dtype=torch.int64)
picture, latents, embeds = torch.rand(1, 3, 1024, 1024), torch.randn(1, 4, 512, 512), torch.randn(16, 1024, 24)
uses = {
    "call": lambda: pipe("a", **call),
    "call with an image": lambda: pipe("a", image=picture, **call),
    "call with latents": lambda: pipe("a", latents=latents, height=1024, width=1024, **call),
    "call with embeddings": lambda: pipe(prompt_embeds=embeds, guidance_scale=1, **call),
    "encode_prompt of embeddings": lambda: pipe.encode_prompt(prompt_embeds=embeds),
    "encode_prompt": lambda: pipe.encode_prompt("a"),
    "text encoder": lambda: pipe._engine.encode_text(ids),
    "decoder": lambda: pipe._engine.decode(torch.zeros(1, 4, 4, 4)),
    "encoder": lambda: pipe._engine.encode_image(torch.zeros(1, 3, 8, 8)),
}
for name in ("unet", "vae", "text_encoder"):
    if hasattr(pipe, name):
        views = {
            "unet": lambda: pipe.unet(torch.zeros(1, 4, 4, 4), 1, torch.zeros(1, 77, 24)),
            "vae": lambda: pipe.vae.decode(torch.zeros(1, 4, 4, 4)),
            "text_encoder": lambda: pipe.text_encoder(ids),
        }
        uses[f"the view {name}"] = views[name]


def in_fork(use):
    start = time.monotonic()
    try:
        use()
    except fastldm.Error as error:
        quick = time.monotonic() - start < 1
        return 0 if quick and type(error).__name__ == "ForkError" and str(os.getppid()) in str(error) else 2
    return 3


def made_in_fork():
    torch.set_num_threads(1)
    again = fastldm.Pipeline(folder)
    return 0 if torch.equal(again("a", **call).images, image) else 4


def ending(work):
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(5)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hang"


torch.set_num_threads(int(sys.argv[2]))
names = [*uses, *["call"] * (20 - len(uses))]
print({name: found for name in names if (found := ending(lambda: in_fork(uses[name])))}, len(names))
print(ending(made_in_fork))
print(torch.equal(pipe("a", **call).images, image))
"""


def test_r16_a_fork_of_the_process_is_told_so(folder: Path) -> None:
    """20 forks, of each use at least one; arguments are large enough for several threads.

    A pipeline that is made in a fork that computes on one thread works, and so does the parent's after.
    """
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, str(folder), "4"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.stdout.split("\n")[:3] == ["{} 20", "0", "True"], done.stdout + done.stderr
