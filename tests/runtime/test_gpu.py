"""The compiled runtime on a GPU: graphs replay what runs without them, whatever the call, and give their memory back.

Needs no diffusers. `tests/runtime/test_graph.py` and `tests/pipeline/test_captures.py` say the same of a stand-in.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastldm
from examples import tiny_model
from fastldm.runtime.engine import Job
from fastldm.runtime.graph import WARM_UPS, CudaGraphs, Eager, captured
from fastldm.runtime.pool import Pool
from tests.runtime.rows import CASES, begun, held, kernels_alone

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
CALL: dict[str, Any] = {"prompt": "a red cat", "seed": 3, "num_inference_steps": 4, "output_type": "pt"}
CALL |= {"height": 128, "width": 96}
LARGER = [(256, 160)]
CHANGED = (
    "conv_in.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "mid_block.resnets.0.time_emb_proj.weight",
    "up_blocks.0.upsamplers.0.conv.weight",
)


def pipeline(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder, device=DEVICE, torch_dtype=torch.float16, backend="auto")


def uncaptured(folder: Path) -> fastldm.Pipeline:
    """The same kernels without graphs."""
    pipe = pipeline(folder)
    for name, value in {"graphs": Eager(), "pool": Pool(0)}.items():
        object.__setattr__(pipe._engine, name, value)
    return pipe


def paint(pipe: fastldm.Pipeline, **call: Any) -> Tensor:
    images = pipe(**{**CALL, **call}).images
    assert isinstance(images, Tensor)
    return images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose kernels are compiled."""
    with patch.dict(tiny_model.VAE, force_upcast=False):  # in float32 it would need kernels of its own
        written = tiny_model.write_tiny_model(tmp_path_factory.mktemp("gpu") / "model")
    pipeline(written).warmup([(CALL["height"], CALL["width"]), *LARGER])
    return written


@pytest.fixture(scope="module")
def warm(folder: Path) -> fastldm.Pipeline:
    """A pipeline that painted already; for tests that change nothing of it."""
    pipe = pipeline(folder)
    paint(pipe)
    return pipe


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is captured from here on."""
    counted, sound = [], CudaGraphs.capture

    def capture(self: CudaGraphs, function: Any, buffers: Any) -> Any:
        counted.append(function)
        return sound(self, function, buffers)

    monkeypatch.setattr(CudaGraphs, "capture", capture)
    return counted


@contextmanager
def variants(*, kept: bool) -> Iterator[list[str]]:
    """The kernels whose variants this process did not have yet. kept: also those that Triton had on disk."""
    found: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if kept or not cache_hit:
            found.append(src.name)

    with patch.object(triton.knobs.compilation, "listener", listen):
        yield found


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host may not wait for the device: an error where it reads something back."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocated() -> int:
    """Bytes of tensors, without the workspaces that cuBLAS keeps for each stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


# ------------------------------------------------------------------------------------------------------- the same bits


def test_after_a_warm_up_the_first_calls_compile_nothing(folder: Path) -> None:
    pipe = pipeline(folder)
    with variants(kept=False) as compiled:
        paint(pipe)
        for height, width in LARGER:
            paint(pipe, height=height, width=width)
    assert compiled == []


