"""Every op a second time, from its formula: loops and elementwise arithmetic in the dtype of the inputs.

Called one precision up these are the truth; called in the working dtype they are the yardstick of its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics import assert_within_twice, wider

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) * scale + mean).to(dtype)


def image(*shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """(N, C, H, W), channels_last."""
    return random(*shape, dtype=dtype, scale=scale, mean=mean).contiguous(memory_format=torch.channels_last)


def check(op: Callable[..., Tensor], formula: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Holds op(*args) against formula(*args) one precision up and in the same dtype; no input may change."""
    dtype = next(a.dtype for a in args if isinstance(a, Tensor))
    with untouched(args, options):
        out = op(*args, **options)
    assert out.dtype == dtype
    truth = formula(*up(args, dtype), **up(options, dtype))
    assert_within_twice(out, truth, formula(*args, **options).to(dtype))
    return out


def up(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with every tensor of `dtype` one precision up."""
    if isinstance(value, Tensor):
        return value.to(wider(dtype)) if value.dtype == dtype else value
    if isinstance(value, tuple):
        return tuple(up(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: up(v, dtype) for k, v in value.items()}
    return value


@contextmanager
def untouched(*values: Any) -> Iterator[None]:
    tensors = list(_tensors(values))
    kept = [t.clone() for t in tensors]
    yield
    for now, before in zip(tensors, kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# --------------------------------------------------------------------------------------------------------- formulas


def activated(x: Tensor, act: str | None) -> Tensor:
    if act is None:
        return x
    if act == "silu":
        return x / (1 + torch.exp(-x))
    if act == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    assert act == "gelu"
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    whole = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    bias = torch.zeros(whole, dtype=q.dtype) if mask is None else mask.to(q.dtype).expand(whole)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = (q[b, :, None, h] * k[b, None, :, h]).sum(-1) * scale + bias[b, h]
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            weights = weights / weights.sum(-1, keepdim=True)
            out[b, :, h] = (weights[:, :, None] * v[b, None, :, h]).sum(1)
    return out


def group_norm(
    x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, *, x2: Tensor | None = None, act: str | None = None
) -> Tensor:
    channels = [*x.unbind(1), *(() if x2 is None else x2.unbind(1))]
    size = len(channels) // groups
    out = []
    for start in range(0, len(channels), size):
        group = torch.stack(channels[start : start + size], dim=1)
        mean = group.mean((1, 2, 3), keepdim=True)
        var = (group - mean).square().mean((1, 2, 3), keepdim=True)
        rows = slice(start, start + size)
        out.append((group - mean) / torch.sqrt(var + eps) * w[rows, None, None] + b[rows, None, None])
    return activated(torch.cat(out, dim=1), act)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * w + b


def linear(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, act: str | None = None, residual: Tensor | None = None
) -> Tensor:
    y = torch.stack([(x * row).sum(-1) for row in w], dim=-1)
    y = activated(y if b is None else y + b, act)
    return y if residual is None else y + residual


def geglu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    half = len(w) // 2
    return linear(x, w[:half], b[:half]) * linear(x, w[half:], b[half:], act="gelu")


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    pad: str = "same",
    upsample: tuple[int, int] | None = None,
) -> Tensor:
    if x2 is not None:
        x = torch.cat((x, x2), dim=1)
    if upsample is not None:
        x = x[:, :, torch.arange(upsample[0]) // 2][:, :, :, torch.arange(upsample[1]) // 2]
    n, c, height, width = x.shape
    k = w.shape[-1]
    before, after = (0, 1) if pad == "end" else (k // 2, k // 2)
    padded = x.new_zeros(n, c, height + before + after, width + before + after)
    padded[:, :, before : before + height, before : before + width] = x
    rows, columns = ((side + before + after - k) // stride + 1 for side in (height, width))
    y = x.new_zeros(n, len(w), rows, columns)
    for i in range(rows):
        for j in range(columns):
            window = padded[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, :, i, j] = (window[:, None] * w[None]).sum((2, 3, 4))
    y = y if b is None else y + b[:, None, None]
    y = y if shift is None else y + shift[:, :, None, None]
    return y if residual is None else y + residual


def channel_stats(x: Tensor) -> Tensor:
    """(N, C, 2): mean and sum of squared deviations."""
    mean = x.mean((2, 3))
    return torch.stack((mean, (x - mean[:, :, None, None]).square().sum((2, 3))), dim=-1)


def to_uint8(pixels: Tensor) -> Tensor:
    """On the host, by NumPy."""
    unit = (pixels * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).numpy()
    return torch.from_numpy((unit * np.float32(255)).round().astype(np.uint8))
