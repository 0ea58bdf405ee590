from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fastldm.kernels import attention as kernel
from fastldm.kernels import tuning
from fastldm.kernels.launch import DTYPES, Unsupported, recording
from tests.kernels.holding import exact_products, held
from tests.ops import formulas
from tests.ops.formulas import random

Case = Callable[[torch.dtype], dict[str, Tensor]]
FAR_BATCHES, FAR_ROWS = "batches past 2³¹", "rows past 2³¹"  # gigabytes that are reserved, not used


def plain(batch: int, lq: int, lk: int, heads: int, dim: int, **scales: float) -> Case:
    """scales: of q, k and v; 1 by default."""

    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: random(batch, length, heads, dim, dtype=dtype, scale=scales.get(name, 1.0))
            for name, length in (("q", lq), ("k", lk), ("v", lk))
        }

    return make


def packed(batch: int, length: int, heads: int, dim: int) -> Case:
    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v = random(batch, length, 3 * heads * dim, dtype=dtype).unflatten(-1, (3, heads, dim)).unbind(-3)
        return {"q": q[:, :40], "k": k, "v": v}

    return make


def of_all_layers(dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys and values between those of other layers."""
    k, v = (t.unflatten(-1, (2, 40)) for t in random(2, 77, 400, dtype=dtype)[..., 80:240].split(80, dim=-1))
    return {"q": random(2, 5, 2, 40, dtype=dtype), "k": k, "v": v}


def masked(case: Case, *shape: int, hidden: Callable[[Tensor], Tensor] | None = None) -> Case:
    """hidden: of a mask of ones, those that become −inf, one."""

    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        mask = random(*shape, dtype=dtype)
        if hidden is not None:
            mask = mask.masked_fill(hidden(torch.ones(shape)) == 1, -torch.inf)
        return {**case(dtype), "mask": mask}

    return make


def leading(mask: Tensor) -> Tensor:
    """The first 70 keys of every second query, a whole block."""
    mask[:, 70:] = 0
    mask[1::2] = 0
    return mask


def filled(like: Case, **values: float) -> Case:
    return lambda dtype: {n: torch.full_like(t, values[n]) if n in values else t for n, t in like(dtype).items()}


def moved(mean: float, like: Case, *names: str) -> Case:
    return lambda dtype: {n: t + mean if n in names else t for n, t in like(dtype).items()}


def extreme(dtype: torch.dtype) -> dict[str, Tensor]:
    arguments = plain(1, 5, 150, 1, 16)(dtype)
    arguments["v"] = torch.tensor([65504.0, -65504.0]).repeat(75)[None, :, None, None].to(dtype).repeat(1, 1, 1, 16)
    return arguments


def far(stride: tuple[int, int], lq: int, lk: int) -> Case:
    """Where 32 bits would lead, there are zeros."""

    def spread(length: int, batch: int, dtype: torch.dtype) -> Tensor:
        memory = torch.empty(2**31 + (batch - 1) * stride[0] + (length - 1) * stride[1] + 8, dtype=dtype)
        whole = memory.as_strided((batch, length, 1, 8), (*stride, 8, 1), 2**31)
        return whole.copy_(random(batch, length, 1, 8, dtype=dtype))

    def make(dtype: torch.dtype) -> dict[str, Tensor]:
        batch = 3 if stride[0] else 1
        return {n: spread(length, batch, dtype) for n, length in (("q", lq), ("k", lk), ("v", lk))}

    return make


CASES: dict[str, Case] = {
    "one of everything": plain(1, 1, 1, 1, 1),
    "odd sizes, head dim 7": plain(1, 33, 5, 3, 7),
    "text: 77 keys, head dim 40": plain(2, 9, 77, 2, 40),
    "77 keys, head dim 160, several blocks of queries to a program": plain(1, 530, 77, 1, 160),
    "77 keys, head dim 64, batch 3": plain(3, 2, 77, 1, 64),
    "77 keys, head dim 512": plain(1, 3, 77, 1, 512),
    "blocks and a tail of keys, head dim 40": plain(1, 130, 150, 2, 40),
    "blocks and a tail of keys, head dim 80": plain(1, 67, 154, 1, 80),
    "one block and one key, head dim 64": plain(1, 65, 129, 1, 64),
    "whole blocks, head dim 160": plain(1, 64, 192, 1, 160),
    "333 keys, head dim 8": plain(2, 3, 333, 2, 8),
    "head dim 72, of which 8 are in the second piece": plain(1, 3, 135, 1, 72),
    "head dim 128": plain(1, 3, 131, 1, 128),
    "head dim 200, padded to 256": plain(1, 3, 40, 1, 200),
    "the autoencoder's 512, in two parts": plain(1, 5, 133, 1, 512),
    "views of a packed projection": packed(2, 140, 2, 40),
    "views of all layers' keys": of_all_layers,
    "a mask for each head and query": masked(plain(2, 5, 77, 3, 40), 2, 3, 5, 77),
    "a causal mask": masked(plain(1, 77, 77, 1, 64), 77, 77, hidden=lambda m: m.triu(1)),
    "a mask of keys, over blocks and a tail": masked(plain(2, 9, 150, 1, 40), 2, 1, 1, 150),
    "a mask of each head, over blocks and a tail": masked(plain(1, 9, 150, 2, 8), 2, 1, 150),
    "a mask of queries, over blocks and a tail": masked(plain(1, 9, 150, 2, 80), 9, 1),
    "a mask that hides the first block": masked(plain(1, 6, 150, 2, 8), 6, 150, hidden=leading),
    "large scores": plain(1, 5, 140, 1, 8, q=30.0, k=30.0),
    "all equal: every key weighs the same": filled(plain(1, 3, 140, 1, 40), q=0.5, k=0.5),
    "queries of the largest half": filled(plain(1, 3, 140, 1, 8), q=65504.0, k=-0.125),
    "keys of mean 100, values of mean 1000": moved(100.0, moved(900.0, plain(1, 5, 150, 1, 40), "v"), "k", "v"),
    "values near the largest half": extreme,
    FAR_BATCHES: far((2**30, 8), 3, 5),
    FAR_ROWS: far((0, 2**24 - 8), 257, 150),  # the last row begins a block
}
HALF_ALONE = {
    FAR_BATCHES,
    FAR_ROWS,
    "77 keys, head dim 160, several blocks of queries to a program",
    "77 keys, head dim 512",
}


def check(module: ModuleType, case: str, dtype: torch.dtype, **options: Any) -> Tensor:
    arguments = CASES[case](dtype)
    mask = {"mask": arguments.pop("mask")} if "mask" in arguments else {}
    with patch.object(tuning, "WALKERS", 1), exact_products():
        out: Tensor = held(module, "attention", formulas.attention, *arguments.values(), **mask, **options)
    assert out.is_contiguous()
    return out


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in DTYPES if case not in HALF_ALONE or dtype.itemsize == 2],
    ids=str,
)
def test_attention(case: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    for case in ("odd sizes, head dim 7", "333 keys, head dim 8", "a mask for each head and query"):
        check(kernel, case, dtype, scale=scale)


@pytest.mark.parametrize("chip", [80, 100])
@pytest.mark.parametrize("case", ["77 keys, head dim 512", "whole blocks, head dim 160", "text: 77 keys, head dim 40"])
def test_tiles_of_other_chips(case: str, chip: int) -> None:
    with patch.object(tuning, "capability", lambda: chip):
        check(kernel, case, torch.float16)


def test_many_queries_over_few_keys_are_shared_out() -> None:
    """SD 1.5 at 512²: each program takes K and V once, for one block of queries in a row or more."""
    q, k = (torch.empty(16, length, 8, 40, device="meta", dtype=torch.half) for length in (4096, 77))
    with recording() as launches:
        kernel.attention(q, k, k)
    (one,) = launches
    assert one.kernel is kernel._short
    block, walk = one.arguments["BLOCK_M"], one.arguments["walk"]
    assert walk > block
    assert walk % block == 0
    assert one.grid == (-(-4096 // walk), 16 * 8)
    assert one.grid[0] * one.grid[1] >= tuning.WALKERS


def test_what_no_kernel_takes() -> None:
    x = torch.ones(1, 4, 2, 8)
    wide = torch.empty(1, 4, 2, 264)
    for arguments, options, reason in (
        ((x.double(),) * 3, {}, "q is float64, not float16, bfloat16, float32"),
        ((x.half(), x, x), {}, "k is float32 beside float16"),
        ((wide,) * 3, {}, "head dim 264: there are 1 to 256, and 512"),
        ((x.transpose(2, 3), x, x), {}, "the last dimension of q is not contiguous"),
        ((x, x[:, :3], x), {}, "k or v does not fit q"),
        ((x, x[:, :0], x[:, :0]), {}, "there are no keys"),
        ((x, x, x), {"scale": -1.0}, "scale=-1.0"),
        ((x, x, x), {"mask": torch.ones(4, 4, dtype=torch.bool)}, "the mask is torch.bool"),
        ((torch.empty(1).expand(2**16, 1, 1, 8).contiguous(),) * 3, {}, "more than 65535 heads"),
        ((torch.empty(2**24 + 1).as_strided((1, 2, 1, 1), (0, 2**24, 1, 1)),) * 3, {}, "the rows of q are too far"),
    ):
        with pytest.raises(Unsupported, match=reason):
            kernel.attention(*arguments, **options)