@pytest.mark.parametrize(
    "call",
    [
        {"scheduler": "dpmpp_2m"},
        {"scheduler": "euler_a", "num_images_per_prompt": 2},
        {"guidance_interval": (0.25, 0.75), "guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
    ],
    ids=lambda call: ",".join(call),
)
def test_graphs_give_the_bits_of_calls_without_them(folder: Path, warm: fastldm.Pipeline, call: dict[str, Any]) -> None:
    first = paint(warm, **call)
    assert torch.equal(paint(warm, **call), first), "run after run"
    assert torch.equal(paint(pipeline(folder), **call), first), "pipeline after pipeline"
    assert torch.equal(paint(uncaptured(folder), **call), first)


def test_four_threads_at_once(folder: Path) -> None:
    """The first calls capture while others replay, and each thread has a plan of its own."""
    pipe, plain = pipeline(folder), uncaptured(folder)
    seeds = [k % 4 for k in range(12)]
    with ThreadPoolExecutor(4) as threads:
        painted = list(threads.map(lambda seed: paint(pipe, seed=seed), seeds))
    alone = [paint(plain, seed=seed) for seed in range(4)]
    assert not torch.equal(alone[0], alone[1])
    for seed, image in zip(seeds, painted, strict=True):
        assert torch.equal(image, alone[seed])


def test_a_callers_stream(warm: fastldm.Pipeline) -> None:
    """Calls on several streams wait for each other."""
    expected = [paint(warm, seed=seed) for seed in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            assert torch.equal(paint(warm, seed=seed), expected[seed])


def test_one_capture_serves_every_call_of_a_shape(folder: Path, captures: list[Any]) -> None:
    pipe, plain = pipeline(folder), uncaptured(folder)
    paint(pipe)
    assert len(captures) == 3, "the text encoder, a row, the decoder"
    captures.clear()
    samplers = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun", "lcm", "plms")
    calls: list[dict[str, Any]] = [{"scheduler": name} for name in samplers]
    calls += [{"num_inference_steps": 7}, {"guidance_scale": 3.0}, {"guidance_rescale": 0.7}, {"seed": 99}]
    calls += [{"prompt": "the tree"}, {"negative_prompt": "a house"}, {"num_inference_steps": 130}]
    with variants(kept=True) as compiled:
        painted = [paint(pipe, **call) for call in calls]
    assert compiled == []
    assert captures == []
    for call, image in zip(calls, painted, strict=True):
        assert torch.equal(image, paint(plain, **call)), call


# --------------------------------------------------------------------------------------------------- rows on kernels


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_run_on_kernels_alone(name: str) -> None:
    """Captured, and with nothing read back, beside the reference on the CPU in float32."""
    case = CASES[name]
    plain, exact = case.network(torch.float16, DEVICE), case.network(torch.float32)
    with kernels_alone():
        plan, run = begun(case, plain, CudaGraphs(DEVICE))
        assert next(run) == 0  # brings the tables to the device
        with no_waiting():
            rest = list(run)
    assert rest == list(range(1, case.table.rows))
    assert not plan.state[case.table.slots :].any()
    held(plan.state[: case.table.slots], case, exact, plain, case.table.rows)


def job(steps: int) -> Job:
    case = replace(CASES["text to image"], steps=steps)
    given = case.given(DEVICE)
    return Job(case.table, case.guidance, given.x, given.states.half(), noise=lambda r: None)


def test_the_engines_loop_waits_for_nothing(warm: fastldm.Pipeline) -> None:
    with warm._engine.begin(job(4)) as run:
        rows = iter(run)
        next(rows)
        with no_waiting():
            assert list(rows) == [1, 2, 3]


def test_time_of_the_host(warm: fastldm.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not judged: `benchmarks/` does that."""
    with warm._engine.begin(job(101)) as run:
        rows = iter(run)
        next(rows)
        torch.cuda.synchronize()
        began = time.perf_counter()
        replayed = len(list(rows))
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        both = time.perf_counter() - began
    assert replayed == 100
    with capsys.disabled():
        print(f"\na row of the tiny model: {host * 1e4:.1f} µs of the host, {both * 1e4:.1f} µs until it is done")


# ------------------------------------------------------------------------------------------------------------ weights


def test_merged_weights_are_those_of_a_pipeline_that_is_built_anew(
    folder: Path, tmp_path: Path, captures: list[Any]
) -> None:
    pipe = pipeline(folder)
    before, merged = paint(pipe), pipe._engine.weights["unet"]
    captures.clear()
    other = Path(shutil.copytree(folder, tmp_path / "changed"))
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, g = load_file(file), torch.Generator().manual_seed(5)
    for name in CHANGED:
        delta = 0.1 * torch.randn(tensors[name].shape, generator=g)
        tensors[name] = tensors[name].half().float() + delta
        merged.merge(name, delta)
    save_file(tensors, file, metadata={"format": "pt"})
    changed = paint(pipe)
    merged.restore()
    restored = paint(pipe)
    assert captures == []
    assert torch.equal(changed, paint(pipeline(other)))
    assert torch.equal(restored, before)
    assert not torch.equal(changed, before)


# ------------------------------------------------------------------------------------------------------------- memory


def test_twenty_shapes_keep_memory_flat(folder: Path) -> None:
    """Nothing grows from the second round on, and what is captured anew gives the bits of the first time."""
    pipe = pipeline(folder)
    engine, heights = pipe._engine, range(64, 224, 8)
    first = paint(pipe, height=heights[0])
    object.__setattr__(engine, "pool", Pool(limit := 5 * engine.pool.nbytes))
    peaks = []
    for _ in range(3):
        peaks.append(0)
        for height in heights:
            paint(pipe, height=height)
            assert 0 < engine.pool.nbytes <= limit
            peaks[-1] = max(peaks[-1], torch.cuda.memory_reserved())
    assert len(engine.pool) < 2 * len(heights), "there were more shapes than it keeps"
    assert peaks[2] <= peaks[1]
    assert torch.equal(paint(pipe, height=heights[0]), first)


def test_without_memory_for_graphs_calls_run_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, plain = pipeline(folder), uncaptured(folder)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(CudaGraphs, "capture", full)
        first = paint(pipe)
    assert [record.name for record in caplog.records] == ["fastldm"] * 3
    assert "there is no memory to capture a graph for Shape(batch=1, height=16" in caplog.text
    assert torch.equal(first, paint(plain))
    assert torch.equal(first, paint(pipe)), "the next call"
    assert torch.equal(paint(pipe, height=64), paint(plain, height=64)), "another shape, captured"
    assert len(caplog.records) == 3


def test_a_capture_that_runs_out_of_memory_leaves_the_device_sound(caplog: pytest.LogCaptureFixture) -> None:
    graphs, x, calls = CudaGraphs(DEVICE), torch.zeros(1000, device=DEVICE), []

    def add() -> None:
        x.add_(1)

    def greedy() -> None:
        add()
        calls.append(0)
        if len(calls) > WARM_UPS:
            torch.empty(1 << 46, dtype=torch.uint8, device=DEVICE)

    assert captured(graphs, greedy, dict, "too much") is None
    assert "too much" in caplog.text
    replay = graphs.capture(add, dict)
    x.zero_()
    replay()
    assert float(x.sum()) == 1000


def test_a_deleted_pipeline_leaves_nothing(folder: Path) -> None:
    before = allocated()
    pipe = pipeline(folder)
    for call in ({}, {"height": 64}, {"guidance_scale": 1.0}):
        paint(pipe, **call)
    assert allocated() > before
    del pipe
    assert allocated() == before


def test_a_graph_outlives_others_of_its_engine() -> None:
    """cuBLAS has a workspace for each stream. Where it is not of the graphs' pool, the end of any graph that was
    captured on the stream gives it away, and those that are left write into memory of others.
    """
    graphs = CudaGraphs(DEVICE)
    tall = torch.randn(32768, 640, device=DEVICE, dtype=torch.float16) / 181  # so that the sums are split

    def product() -> tuple[Tensor, Callable[[], None]]:
        out = torch.zeros(640, 640, device=DEVICE, dtype=torch.float16)

        def multiply() -> None:
            torch.mm(tall.T, tall, out=out)

        return out, graphs.capture(multiply, dict)

    out, replay = product()
    _, other = product()
    replay()
    expected = out.clone()
    del other
    with torch.cuda.stream(graphs._side):
        strangers = [torch.full((size << 18,), torch.nan, device=DEVICE) for size in (32, 32, 4, 4)]
    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert all(bool(t.isnan().all()) for t in strangers)
