"""The kernels on a GPU, at full size: as near to the truth as PyTorch's own, and the same in a CUDA graph."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import FORMS, IN_PLACE, launcher, other_form, tensors
from benchmarks.real_shapes import REAL, Shape
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES
from fastldm.ops import RowTables, reference
from tests.kernels import test_to_uint8 as pictures
from tests.numerics import assert_within_twice
from tests.ops import formulas
from tests.ops.formulas import up

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = [(op, shape) for op in REAL for shape in REAL[op]]
ROWS = 200  # of the sampler, one after the other: what depends on which program comes first, shows in some of them


def name(value: object) -> str | None:
    return f"{value.model} {value.what}" if isinstance(value, Shape) else None


def compared(out: Any, truth: Any, yardstick: Any) -> None:
    """Statistics, whose M2 is so much larger than the mean, each by itself."""
    for each, true, plain in zip(tensors(out), tensors(truth), tensors(yardstick), strict=False):
        parts = (t.unbind(-1) if t.ndim == 3 and t.shape[-1] == 2 else (t,) for t in (each, true, plain))
        for one, right, usual in zip(*parts, strict=True):
            if one.is_floating_point():
                assert_within_twice(one, right, usual.to(one.dtype))
            else:
                assert torch.equal(one, usual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "shape"), [case for case in SHAPES if case[0] not in IN_PLACE], ids=name)
@torch.no_grad()
def test_real_shape(op: str, shape: Shape, dtype: torch.dtype) -> None:
    arguments, options = shape.make(DEVICE, dtype)
    outs = [launcher(op)(*arguments, **options)]
    other = other_form(op, shape, dtype)
    if other is not None:
        with tuning.tma(FORMS[other]):
            outs.append(launcher(op)(*arguments, **options))
    yardstick = getattr(reference, op)(*arguments, **options)
    above = next(tensors(outs[0])).dtype  # a layer of float32 needs float64 to be judged
    truth = getattr(reference, op)(*up(arguments, above), **up(options, above))
    for out in outs:
        compared(out, truth, yardstick)


@pytest.mark.parametrize(("op", "shape"), [case for case in SHAPES if case[0] in IN_PLACE], ids=name)
@torch.no_grad()
def test_real_row(op: str, shape: Shape) -> None:
    """What is written into the arguments, in float32 and half precision, the row counter included."""
    made = shape.make(DEVICE, torch.float16)
    by_kernel, by_reference, exact = made, deepcopy(made), doubled(made)
    getattr(reference, op)(*exact[0], **exact[1])
    getattr(reference, op)(*by_reference[0], **by_reference[1])
    launcher(op)(*by_kernel[0], **by_kernel[1])
    for each, true, plain in zip(*(tensors(each) for each in (by_kernel, exact, by_reference)), strict=True):
        if each.is_floating_point():
            assert_within_twice(each, true, plain)
        else:
            assert torch.equal(each, plain)


def doubled(value: Any) -> Any:
    """A copy in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, RowTables):
        return RowTables(**doubled(vars(value)))
    if isinstance(value, dict):
        return {key: doubled(each) for key, each in value.items()}
    return tuple(map(doubled, value)) if isinstance(value, tuple) else value


@torch.no_grad()
def test_every_row_goes_on_to_the_next() -> None:
    """The counter after many rows without a wait between: programs of one launch all saw the same row."""
    for shape in REAL["end_row"]:
        arguments, options = shape.make(DEVICE, torch.float16)
        counter = next(t for t in tensors(arguments) if t.dtype == torch.int64)
        before = int(counter)
        for _ in range(ROWS):
            launcher("end_row")(*arguments, **options)
            counter.remainder_(before + 2)  # stays within the tables: before, before + 1, before, ...
        assert before <= int(counter) < before + 2


@pytest.mark.parametrize("case", pictures.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pixel_is_rounded_as_on_the_host(case: str, dtype: torch.dtype) -> None:
    """By the compiled kernel and by PyTorch on the device."""
    if case not in pictures.FAR:
        pixels = pictures.CASES[case](dtype)
        for by in (launcher("to_uint8"), reference.to_uint8):
            assert torch.equal(by(pixels.to(DEVICE)).cpu(), formulas.to_uint8(pixels))


@pytest.mark.parametrize("op", REAL)
@torch.no_grad()
def test_a_graph_replays_it(op: str) -> None:
    replayed(op)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["linear", "geglu", "conv2d"])
@torch.no_grad()
def test_a_graph_replays_each_form(op: str, form: str) -> None:
    with tuning.tma(FORMS[form]):
        replayed(op)


def replayed(op: str) -> None:
    """Twice from the same inputs: the same bits as outside."""
    arguments, options = REAL[op][0].make(DEVICE, torch.float16)
    before = [t.clone() for t in tensors((arguments, options))]

    def reset() -> None:
        for t, value in zip(tensors((arguments, options)), before, strict=True):
            t.copy_(value)

    def result(out: Any) -> list[Tensor]:
        return [t.clone() for t in tensors((arguments, options) if out is None else out)]

    alone = result(launcher(op)(*arguments, **options))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reset()
        launcher(op)(*arguments, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = launcher(op)(*arguments, **options)
    torch.cuda.synchronize()
    for _ in range(2):
        reset()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(result(out), alone, strict=True):
            assert torch.equal(a, b)
