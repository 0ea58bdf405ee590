from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.kernels import conv2d as kernel
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, Unsupported, recording
from fastldm.kernels.tuning import Convolution
from fastldm.ops import phase_weights
from tests.kernels.holding import exact_products, held
from tests.numerics import ULPS, assert_within_twice
from tests.ops import formulas
from tests.ops.formulas import image, random

FAR = "offsets past 2³¹"  # 8 GB that are reserved, not used, in half precision
SMALL = Convolution(16, 32, 16, 16, 4, 1)  # a second accumulator, and several tiles of few numbers
SPLIT = replace(SMALL, splits=3)

Maker = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """x: its shape, or what makes it. o: output channels. k: taps on a side. tile: None for that of `tuning.py`.

    shift: samples of it, or 0. residual: whether there is one. bias: its mean. scale: of the weights.
    """

    x: tuple[int, int, int, int] | Maker
    o: int
    k: int = 3
    c2: int = 0
    shift: int = 0
    residual: bool = False
    phases: bool = False
    bias: float = 0.0
    scale: float = 1.0
    tile: Convolution | None = SMALL
    options: tuple[tuple[str, Any], ...] = ()


def within(dtype: torch.dtype) -> Tensor:
    """Every other group of 24 channels of a larger map."""
    return image(2, 72, 4, 5, dtype=dtype)[:, 24:48]


def far(dtype: torch.dtype) -> Tensor:
    """Three pixels 2³⁰ apart, in memory that is never touched between them; where 32 bits would lead, are zeros."""
    pixels = torch.empty(2**32 + 64, dtype=dtype).as_strided((1, 24, 3, 1), (2**32, 1, 2**30, 2**30), 2**31)
    return pixels.copy_(random(1, 24, 3, 1, dtype=dtype))


def loud(dtype: torch.dtype) -> Tensor:
    return torch.tensor([65504.0, -65504.0]).repeat(8).reshape(1, 16, 1, 1).expand(1, 16, 3, 3).to(dtype)


CASES: dict[str, Case] = {
    "one number": Case((1, 1, 1, 1), 1, k=1),
    "one pixel, of whose taps eight are outside": Case((1, 16, 1, 1), 16, tile=None),
    "no multiple of any tile": Case((3, 21, 3, 6), 37, shift=3, residual=True),
    "as tuned: all of 160 channels": Case((1, 32, 9, 8), 160, shift=1, residual=True, tile=None),
    "as tuned: a small map, split": Case((2, 96, 2, 3), 40, shift=2, residual=True, tile=None),
    "1×1": Case((2, 48, 3, 7), 40, k=1, residual=True),
    "1×1, two inputs": Case((2, 32, 3, 7), 40, k=1, c2=16),
    "1×1, two inputs with tails": Case((2, 20, 3, 7), 40, k=1, c2=40),
    "1×1, two inputs, split": Case((2, 32, 3, 7), 40, k=1, c2=64, residual=True, tile=SPLIT),
    "two inputs": Case((1, 16, 4, 3), 20, c2=20, shift=1),
    "stride 2": Case((2, 16, 5, 6), 40, options=(("stride", 2),)),
    "stride 2, padded at the end": Case((1, 16, 6, 5), 40, options=(("stride", 2), ("pad", "end"))),
    "1×1, padded at the end": Case((1, 16, 3, 2), 8, k=1, options=(("pad", "end"),)),
    "split": Case((2, 16, 3, 6), 56, shift=2, residual=True, tile=SPLIT),
    "four channels, all taps in a step": Case((2, 4, 5, 4), 40, shift=1),
    "three channels, stride 2": Case((1, 3, 5, 4), 40, options=(("stride", 2),)),
    "four channels to write": Case((2, 32, 3, 6), 4, tile=None),
    "enlarged to 2n": Case((2, 16, 3, 2), 40, residual=True, options=(("upsample", (6, 4)),)),
    "enlarged to 2n − 1": Case((1, 20, 3, 4), 40, shift=1, options=(("upsample", (5, 8)),)),
    "enlarged, two inputs, stride 2": Case((1, 16, 3, 2), 8, c2=4, options=(("upsample", (5, 3)), ("stride", 2))),
    "enlarged in phases": Case(
        (2, 16, 3, 7), 40, shift=2, residual=True, phases=True, options=(("upsample", (6, 14)),)
    ),
    "enlarged in phases, two inputs": Case((1, 20, 2, 3), 20, c2=16, phases=True, options=(("upsample", (4, 6)),)),
    "enlarged in phases, split": Case((1, 16, 3, 3), 40, phases=True, tile=SPLIT, options=(("upsample", (6, 6)),)),
    "four channels, enlarged in phases": Case((1, 4, 2, 3), 20, phases=True, options=(("upsample", (4, 6)),)),
    "phases that do not fit the size": Case((1, 16, 2, 3), 20, phases=True, options=(("upsample", (3, 6)),)),
    "channels of a larger map": Case(within, 24, residual=True),
    "a mean of 1000 with unit variance": Case((2, 16, 7, 5), 40, bias=1000.0),
    "a mean of 1000, split": Case((1, 32, 7, 5), 40, bias=1000.0, tile=SPLIT),
    "all equal": Case(lambda dtype: torch.full((1, 16, 6, 6), 7.5, dtype=dtype), 20, k=1),
    "near the largest half": Case(loud, 16, k=1, scale=0.2),
    FAR: Case(far, 24, residual=True, options=(("stride", 1),)),
}
OF_EACH_DTYPE = [(case, dtype) for case in CASES for dtype in DTYPES if not (case == FAR and dtype == torch.float32)]


