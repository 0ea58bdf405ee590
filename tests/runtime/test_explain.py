"""Who computes a model's ops at a size."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from fastldm.config import text_config, unet_config, vae_config
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime.engine import Engine
from fastldm.runtime.explain import Explained, explained, table
from fastldm.runtime.plan import Shape
from fastldm.weights.load import skeleton
from tests.model import full_size
from tests.model.test_unet import SDXL


def explained_with(unet: dict[str, Any], shape: Shape) -> list[Explained]:
    engine = Engine(
        unet=skeleton(lambda: UNet(unet_config(unet))).half(),
        vae=skeleton(lambda: AutoencoderKL(vae_config(full_size.SD15_VAE))).half(),
        text_encoder=skeleton(lambda: TextEncoder(text_config(full_size.CLIP_L))).half(),
    )
    return list(explained(engine, shape, 2, "cuda"))


@pytest.fixture(scope="module")
def sd15() -> list[Explained]:
    return explained_with(full_size.SD15_UNET, Shape(1, 64, 64, 77))


def test_every_op_of_sd15_is_there_as_often_as_it_is_called(sd15: list[Explained]) -> None:
    calls: Counter[tuple[str, str]] = Counter()
    for row in sd15:
        calls[row.part, row.op] += row.calls
    assert calls["row", "attention"] == 32
    assert calls["row", "geglu"] == 16
    assert calls["row", "layer_norm"] == 48
    assert calls["row", "group_norm"] == 61  # two in each of 22 residual blocks, one in 16 transformers, one at the end
    assert calls["row", "begin_row"] == calls["row", "end_row"] == 1
    assert calls["text", "attention"] == 12
    assert calls["text", "linear"] == 4 * 12 + 1  # the keys and values of all layers are one more
    assert calls["steps", "timestep_embedding"] == 1
    assert calls["decode", "attention"] == 1
    assert calls["decode", "to_uint8"] == 1


def test_attention_and_norms_of_sd15_are_kernels(sd15: list[Explained]) -> None:
    for row in sd15:
        if row.op in ("attention", "group_norm", "layer_norm", "geglu", "timestep_embedding", "begin_row", "end_row"):
            assert row.by == "fused", row


def test_added_conditions_have_their_ops() -> None:
    """SDXL: six numbers of each sample and its pooled text become a modulation of its own."""
    rows = explained_with(SDXL, Shape(3, 16, 12, 77))
    steps = [(row.op, row.calls, row.what) for row in rows if row.part == "steps"]
    assert ("timestep_embedding", 1, "6×6 float32") in steps
    assert ("linear", 1, "6×80, 64×80 float16, act=silu") in steps
    begin, *_ = (row.what for row in rows if row.op == "begin_row")
    assert "128×6×" in begin
    assert any(row.op == "attention" and row.part == "row" for row in rows)


def test_the_table_is_aligned_and_complete(sd15: list[Explained]) -> None:
    lines = table(sd15).splitlines()
    assert len(lines) == len(sd15) + 1
    assert lines[0].split() == ["part", "op", "calls", "for", "by", "because"]
    place = lines[0].index("by")
    assert all(re.match(r"(fused|reference)\b", line[place:]) for line in lines[1:])
