"""The table of addresses: names, rows, and the hub's old spellings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastldm.model.layers import Linear
from fastldm.weights.keymap import Address, addresses, fits, present_name


class Packed(nn.Module):
    """Two layers that stand side by side in one weight, and one that stands alone."""

    hub_names = ((".down.", ".net.2."),)

    def __init__(self, parts: tuple[tuple[str, int], ...] = (("block.to_q", 2), ("block.to_k", 3))) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.down = Linear(4, 4)
        self.all = Linear(4, 5, parts=parts)


def test_names_and_rows() -> None:
    assert addresses(Packed()) == {
        "block.net.2.weight": Address("block.down.weight", 0, 4),
        "block.net.2.bias": Address("block.down.bias", 0, 4),
        "block.to_q.weight": Address("all.weight", 0, 2),
        "block.to_q.bias": Address("all.bias", 0, 2),
        "block.to_k.weight": Address("all.weight", 2, 5),
        "block.to_k.bias": Address("all.bias", 2, 5),
    }


def test_parts_are_relative_to_the_parent() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Packed()

    assert addresses(Outer())["inner.block.to_k.bias"] == Address("inner.all.bias", 2, 5)


@pytest.mark.parametrize("parts", [(("a", 2), ("b", 2)), (("a", 2), ("b", 4))])
def test_parts_must_cover_the_parameter(parts: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"all\.weight"):
        addresses(Packed(parts))


def test_two_places_for_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same\.weight would live at"):
        addresses(Packed((("same", 2), ("same", 3))))


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((4, 3), (4, 3), True),
        ((4, 3, 1, 1), (4, 3), True),
        ((4, 3, 1), (4, 3), False),
        ((4, 3, 3, 3), (4, 3), False),
        ((3, 4), (4, 3), False),
        ((3, 4, 1, 1), (4, 3), False),
        ((4, 3), (4, 3, 1, 1), False),
        ((4,), (4,), True),
        ((4, 1, 1), (4,), False),
        ((), (1,), False),
    ],
)
def test_fits(shape: tuple[int, ...], target: tuple[int, ...], expected: bool) -> None:
    assert fits(shape, torch.empty(target)) is expected


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.bias", "encoder.layers.0.mlp.fc1.bias"),
        ("text_model.text_model.weight", "text_model.weight"),
        ("text_projection.weight", "text_projection.weight"),
        ("text_model.embeddings.position_ids", None),
        ("embeddings.position_ids", None),
        ("embeddings.position_ids.weight", "embeddings.position_ids.weight"),
        ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
        ("encoder.mid_block.attentions.0.value.weight", "encoder.mid_block.attentions.0.to_v.weight"),
        ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
        ("attentions.0.query.weight", "attentions.0.query.weight"),
        ("down_blocks.0.attentions.1.norm.weight", "down_blocks.0.attentions.1.norm.weight"),
    ],
)
def test_present_name(name: str, present: str | None) -> None:
    assert present_name(name) == present
