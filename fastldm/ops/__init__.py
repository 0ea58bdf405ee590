"""The contract: what a model may ask for, one typed function per op.

An op's boundary is a fusion boundary. `reference.py` computes each in plain PyTorch; `fused.py` will compute it with
kernels under the same signatures. A model imports this module and nothing below it.

    with ops.using("reference"):                       # one implementation for all ops, in this context
    with ops.using("fused", attention="reference"):    # and one op overridden: a wrong image is bisected by names

Letters, everywhere in this project:
    N C H W  images: batch, channels, height, width. Shape (N, C, H, W), channels_last in memory (NHWC)
    B L H D  attention: batch, length, heads, head dim
    M N K    matrix products: (M, K) times (K, N)
    S R G    steps of a schedule; rows of a sampler's table; guidance branches
"working dtype" is the dtype of the activations: float16, bfloat16 or float32 (float64 in tests), and of the weights.
 Statistics, softmax and the sampler's state are float32, or float64 where the working dtype is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "fused", "auto")
OPS = (
    "attention",
    "group_norm",
    "layer_norm",
    "linear",
    "geglu",
    "conv2d",
    "timestep_embedding",
    "begin_row",
    "end_row",
    "to_uint8",
)

Activation = Literal["silu", "gelu", "quick_gelu"]
Stats = Tensor  # (N, C, 2) float32: mean and M2 (sum of squared deviations) of each channel over H and W


@dataclass(frozen=True)
class RowTables:
    """The rows of a sampler on the device: what `begin_row` and `end_row` read at the row counter.

    All float32. R rows, K slots of state, G guidance branches. See `fastldm.sampling.SamplerTable` for the meaning.
    """

    in_scale: Tensor  # (R,)
    a: Tensor  # (R, K, K)
    b: Tensor  # (R, K)
    c: Tensor  # (R, K)
    d: Tensor  # (R, K)
    p: Tensor  # (R,)
    q: Tensor  # (R,)
    limit: Tensor  # (R,)
    u: Tensor  # (R,)
    v: Tensor  # (R,)
    guidance: Tensor  # (R, G): the weight of each branch's output; the last branch is the fully conditioned one
    rescale: Tensor  # (R,): 0 leaves the guided output alone


# ---------------------------------------------------------------------------------------------- choosing who computes


@dataclass(frozen=True)
class Selection:
    """Who computes each op in the current context."""

    default: str = "reference"
    overrides: dict[str, str] = field(default_factory=dict)
    want_stats: bool = False

    def of(self, op: str) -> str:
        return self.overrides.get(op, self.default)


_selection: ContextVar[Selection] = ContextVar("fastldm.ops.selection", default=Selection())  # noqa: B039  frozen


@contextmanager
def using(default: str, *, want_stats: bool | None = None, **overrides: str) -> Iterator[Selection]:
    """Select an implementation for the ops called in this context (thread, task), and restore the former at the end.

    default, overrides: names in `IMPLEMENTATIONS`; the keywords of `overrides` are names in `OPS`.
    want_stats: whether `conv2d` may be asked for the statistics of its output. By default only where they cost
        nothing: the reference would need a pass of its own.
    Raises ValueError naming what is not known.
    """
    for op, name in {"default": default, **overrides}.items():
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"{op}={name!r}: no such implementation; there are {', '.join(IMPLEMENTATIONS)}")
        if op != "default" and op not in OPS:
            raise ValueError(f"{op!r} is no op; the ops are {', '.join(OPS)}")
    stats = default != "reference" if want_stats is None else want_stats
    token = _selection.set(Selection(default, overrides, stats))
    try:
        yield _selection.get()
    finally:
        _selection.reset(token)


@functools.cache
def implementation(name: str) -> ModuleType:
    """The module that implements the contract under `name`."""
    return importlib.import_module(f"fastldm.ops.{name}")


def _call(op: str) -> Any:
    return getattr(implementation(_selection.get().of(op)), op)


# ------------------------------------------------------------------------------------------------------- the contract


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v for each head; the softmax is float32.

    q: (B, Lq, H, D); k, v: (B, Lk, H, D), working dtype: views of packed projections, last dimension contiguous.
    scale: 1/sqrt(D) where None. mask: additive, broadcastable to (B, H, Lq, Lk), −inf allowed (not for a whole row).
    -> (B, Lq, H, D), contiguous.
    """
    return _call("attention")(q, k, v, scale=scale, mask=mask)