def made(one: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    x = image(*one.x, dtype=dtype) if isinstance(one.x, tuple) else one.x(dtype)
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    w = image(one.o, c + one.c2, one.k, one.k, dtype=dtype, scale=one.scale * (c * one.k**2) ** -0.5)
    options = dict(one.options)
    if one.c2:
        options["x2"] = image(n, one.c2, height, width, dtype=dtype)
    if one.shift:  # some columns of a table for all layers
        options["shift"] = random(one.shift, one.o + 24, dtype=dtype)[:, 8 : 8 + one.o]
    if one.residual:
        size = [side // options.get("stride", 1) for side in options.get("upsample", (height, width))]
        options["residual"] = far(dtype) if one.x is far else image(n, one.o + 8, *size, dtype=dtype)[:, : one.o]
    return (x, w, random(one.o, dtype=dtype, mean=one.bias)), options


def formula(*arguments: Any, w_phases: Tensor | None = None, want_stats: bool = False, **options: Any) -> Any:
    return formulas.conv2d(*arguments, **options), None


def check(module: ModuleType, case: str, dtype: torch.dtype) -> None:
    one = CASES[case]
    chosen = tuning.conv2d if one.tile is None else lambda *_: one.tile
    with patch.object(tuning, "conv2d", chosen), tuning.tma(False):
        check_case(module, one, dtype)


def check_case(module: ModuleType, one: Case, dtype: torch.dtype) -> None:
    """The output against its formula, the statistics against those of the output as it was stored."""
    arguments, options = made(one, dtype)
    if one.phases:
        options["w_phases"] = phase_weights(arguments[1])
    with exact_products():
        y, stats = held(module, "conv2d", formula, *arguments, **options, want_stats=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    check_stats(stats, y)


def check_stats(stats: Tensor, y: Tensor) -> None:
    """As if each number of y had been off by a few roundings, which moves the norm of what is centred by no more."""
    mean, m2 = stats.double().unbind(-1)
    true_mean, true_m2 = formulas.channel_stats(y.double()).unbind(-1)
    roundings = ULPS * torch.finfo(torch.float32).eps
    assert bool(((mean - true_mean).abs() <= roundings * y.double().abs().amax(dim=(2, 3))).all())
    assert bool(((m2.sqrt() - true_m2.sqrt()).abs() <= roundings * y.double().norm(dim=(2, 3))).all())


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(("case", "dtype"), OF_EACH_DTYPE, ids=str)
def test_conv2d(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize("tile", [SMALL, SPLIT], ids=["whole", "split"])
def test_without_a_bias_and_without_statistics(tile: Convolution) -> None:
    (x, w, _), _ = made(CASES["split"], torch.float32)
    with patch.object(tuning, "conv2d", lambda *_: tile):
        y, stats = kernel.conv2d(x, w)
    assert stats is None
    assert_within_twice(y, formulas.conv2d(x.double(), w.double()), formulas.conv2d(x, w))


def test_a_split_sum_is_the_same_every_time() -> None:
    (x, w, b), _ = made(CASES["split"], torch.float16)
    with patch.object(tuning, "conv2d", lambda *_: SPLIT):
        once, again = (kernel.conv2d(x, w, b, want_stats=True) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_phases_are_rounded_once(dtype: torch.dtype) -> None:
    w = image(5, 7, 3, 3, dtype=dtype)
    phases = phase_weights(w)
    taps = w.double()
    assert phases.shape == (4, 5, 2, 2, 7)
    assert phases.is_contiguous()
    for phase in range(4):
        for i, rows in enumerate(((0,), (1, 2)) if phase < 2 else ((0, 1), (2,))):
            for j, columns in enumerate(((0,), (1, 2)) if phase % 2 == 0 else ((0, 1), (2,))):
                expected = sum(taps[:, :, row, column] for row in rows for column in columns)
                assert isinstance(expected, Tensor)
                error = (phases[phase, :, i, j].double() - expected).abs()
                assert bool((error <= torch.finfo(dtype).eps * 0.51 * expected.abs() + 4e-7).all())


@pytest.mark.parametrize(
    ("shape", "o", "k", "tile", "programs", "splits"),
    [
        ((2, 320, 64, 64), 320, 3, (128, 160), 128, 1),
        ((2, 1280, 32, 32), 1280, 3, (128, 160), 128, 1),
        ((2, 640, 32, 32), 640, 3, (128, 160), 128, 2),
        ((2, 1280, 16, 16), 1280, 3, (128, 160), 160, 5),
        ((2, 2560, 8, 8), 1280, 3, (64, 160), 160, 10),
        ((2, 1280, 12, 12), 1280, 3, (64, 160), 144, 3),
        ((2, 320, 64, 64), 4, 3, (128, 16), 64, 1),
        ((1, 512, 64, 64), 512, 3, (128, 128), 128, 1),
    ],
)
def test_there_are_programs_enough(
    shape: tuple[int, ...], o: int, k: int, tile: tuple[int, int], programs: int, splits: int
) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    w = torch.empty(o, shape[1], k, k, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    with recording() as launches:
        kernel.conv2d(x, w)
    first = launches[0]
    assert (first.arguments["BLOCK_M"], first.arguments["BLOCK_N"] + first.arguments["MORE_N"]) == tile
    assert first.grid == (programs // splits, splits)


def test_what_no_kernel_takes() -> None:
    x, w, b = image(1, 8, 4, 4, dtype=torch.float32), image(4, 8, 3, 3, dtype=torch.float32), torch.ones(4)
    for arguments, options, reason in (
        ((x.double(), w.double()), {}, "x is float64, not float16, bfloat16, float32"),
        ((x.half(), w), {}, "w is float32 beside float16"),
        ((x.contiguous(), w), {}, "the last dimension of x is not contiguous"),
        ((F.pad(x, (0, 1))[..., :4], w), {}, "the rows of x are not evenly spaced"),
        ((x, w.contiguous()), {}, "w is not channels_last"),
        ((x, image(4, 8, 5, 5, dtype=torch.float32)), {}, "5×5 taps, not 1×1 or 3×3"),
        ((x, w), {"x2": x}, "w reads 8 channels, and there are 16"),
        ((x, w[:, :6].clone()), {"x2": x[:, :, :2]}, "w reads 6 channels, and there are 16"),
        ((x, w, b[:3]), {}, "b is not one contiguous number per channel"),
        ((x, w, b), {"shift": torch.ones(2, 4)}, r"shift is not \(N or 1, O\)"),
        ((x, w, b), {"residual": x}, "the residual has another shape than the output"),
        ((x, w, b), {"stride": 3}, "stride 3, not 1 or 2"),
        ((x, w, b), {"upsample": (12, 8)}, "4×4 is enlarged to 12×8, not to twice that or one less"),
        ((x, w, b), {"upsample": (8, 8), "w_phases": w}, "w_phases: see fastldm.ops.phase_weights"),
    ):
        with pytest.raises(Unsupported, match=reason), patch.object(kernel, "empty", side_effect=AssertionError):
            kernel.conv2d(*arguments, **options)
