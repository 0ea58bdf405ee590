"""What the U-Net is asked about its coarse features."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from looking import Looker, nearest
from reading import LOOK
from scenes import Item, Scene
from torch import nn

CIRCLE = Item("circle", "red", "small", 0.2, 0.5, 0.1)
STAR = Item("star", "blue", "large", 0.8, 0.5, 0.2)
RED_CIRCLE = [LOOK[0].index("circle"), LOOK[1].index("red"), LOOK[2].index("small")]
BLUE_STAR = [LOOK[0].index("star"), LOOK[1].index("blue"), LOOK[2].index("large")]


def test_what_is_nearest() -> None:
    """By the border, as if all were round: half-way between the centres the larger one is nearer."""
    found = nearest(Scene("white", (CIRCLE, STAR), "left of"), 4)
    assert found.shape == (4, 4, 3)
    assert (found[:, :2] == RED_CIRCLE).all()
    assert (found[:, 2:] == BLUE_STAR).all()
    middle = nearest(Scene("white", (CIRCLE, STAR), "left of"), 5)[2, 2]
    assert middle.tolist() == BLUE_STAR
    above = nearest(Scene("white", (Item("circle", "red", "small", 0.5, 0.2, 0.1), STAR)), 4)
    assert above[0, 1].tolist() == RED_CIRCLE, "rows are heights"
    assert (nearest(Scene("grey", (STAR,)), 8) == BLUE_STAR).all()


def test_of_two_nested_shapes_the_inner_one_is_nearest_in_the_middle() -> None:
    inner = replace(CIRCLE, x=0.55, y=0.55)
    outer = Item("square", "pink", "large", 0.55, 0.55, 0.2)
    found = nearest(Scene("white", (inner, outer), "inside"), 10)
    assert found[5, 5].tolist() == RED_CIRCLE
    assert (found[5, 4:7] == RED_CIRCLE).all()
    assert (found[5, [0, 1, 2, 8, 9], 0] == LOOK[0].index("square")).all()


class Blocks(nn.Module):
    """As much of a U-Net as a `Looker` sees: its middle and its first block upwards, of features that are given."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(4, 8))
        self.mid_block, self.up_blocks = nn.Identity(), nn.ModuleList([nn.Upsample(scale_factor=2)])

    def forward(self, x: torch.Tensor) -> None:
        self.up_blocks[0](self.mid_block(x))


def test_the_looker_judges_each_place_of_the_scenes_that_count() -> None:
    unet, star = Blocks(), replace(STAR, radius=CIRCLE.radius)  # so that the border is straight
    looker, scenes = Looker(unet), [Scene("white", (CIRCLE, star)), Scene("grey", (star,))]
    features = torch.zeros(2, 8, 4, 4)
    features[0, 0, :, :2] = features[:, 1, :, 2:] = features[1, 1] = 1.0
    unet(features)
    with torch.no_grad():
        for guess in looker.guesses:
            guess.weight.zero_()
            guess.bias.zero_()
    equal_odds = np.log([len(names) for names in LOOK]).mean()
    assert looker(scenes, torch.tensor([True, True])).item() == pytest.approx(equal_odds)
    with torch.no_grad():
        for guess in looker.guesses:
            for channel, look in ((0, RED_CIRCLE), (1, BLUE_STAR)):
                start = 0
                for number, names in zip(look, LOOK, strict=True):
                    guess.weight[start + number, channel] = 50.0
                    start += len(names)
    assert looker(scenes, torch.tensor([True, True])).item() == pytest.approx(0, abs=1e-6)
    swapped = [scenes[1], scenes[1]]
    assert looker(swapped, torch.tensor([False, True])).item() == pytest.approx(0, abs=1e-6), "the first does not count"
    assert looker(swapped, torch.tensor([True, True])).item() > 5
    assert looker(scenes, torch.tensor([False, False])).item() == 0