def group_norm(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    groups: int,
    eps: float,
    *,
    x2: Tensor | None = None,
    act: Activation | None = None,
    stats: Stats | tuple[Stats | None, Stats | None] | None = None,
) -> Tensor:
    """act((x − mean) / sqrt(var + eps) · w + b), mean and (biased) variance over a group's channels, H and W.

    x: (N, C, H, W); x2: (N, C2, H, W) or None, as if concatenated behind x. w, b: (C + C2,).
    stats: what is known already: of x, or with x2 a pair, each None where it must be computed. act: None or "silu".
    -> (N, C + C2, H, W), channels_last.                                         Wu & He, arXiv 1803.08494.
    """
    return _call("group_norm")(x, w, b, groups, eps, x2=x2, act=act, stats=stats)


@overload
def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor: ...
@overload
def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x) · w + b over the last dimension; with `residual`, (norm(s) · w + b, s) where s = x + residual.

    x, residual: (..., C); w, b: (C,). -> like x.                            Ba, Kiros & Hinton, arXiv 1607.06450.
    """
    return _call("layer_norm")(x, w, b, eps, residual=residual)


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x wᵀ + b) + residual.

    x: (..., K); w: (N, K); b: (N,); residual: (..., N). -> (..., N). "gelu" is the exact one (erf),
    quick_gelu(x) = x · sigmoid(1.702 x).
    """
    return _call("linear")(x, w, b, act=act, residual=residual)


def geglu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """value · gelu(gate) where (value, gate) = split(x wᵀ + b); gelu is the exact one (erf).

    x: (..., K); w: (2 F, K), the value's rows first; b: (2 F,). -> (..., F).            Shazeer, arXiv 2002.05202.
    """
    return _call("geglu")(x, w, b)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    pad: Literal["same", "end"] = "same",
    upsample: tuple[int, int] | None = None,
    w_phases: Tensor | None = None,
    want_stats: bool = False,
) -> tuple[Tensor, Stats | None]:
    """conv(up(cat(x, x2)), w) + b + shift + residual, and the statistics of that for the next `group_norm`.

    x: (N, C, H, W); x2: (N, C2, H, W) or None; w: (O, C + C2, k, k), k = 1 or 3; b: (O,).
    shift: (N or 1, O), a vector per sample (the time embedding). residual: like the output.
    stride: 1 or 2. pad: "same" (k // 2 on every side) or "end" (one row below, one column right: the VAE's encoder).
    upsample: None, or the (height, width) to which the input is first enlarged by repeating pixels, each 2n or 2n − 1.
    w_phases: `phase_weights(w)`; an implementation may use them where it enlarges by exactly 2.
    want_stats: a hint. -> (y, stats): y (N, O, H', W') channels_last; stats None where nobody asked, or where the
    current context says that they are not free.
    """
    want = want_stats and _selection.get().want_stats
    return _call("conv2d")(
        x,
        w,
        b,
        x2=x2,
        shift=shift,
        residual=residual,
        stride=stride,
        pad=pad,
        upsample=upsample,
        w_phases=w_phases,
        want_stats=want,
    )


