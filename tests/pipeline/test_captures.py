"""What is captured for a call serves the next. Graphs have a stand-in, `Recorded`, which checks each row."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastldm
from fastldm.request import Scales
from fastldm.runtime import plan
from fastldm.runtime.graph import Eager
from fastldm.runtime.pool import Pool
from fastldm.tasks import guidance
from tests.pipeline.pairs import Pair, paint
from tests.runtime.recorded import Recorded
from tests.runtime.tiny import table

CALL: dict[str, Any] = {"height": 24, "width": 16, "num_inference_steps": 2, "output_type": "np"}
UP = "up_blocks.0.upsamplers.0.conv.weight"


@pytest.fixture
def pipe(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder)


@pytest.fixture
def recorded(pipe: fastldm.Pipeline) -> Recorded:
    """After one call: the plan, the text encoder and the decoder are captured."""
    graphs = Recorded()
    for name, value in {"graphs": graphs, "pool": Pool(64 << 20)}.items():
        object.__setattr__(pipe._engine, name, value)
    paint(pipe, prompt="a red cat", **CALL)
    assert graphs.count == 3
    return graphs


def plain(folder: Path, **call: Any) -> Any:
    """The same call of a pipeline that captures nothing."""
    other = fastldm.Pipeline(folder)
    assert isinstance(other._engine.graphs, Eager)
    return paint(other, **{"prompt": "a red cat", **CALL, **call})


@pytest.mark.parametrize(
    "call",
    [
        {"num_inference_steps": 7},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
        {"prompt": "the tree"},
        {"negative_prompt": "a house"},
        {"seed": 99},
        *({"scheduler": name} for name in ("euler", "euler_a", "dpmpp_2m", "unipc", "heun", "lcm", "plms")),
        {"eta": 0.5},
        {"timesteps": [900, 500, 20], "scheduler": "euler"},
    ],
    ids=lambda call: ",".join(f"{k}={v}" for k, v in call.items()),
)
def test_what_captures_nothing(pipe: fastldm.Pipeline, recorded: Recorded, folder: Path, call: dict[str, Any]) -> None:
    """They are data: the same bits as without capture, from the same graphs."""
    found = paint(pipe, **{"prompt": "a red cat", **CALL, **call})
    assert recorded.count == 3
    np.testing.assert_array_equal(found, plain(folder, **call))


def test_more_rows_than_the_tables_hold_capture_nothing(
    pipe: fastldm.Pipeline, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """They are filled anew under way."""
    call: dict[str, Any] = {"guidance_scale": 5.0, "num_inference_steps": 10}
    expected, graphs = plain(folder, **call), Recorded()
    monkeypatch.setattr(plan, "ROWS", 4)
    for name, value in {"graphs": graphs, "pool": Pool(64 << 20)}.items():
        object.__setattr__(pipe._engine, name, value)
    found = paint(pipe, **{"prompt": "a red cat", **CALL, **call})
    assert graphs.count == 3
    np.testing.assert_array_equal(found, expected)


def test_changed_weights_capture_nothing(pipe: fastldm.Pipeline, recorded: Recorded) -> None:
    first = paint(pipe, prompt="a red cat", **CALL)
    weights = pipe._engine.weights["unet"]
    weights.merge(UP, torch.full(pipe._engine.unet.get_parameter(UP).shape, 0.05))
    assert not np.array_equal(paint(pipe, prompt="a red cat", **CALL), first)
    weights.restore()
    np.testing.assert_array_equal(paint(pipe, prompt="a red cat", **CALL), first)
    assert recorded.count == 3


@pytest.mark.parametrize(
    ("call", "more"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"height": 16}, 2),
        ({"num_images_per_prompt": 2}, 1),
        ({"clip_skip": 1}, 1),
        ({"guidance_interval": (0.0, 0.5)}, 1),
    ],
    ids=str,
)
def test_what_captures_once(pipe: fastldm.Pipeline, recorded: Recorded, call: dict[str, Any], more: int) -> None:
    for _ in range(2):
        paint(pipe, **{"prompt": "a red cat", **CALL, **call})
        assert recorded.count == 3 + more


def test_a_callback_that_drops_guidance_switches_graphs(
    pipe: fastldm.Pipeline, recorded: Recorded, folder: Path
) -> None:
    def drop(view: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if row == 0:
            view._guidance_scale = 0.0
        return tensors

    call = {**CALL, "num_inference_steps": 4, "callback_on_step_end": drop}
    images = [paint(pipe, prompt="a red cat", **call) for _ in range(2)]
    assert recorded.count == 4
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], plain(folder, **call))


def test_twenty_sizes_keep_memory_flat(pipe: fastldm.Pipeline) -> None:
    object.__setattr__(pipe._engine, "pool", Pool(2_000_000))
    held = []
    for k in range(40):
        paint(pipe, prompt="a red cat", **{**CALL, "height": 16 + 8 * (k % 20)})
        held.append(pipe._engine.pool.nbytes)
    assert 0 < max(held) <= 2_000_000
    pipe._engine.pool.clear()
    assert len(pipe._engine.pool) == 0


# ------------------------------------------------------------------------------------------- an interval of guidance


def test_the_whole_interval_is_no_interval(pair: Callable[..., Pair]) -> None:
    images = [paint(pair().fast, prompt="a red cat", guidance_interval=i, **CALL) for i in (None, (0, 1))]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_guidance_that_ends_early_is_as_if_a_callback_had_ended_it(pair: Callable[..., Pair], scheduler: str) -> None:
    def end(view: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if row == 2:
            view._guidance_scale = 1.0
        return tensors

    call = {**CALL, "prompt": "a red cat", "num_inference_steps": 8, "scheduler": scheduler, "output_type": "latent"}
    fast = pair().fast
    found = paint(fast, guidance_interval=(0.0, 0.4), **call)
    assert torch.equal(found, paint(fast, callback_on_step_end=end, **call))
    assert not torch.equal(found, paint(fast, **call))


@pytest.mark.parametrize(("steps", "interval"), [(1, (0.0, 0.9)), (10, (0.0, 0.05)), (3, (0.4, 0.6))])
def test_an_interval_without_a_step_is_an_error(
    pair: Callable[..., Pair], steps: int, interval: tuple[float, float]
) -> None:
    with pytest.raises(fastldm.Error, match=f"guides none of {steps} steps") as caught:
        paint(pair().fast, prompt="a", **{**CALL, "num_inference_steps": steps, "guidance_interval": interval})
    assert caught.value.field == "guidance_interval"


@pytest.mark.parametrize(
    ("steps", "interval", "on"),
    [
        (4, (0.0, 1.0), None),
        (4, (0.25, 0.75), [False, True, True, False]),
        (3, (0.0, 0.5), [True, False, False]),
        (100, (0.0, 0.29), [True] * 29 + [False] * 71),
    ],
)
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_which_steps_are_guided(kind: str, steps: int, interval: tuple[float, float], on: list[bool] | None) -> None:
    """All rows of a step are guided or none."""
    rows = table(steps, kind)
    found = guidance(Scales("text_to_image", 7.5, 1.0, 0.0, interval), rows).on
    if on is None:
        assert found is None
    else:
        per_step = np.split(found, np.flatnonzero(rows.ends_step)[:-1] + 1)
        assert [set(part) for part in per_step] == [{value} for value in on]


def test_an_engine_goes_with_its_last_reference(folder: Path) -> None:
    """And with it weights and graphs: gigabytes cannot wait for the collector of cycles."""
    pipe = fastldm.Pipeline(folder)
    paint(pipe, prompt="a red cat", **CALL)
    engine = weakref.ref(pipe._engine)
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert engine() is None
    finally:
        gc.enable()
