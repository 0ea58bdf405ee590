"""How close is close enough: a result is held against the truth and against the plain formula, not a made-up number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ULPS = 4  # a few roundings of the largest value, for sums in another order
ULPS_OF_DOUBLE = 64  # float64 has no precision above it here: truth and yardstick are the same number


def wider(dtype: torch.dtype) -> torch.dtype:
    """The precision of the truth: float64 for float32 (and float64), float32 for half precision."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def assert_within_twice(out: Tensor, truth: Tensor, yardstick: Tensor, *, rms: bool = False) -> None:
    """Holds the error of `out` against that of a plain computation in the same dtype.

        |out − truth|  ≤  2 · |yardstick − truth|  +  ULPS · eps(dtype) · max |truth|

    truth: the definition, computed one precision up (`wider`) from the same inputs. yardstick: the definition in
    the dtype of `out`, written naively. |·| is the largest element: for an op; with `rms` the root of the mean
    square: for a whole model. Shapes and dtypes must agree, and everything must be finite.
    """
    assert out.shape == truth.shape == yardstick.shape, (out.shape, truth.shape, yardstick.shape)
    assert out.dtype == yardstick.dtype, (out.dtype, yardstick.dtype)
    assert bool(torch.isfinite(out).all()), "not finite"
    if out.numel() == 0:
        return
    truth = truth.double()
    error, allowed = (_size(t.double() - truth, rms) for t in (out, yardstick))
    ulps = ULPS_OF_DOUBLE if out.dtype == torch.float64 else ULPS
    slack = ulps * torch.finfo(out.dtype).eps * _size(truth, rms)
    assert error <= 2 * allowed + slack, f"error {error:.3g}, the plain formula's {allowed:.3g}, slack {slack:.3g}"


def _size(t: Tensor, rms: bool) -> float:
    return math.sqrt(float(t.square().mean())) if rms else float(t.abs().max())