def phase_weights(w: Tensor) -> Tensor:
    """Weights of the four 2×2 convolutions that are an enlargement by 2 and w (O, C, 3, 3): summed in float32.

    -> (4, O, 2, 2, C), contiguous; phase 2 · (row's parity) + (column's parity). Of an even row's three taps the last
    two see the same input row, of an odd row's the first two. 4/9 of the products.
    """
    taps = w.permute(2, 3, 0, 1).to(compute_dtype(w.dtype))
    rows = _pairs(taps)  # parity, tap, 3, O, C
    both = _pairs(rows.permute(2, 0, 1, 3, 4))  # parity and tap of the column, then of the row, O, C
    return both.permute(2, 0, 4, 3, 1, 5).flatten(0, 1).to(w.dtype).contiguous()


def _pairs(taps: Tensor) -> Tensor:
    """(3, ...) -> (2, 2, ...): [[0, 1 + 2], [0 + 1, 2]]."""
    first, second, third = taps
    return torch.stack((first, second + third, first + second, third)).unflatten(0, (2, 2))


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    flip: bool,
    shift: float,
    w: Tensor | None = None,
    b: Tensor | None = None,
    act: Activation | None = None,
) -> Tensor:
    """Sinusoids of t: sin(t·f_i), cos(t·f_i), f_i = 10000^(−i / (dim/2 − shift)); then act(· wᵀ + b) where w is given.

    t: (...,) float32 or float64. flip: cosines first. An odd dim ends in a zero. w: (O, dim); b: (O,).
    -> (..., dim) in t's dtype, or (..., O) in w's.                    Vaswani et al., arXiv 1706.03762, section 3.5.
    """
    return _call("timestep_embedding")(t, dim, flip=flip, shift=shift, w=w, b=b, act=act)


def begin_row(
    state: Tensor, mods: Tensor, tables: RowTables, row: Tensor, *, model_input: Tensor, modulation: Tensor
) -> None:
    """Writes what the model reads in this row.

    state: (K, B, C, H, W); state[0] is x. mods: (R, M, Σ), M = 1 or G·B. row: (1,) int64, on the device.
    model_input: (G·B, C', H, W), channels_last; its first C channels become in_scale[row] · x in every branch g
    (rows g·B .. g·B + B), the others (mask, image latents) stay. modulation: (M, Σ) becomes mods[row].
    """
    _call("begin_row")(state, mods, tables, row, model_input=model_input, modulation=modulation)


def end_row(
    state: Tensor,
    e: Tensor,
    tables: RowTables,
    row: Tensor,
    *,
    noise: Tensor,
    mask: Tensor,
    z0: Tensor,
    n0: Tensor,
) -> None:
    """Guidance, the sampler's update of the state, the inpainting blend; then the row counter goes up by one.

        g         = Σ_g guidance[r, g] · e_g                                                   arXiv 2207.12598
        g         = φ · g · std(e_last) / std(g) + (1 − φ) · g,  φ = rescale[r]               arXiv 2305.08891, 3.4
        x0        = clamp(p[r] · x + q[r] · g, ±limit[r])
        state'[i] = Σ_j a[r, i, j] · state[j] + b[r, i] · g + c[r, i] · noise + d[r, i] · x0
        state'[0] = mask · state'[0] + (1 − mask) · (u[r] · z0 + v[r] · n0)

    state: (K, B, C, H, W), changed in place. e: (G·B, C, H, W), working dtype. noise, z0, n0: (B, C, H, W);
    mask: (B, 1, H, W), 1 where the model paints; all in the state's dtype. row: (1,) int64, on the device.
    """
    _call("end_row")(state, e, tables, row, noise=noise, mask=mask, z0=z0, n0=n0)


def to_uint8(pixels: Tensor) -> Tensor:
    """round(255 · clamp(x/2 + 1/2, 0, 1)), halves to even: x/2 + 1/2 in x's dtype, the product in float32.

    pixels: (B, C, H, W), decoded, about −1..1, finite; any strides. -> (B, H, W, C) uint8, contiguous. The bits are
    those of the same arithmetic on the host, so no picture depends on who computes this.
    """
    return _call("to_uint8")(pixels)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, softmax and the sampler's state for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
