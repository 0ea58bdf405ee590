"""Many threads may call one Pipeline: each gets the bits that it would get alone."""

from __future__ import annotations

import ast
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm import pipeline, prompt
from fastldm.model import clip, layers, unet, vae
from fastldm.runtime import engine
from tests.pipeline import mixed, smallest
from tests.pipeline.pairs import Pair, paint

WORKERS = 4


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns a hundred times more often than usual: a race that is possible shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


CALLS: list[dict[str, Any]] = [
    {"prompt": "the red cat", "seed": 1, "num_inference_steps": 4},
    {"prompt": "dog", "seed": 2, "num_inference_steps": 6, "guidance_scale": 1.0, "height": 16, "width": 24},
    {"prompt": ["a", "red"], "seed": [3, 4], "num_inference_steps": 2, "eta": 1.0, "guidance_rescale": 0.5},
    {"prompt": "cat " * 90, "seed": 5, "num_inference_steps": 3, "negative_prompt": "the " * 90, "height": 24},
]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_different_calls_at_once(pair: Callable[..., Pair], scheduler: str) -> None:
    fast = pair("sd1", scheduler).fast
    alone = [paint(fast, output_type="pt", **call) for call in CALLS]
    order = [(i + turn) % 4 for turn in range(3) for i in range(4)]
    with ThreadPoolExecutor(WORKERS) as pool:
        together = list(pool.map(lambda i: paint(fast, output_type="pt", **CALLS[i]), order))
    wrong = [i for i, image in zip(order, together, strict=True) if not torch.equal(image, alone[i])]
    assert not wrong


def test_the_tokenizer_serves_threads(pair: Callable[..., Pair]) -> None:
    """The library's tokenizers keep the window and the padding of a call in themselves."""
    tokenizer = pair().fast._tokenizer
    prompts = ["", "the red cat", "cat " * 200, "dog " * 76]
    alone = [tokenizer([p]) for p in prompts]

    def many(k: int) -> int:
        return sum(not torch.equal(tokenizer([prompts[(k + i) % 4]]), alone[(k + i) % 4]) for i in range(200))

    with ThreadPoolExecutor(WORKERS) as pool:
        assert sum(pool.map(many, range(WORKERS))) == 0


def test_the_loggers_level_survives_threads(pair: Callable[..., Pair]) -> None:
    import transformers

    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_warning()
        tokenizer = pair().fast._tokenizer
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda _: tokenizer(["a cat"]), range(800)))
        assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    finally:
        transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> fastldm.Pipeline:
    return smallest.make(tmp_path_factory.mktemp("smallest"))


def test_r01_mixed_calls_on_one_pipeline_while_another_thread_changes_it(pipe: fastldm.Pipeline) -> None:
    calls = mixed.drawn(64)
    alone = [call.outcome(pipe) for call in calls]
    images = {tuple(image.flatten().tolist()) for image in alone if isinstance(image, Tensor)}
    assert len(images) > 40  # distinct, or a mix-up would not show
    rng = np.random.default_rng(1)
    turns = [rng.integers(len(calls), size=200) for _ in range(8)]
    wrong: list[tuple[int, Any]] = []

    def paints(turn: Any) -> None:
        for i in turn:
            found = calls[i].outcome(pipe)
            if not mixed.same(found, alone[i]):
                wrong.append((i, found))

    with changing(pipe), ThreadPoolExecutor(8) as pool:
        list(pool.map(paints, turns))
    assert not wrong


