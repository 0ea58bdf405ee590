"""What the U-Net is asked while it learns to paint: what lies nearest to each place of its coarse features.

The text encoder may tell what is on the left, and the features where they are (linear probes found both), and still
nothing joined the two in 1,000 steps: of a picture that is all noise, knowing it makes the prediction hardly better.
What is nearest is the same in all of a half of such a picture. Asked for it, the U-Net learns it in some 600 steps, and
with it where to paint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reading import LOOK, look
from scenes import Scene
from torch import Tensor, nn


def nearest(scene: Scene, side: int) -> NDArray[np.int64]:
    """-> (side, side, 3): for each field's centre the numbers of shape, colour and size of what has the nearest border.

    So the inner one of two nested shapes is nearest in its middle.
    """
    centres = (np.arange(side) + 0.5) / side
    distances = [abs(np.hypot(centres[None] - item.x, centres[:, None] - item.y) - item.radius) for item in scene.items]
    return np.array([look(item) for item in scene.items])[np.argmin(distances, 0)]


class Looker(nn.Module):
    """Linear guesses from what the U-Net's middle and its first block upwards made last. For training alone."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        blocks, channels = (unet.mid_block, unet.up_blocks[0]), unet.config.block_out_channels[-1]
        self.guesses = nn.ModuleList(nn.Linear(channels, sum(map(len, LOOK))) for _ in blocks)
        self.seen: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(partial(self._note, i))

    def _note(self, number: int, block: nn.Module, arguments: object, output: Tensor) -> None:
        self.seen[number] = output

    def forward(self, scenes: Sequence[Scene], asked: Tensor) -> Tensor:
        """The cross entropy in nats, mean over those scenes of the U-Net's last batch that are asked. (N,) bool"""
        if not asked.any():
            return torch.zeros(())
        losses = []
        for i, guess in enumerate(self.guesses):
            seen = self.seen[i]
            right = torch.from_numpy(np.stack([nearest(scene, seen.shape[-1]) for scene in scenes]))[asked]
            guesses = guess(seen.permute(0, 2, 3, 1)[asked]).split([len(names) for names in LOOK], -1)
            losses += [
                nn.functional.cross_entropy(guessed.flatten(0, 2), right[..., k].flatten())
                for k, guessed in enumerate(guesses)
            ]
        return torch.stack(losses).mean()
