"""How a kernel is held against its formula: by the rule of `tests/numerics.py`, with its outputs poisoned before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fastldm.kernels import launch
from tests.numerics import assert_within_twice
from tests.ops.formulas import untouched, up

_empty = launch.empty


def poisoned(*arguments: Any, **options: Any) -> Tensor:
    """An output full of NaN: what the kernel leaves out is found."""
    out = _empty(*arguments, **options)
    return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(-(2**30))


def held(module: ModuleType, op: str, formula: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Holds a launcher against a formula, one precision up and in the same dtype; no input may change.

    module: that of the kernel, or a mutant of it. Every output of a tuple is compared, unless the formula says None.
    -> the launcher's outputs
    """
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor))
    with untouched(arguments, options), patch.object(module, "empty", poisoned):
        out = getattr(module, op)(*arguments, **options)
    truth = formula(*up(arguments, dtype), **up(options, dtype))
    yardstick = formula(*arguments, **options)
    outs, truths, yardsticks = (t if isinstance(t, tuple) else (t,) for t in (out, truth, yardstick))
    assert len(outs) == len(truths)
    for each, true, plain in zip(outs, truths, yardsticks, strict=True):
        if true is not None:
            assert_within_twice(each, true, plain.to(each.dtype))
    return out


@contextmanager
def exact_products() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 numbers; here they are converted first."""
    product = InterpreterBuilder.create_dot

    def of_values(builder: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (builder.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return product(builder, a, b, *rest)

    with patch.object(InterpreterBuilder, "create_dot", of_values):
        yield