@contextmanager
def changing(pipe: fastldm.Pipeline) -> Iterator[None]:
    """Another thread changes, again and again, what a call reads of its pipeline when it begins."""
    before, done = pipe.scheduler, threading.Event()

    def change() -> None:
        for k in count():
            pipe.scheduler = mixed.SAMPLERS[k % len(mixed.SAMPLERS)]
            pipe.enable_vae_slicing(k % 2 == 0)
            pipe.set_progress_bar_config(disable=k % 3 == 0)
            if done.wait(1e-3):
                return

    with ThreadPoolExecutor(1) as pool:
        changes = pool.submit(change)
        try:
            yield
        finally:
            done.set()
            changes.result()
            pipe.scheduler = before
            pipe.enable_vae_slicing()
            pipe.set_progress_bar_config()


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: setattr(pipe, "scheduler", "euler_a"),
        lambda pipe: pipe.disable_vae_slicing(),
        lambda pipe: pipe.enable_vae_tiling(),
        lambda pipe: pipe.set_progress_bar_config(disable=False),
        pytest.param(
            lambda pipe: pipe.to(torch.bfloat16),
            marks=pytest.mark.skipif(not hasattr(fastldm.Pipeline, "to"), reason="there is no Pipeline.to"),
        ),
    ],
    ids=["scheduler", "slicing", "tiling", "bar", "to"],
)
def test_r01_a_change_of_the_pipeline_holds_for_the_calls_that_follow(
    tmp_path: Path, change: Callable[[fastldm.Pipeline], object]
) -> None:
    pipe = smallest.make(tmp_path)
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "pt"}
    call |= {"height": 16, "width": 24}  # beyond the autoencoder's own size
    alone = pipe("a", **call).images

    def after_row(view: Any, row: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if row == 0:
            change(pipe)
        return tensors

    assert torch.equal(pipe("a", **call, callback_on_step_end=after_row).images, alone)


ASSIGNING = {  # the methods that may set something on their object, because that is what they are for
    "Pipeline": {
        "__init__",
        "scheduler",
        "enable_vae_slicing",
        "enable_vae_tiling",
        "set_progress_bar_config",
        "to",
    },
    "Tokenizer": {"__init__"},
    "Engine": {"__post_init__"},
    "Conv2d": {"__init__", "derive"},  # before calls, and between them where weights are merged
    "UNet": {"__init__", "_pack_time_projections", "_pack_context_projections"},  # of its own making
}


@pytest.mark.parametrize("module", [pipeline, prompt, engine, clip, layers, unet, vae], ids=lambda m: m.__name__)
def test_r02_calls_keep_nothing_on_what_they_share(module: ModuleType) -> None:
    """A `Run` is of one call, and so is what `Plan` holds; all other objects of these files are of all calls."""
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Run"]
    assert classes
    for kind in classes:
        found = {m.name for m in kind.body if isinstance(m, ast.FunctionDef) and assigns(m)}
        assert found <= ASSIGNING.get(kind.name, {"__init__"})


def assigns(method: ast.FunctionDef) -> bool:
    """Whether a method sets or deletes an attribute of its object, or an entry of one."""
    first = method.args.args[0].arg if method.args.args else ""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            if isinstance(node, ast.Name) and node.id == first:
                return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "__setattr__"):
            return True
    return False


def test_r02_the_gate_sees_every_way_to_assign() -> None:
    ways = ["self.x = 1", "self.x += 1", "self.x[0] = 1", "del self.x", "self.x: int = 1", "self.x.y, z = 1, 2"]
    ways += ["setattr(self, 'x', 1)", "object.__setattr__(self, 'x', 1)", "for self.x in (): pass"]
    for way in ways:
        assert assigns(ast.parse(f"def f(self):\n    {way}").body[0]), way
    for way in ("x = self.x", "other.x = self.y", "self.f(x)", "x[self.y] = 1"):
        assert not assigns(ast.parse(f"def f(self):\n    {way}").body[0]), way


def test_r02_a_call_leaves_every_object_of_the_pipeline_as_it_was(pipe: fastldm.Pipeline) -> None:
    def shared() -> list[dict[str, Any]]:
        networks = [part for part in vars(pipe._engine).values() if isinstance(part, torch.nn.Module)]
        owners = [pipe, pipe._engine, pipe._tokenizer, *(m for n in networks for m in n.modules())]
        return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]

    before = shared()
    outcomes = [call.outcome(pipe) for call in mixed.drawn(20, seed=1)]
    assert any(isinstance(found, Tensor) for found in outcomes)
    assert any(isinstance(found, str) for found in outcomes)
    assert shared() == before
