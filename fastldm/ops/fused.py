"""Every op by its kernel. Raises `Unsupported` with the reason where no kernel takes the arguments.

The functions have the contract's signatures; what they compute stands in its docstrings (`fastldm/ops/__init__.py`).
Nothing here falls back; `ops.using("fused", linear="reference")` asks for another implementation of an op.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastldm.kernels import attention as attention_kernel
from fastldm.kernels import begin_row as begin_row_kernel
from fastldm.kernels import conv2d as conv2d_kernel
from fastldm.kernels import end_row as end_row_kernel
from fastldm.kernels import geglu as geglu_kernel
from fastldm.kernels import group_norm as group_norm_kernel
from fastldm.kernels import layer_norm as layer_norm_kernel
from fastldm.kernels import linear as linear_kernel
from fastldm.kernels import timestep_embedding as timestep_embedding_kernel
from fastldm.ops import Activation, RowTables, Stats


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    return attention_kernel.attention(q, k, v, scale=scale, mask=mask)


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
    return group_norm_kernel.group_norm(x, w, b, groups, eps, x2=x2, act=act, stats=stats)


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm_kernel.layer_norm(x, w, b, eps, residual=residual)


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    act: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return linear_kernel.linear(x, w, b, act=act, residual=residual)


def geglu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return geglu_kernel.geglu(x, w, b)


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
    return conv2d_kernel.conv2d(
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
        want_stats=want_stats,
    )


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
    return timestep_embedding_kernel.timestep_embedding(t, dim, flip=flip, shift=shift, w=w, b=b, act=act)


def begin_row(
    state: Tensor, mods: Tensor, tables: RowTables, row: Tensor, *, model_input: Tensor, modulation: Tensor
) -> None:
    begin_row_kernel.begin_row(state, mods, tables, row, model_input=model_input, modulation=modulation)


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
    end_row_kernel.end_row(state, e, tables, row, noise=noise, mask=mask, z0=z0, n0=n0)
