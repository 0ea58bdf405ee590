from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastldm import ops
from tests.numerics import assert_within_twice, wider
from tests.ops import formulas
from tests.ops.formulas import DTYPES, check, image, random, untouched


def conv(*args: Any, **options: Any) -> Tensor:
    y, stats = ops.conv2d(*args, **options)
    assert stats is None
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def arguments(dtype: torch.dtype, *, n: int, c: int, c2: int, o: int, h: int, w: int, k: int) -> dict[str, Any]:
    weight = random(o, c + c2, k, k, dtype=dtype, scale=((c + c2) * k * k) ** -0.5)
    return {
        "x": image(n, c, h, w, dtype=dtype),
        "w": weight.contiguous(memory_format=torch.channels_last),
        "b": random(o, dtype=dtype),
        "x2": image(n, c2, h, w, dtype=dtype) if c2 else None,
    }


def run(given: dict[str, Any], **options: Any) -> Tensor:
    return check(conv, formulas.conv2d, given["x"], given["w"], given["b"], x2=given["x2"], **options)


# sizes, options of the op, and what they are there for
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({}, {}),
    "1×1": ({"k": 1}, {}),
    "one pixel": ({"h": 1, "w": 1}, {}),
    "one row": ({"h": 1, "w": 9}, {}),
    "odd channels": ({"c": 3, "o": 5}, {}),
    "two inputs": ({"c2": 3}, {}),
    "two inputs, 1×1": ({"c2": 3, "k": 1}, {}),
    "stride 2, even": ({"h": 6, "w": 8}, {"stride": 2}),
    "stride 2, odd": ({"h": 5, "w": 7}, {"stride": 2}),
    "stride 2, one pixel": ({"h": 1, "w": 1}, {"stride": 2}),
    "padded at the end, even": ({"h": 6, "w": 8}, {"stride": 2, "pad": "end"}),
    "padded at the end, odd": ({"h": 5, "w": 7}, {"stride": 2, "pad": "end"}),
    "upsampled to 2n": ({"h": 3, "w": 4}, {"upsample": (6, 8)}),
    "upsampled to 2n − 1": ({"h": 3, "w": 4}, {"upsample": (5, 7)}),
    "upsampled to 2n and 2n − 1": ({"h": 3, "w": 4}, {"upsample": (6, 7)}),
    "one pixel upsampled to one": ({"h": 1, "w": 1}, {"upsample": (1, 1)}),
    "upsampled, two inputs": ({"h": 3, "w": 2, "c2": 2}, {"upsample": (6, 4)}),
}


@DTYPES
@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES.keys())
def test_equals_the_formula(sizes: dict[str, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    given = arguments(dtype, **{"n": 2, "c": 4, "c2": 0, "o": 6, "h": 5, "w": 6, "k": 3, **sizes})
    run(given, **options)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_shift_and_residual(rows: int, bias: bool, residual: bool, dtype: torch.dtype) -> None:
    """One vector for the batch, or one for each sample; as a view of the packed modulation."""
    given = arguments(dtype, n=2, c=4, c2=0, o=6, h=3, w=5, k=3)
    given["b"] = given["b"] if bias else None
    shift = random(rows, 20, dtype=dtype)[:, 7:13]
    r = image(2, 6, 3, 5, dtype=dtype, scale=2.0) if residual else None
    run(given, shift=shift, residual=r)


@DTYPES
def test_everything_at_once(dtype: torch.dtype) -> None:
    given = arguments(dtype, n=2, c=4, c2=3, o=4, h=3, w=4, k=3)
    run(
        given,
        upsample=(5, 8),
        shift=random(2, 4, dtype=dtype),
        residual=image(2, 4, 5, 8, dtype=dtype),
    )


@DTYPES
def test_the_residual_may_be_the_input(dtype: torch.dtype) -> None:
    given = arguments(dtype, n=1, c=4, c2=0, o=4, h=3, w=3, k=3)
    run(given, residual=given["x"])


@DTYPES
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"upsample": (7, 12)}], ids=str)
def test_statistics_of_the_output(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of what was written, rounded: mean and M2 of each channel."""
    given = arguments(dtype, n=2, c=4, c2=2, o=6, h=4, w=6, k=3)
    args = (given["x"], given["w"], given["b"] + 3)
    with untouched(args), ops.using("reference", want_stats=True):
        y, stats = ops.conv2d(*args, x2=given["x2"], want_stats=True, **options)
    assert stats is not None
    wide = ops.compute_dtype(dtype)
    assert (stats.dtype, stats.shape) == (wide, (2, 6, 2))
    for i in range(2):
        truth = formulas.channel_stats(y.to(wider(wide)))[..., i]
        assert_within_twice(stats[..., i], truth, formulas.channel_stats(y.to(wide))[..., i])


def test_statistics_are_a_hint() -> None:
    given = arguments(torch.float32, n=1, c=2, c2=0, o=2, h=3, w=3, k=3)
    args = (given["x"], given["w"])
    assert ops.conv2d(*args, want_stats=True)[1] is None, "not free in the reference"
    with ops.using("reference", want_stats=True):
        assert ops.conv2d(*args)[1] is None, "not asked for"
        assert ops.conv2d(*args, want_stats=True)[1] is not None
    with ops.using("reference", want_stats=False):
        assert ops.conv2d(*args, want_stats=True)[1] is None
