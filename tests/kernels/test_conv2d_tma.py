"""The convolution by TMA: the cases of the other form that it takes, and some of its own."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import conv2d as kernel
from fastldm.kernels import conv2d_tma, tuning
from fastldm.kernels.launch import HALF, Launch, recording
from fastldm.kernels.tuning import Convolution
from tests.kernels import test_conv2d
from tests.kernels.test_conv2d import FAR, Case

SMALL = Convolution(16, 32, 0, 16, 4, 1, block_w=8)  # boxes of 2×8 pixels
TALL = replace(SMALL, block_w=4)
LINE = replace(SMALL, block_w=16)  # 1×1 taps read a map as one row
SPLIT = replace(SMALL, splits=3)

CASES: dict[str, Case] = {
    "one pixel, of whose taps eight are outside": Case((1, 16, 1, 1), 16, tile=SMALL),
    "no multiple of any box": Case((2, 24, 3, 10), 40, shift=2, residual=True, tile=SMALL),
    "tall boxes": Case((2, 16, 6, 7), 40, shift=1, residual=True, tile=TALL),
    "1×1": Case((2, 48, 3, 7), 40, k=1, residual=True, tile=LINE),
    "1×1, two inputs with tails": Case((2, 24, 3, 7), 40, k=1, c2=40, tile=LINE),
    "1×1, two inputs, split": Case((2, 32, 3, 7), 40, k=1, c2=64, residual=True, tile=replace(LINE, splits=3)),
    "two inputs": Case((1, 16, 4, 3), 24, c2=24, shift=1, tile=SMALL),
    "two inputs, split": Case((1, 16, 4, 3), 24, c2=40, tile=SPLIT),
    "split": Case((2, 16, 3, 10), 56, shift=2, residual=True, tile=SPLIT),
    "enlarged in phases": Case(
        (2, 16, 3, 3), 40, shift=2, residual=True, phases=True, tile=SMALL, options=(("upsample", (6, 6)),)
    ),
    "enlarged in phases, two inputs": Case(
        (1, 24, 2, 3), 24, c2=16, phases=True, tile=TALL, options=(("upsample", (4, 6)),)
    ),
    "enlarged in phases, split": Case((1, 16, 3, 3), 40, phases=True, tile=SPLIT, options=(("upsample", (6, 6)),)),
    "channels of a larger map": Case(test_conv2d.within, 24, residual=True, tile=TALL),
    "a mean of 1000 with unit variance": Case((2, 16, 7, 5), 40, bias=1000.0, tile=TALL),
    "a mean of 1000, split": Case((1, 32, 7, 5), 40, bias=1000.0, tile=SPLIT),
    "all equal": Case(lambda dtype: torch.full((1, 16, 6, 6), 7.5, dtype=dtype), 24, k=1, tile=LINE),
    "near the largest half": Case(
        lambda dtype: test_conv2d.loud(dtype).clone(memory_format=torch.channels_last), 16, k=1, scale=0.2, tile=LINE
    ),
    FAR: Case(test_conv2d.far, 24, residual=True, tile=SMALL),
}


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    """module: `conv2d_tma`, or a mutant of it."""
    tile = CASES[case].tile
    with (
        patch.object(tuning, "conv2d_tma", lambda *_: tile),
        patch.object(kernel, "conv2d_tma", module),
        patch.object(tuning, "conv2d", side_effect=AssertionError("by pointers")),
        tuning.tma(True),
    ):
        test_conv2d.check_case(kernel, CASES[case], dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_tma(case: str, dtype: torch.dtype) -> None:
    check(conv2d_tma, case, dtype)


def test_boxes_of_a_map() -> None:
    """By TMA: half precision, taps that only move, channels and sizes that boxes fit. Everything else by pointers."""

    def launched(c: int, o: int, k: int, side: int, dtype: torch.dtype = torch.float16, **options: Any) -> Launch:
        x, w = bare(2, c, side, side, dtype), bare(o, c, k, k, dtype)
        with recording() as launches, tuning.tma(True):
            kernel.conv2d(x, w, **options)
        return launches[0]

    for one, block in (
        (launched(512, 512, 3, 128), (256, 128, 16)),
        (launched(512, 512, 3, 64), (128, 128, 16)),
        (launched(320, 320, 3, 128), (256, 64, 16)),
        (launched(320, 320, 1, 64), (128, 64, 128)),
    ):
        assert tuple(one.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W")) == block
    for one in (
        launched(512, 512, 3, 64, torch.float32),
        launched(512, 512, 3, 64, stride=2),
        launched(512, 512, 3, 64, pad="end"),
        launched(512, 512, 3, 64, upsample=(128, 128)),
        launched(512, 4, 3, 64),
        launched(4, 512, 3, 64),
        launched(1280, 1280, 3, 8),  # boxes of 8×16 pixels would be twice as large
    ):
        assert not one.arguments["TMA"]


@pytest.mark.parametrize(("channels", "tma"), [(128, True), (512, True), (320, False), (640, False)])
def test_form_by_channels(channels: int, tma: bool) -> None:
    x, w = bare(2, channels, 64, 64, torch.float16), bare(channels, channels, 3, 3, torch.float16)
    with recording() as launches:
        kernel.conv2d(x, w)
    assert launches[0].arguments["TMA"] is tma


def bare(n: int, c: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """channels_last, without memory."""
    return torch.empty(n, height, width, c, device="meta", dtype=dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("first", "channels", "tma"), [(0, 136, True), (8, 136, True), (4, 136, False), (0, 132, False)]
)
def test_maps_that_tma_cannot_address(first: int, channels: int, tma: bool) -> None:
    """Channels of a larger map of `channels`, from the `first` on."""
    x, w = bare(1, channels, 16, 16, torch.float16)[:, first : first + 128], bare(128, 128, 3, 3, torch.float16)
    with recording() as launches, tuning.tma(True):
        kernel.conv2d(x, w)
    assert launches[0].arguments["TMA"] is tma
