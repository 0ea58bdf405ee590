"""What the text encoder learns before it helps to paint: from a caption, what is named when and what lies where.

Denoising alone did not teach it relations in 476,000 pictures. Which colour is on the left depends on the order of the
names together with the word between them; either alone says nothing, so there is nothing to improve in small steps.
Nor did it learn from the answer alone (which colour is left, right, above ...) in 70,000 captions. Asked for the parts
of the answer as well, it knows the colours after 30,000; the shapes take longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scenes import BACKGROUND_WORDS, COLOURS, OPPOSITE, RADII, RELATIONS, SHAPES, Item, Scene
from torch import Tensor, nn

LOOK = (tuple(SHAPES), tuple(COLOURS), tuple(RADII))
PLACES = (*RELATIONS, "around")
CONVERSE = {**OPPOSITE, "inside": "around"}
NAMED = 3
QUESTIONS: tuple[tuple[str, ...], ...] = (
    *LOOK * NAMED,  # what is the shape like that is named first, second, third
    *LOOK * len(PLACES),  # and the one that is left of the other, right of it, ...
    (*PLACES, "anywhere"),  # how does the first lie to the second
    tuple(BACKGROUND_WORDS),
)
"""The possible answers to each."""
NOT_ASKED = -1


def answers(scene: Scene, caption: str) -> list[int]:
    """The right one of each of the `QUESTIONS`; NOT_ASKED where the caption, one of the scene's or empty, has none."""
    if not caption:
        return [NOT_ASKED] * len(QUESTIONS)
    words = caption.replace(",", "").split()
    named = sorted(scene.items, key=lambda item: words.index(item.colour))  # no two have one colour
    lying: dict[str, Item] = {}
    if scene.relation is not None:
        lying = dict(zip((scene.relation, CONVERSE[scene.relation]), scene.items, strict=True))
    asked = (*named, *[None] * (NAMED - len(named)), *map(lying.get, PLACES))
    found = [number for item in asked for number in (look(item) if item else [NOT_ASKED] * len(LOOK))]
    found.append(next((i for i, place in enumerate(PLACES) if lying.get(place) is named[0]), len(PLACES)))
    said = any(word in words for word in BACKGROUND_WORDS[scene.background])
    return [*found, tuple(BACKGROUND_WORDS).index(scene.background) if said else NOT_ASKED]


def look(item: Item) -> list[int]:
    """The numbers of its shape, colour and size."""
    return [names.index(name) for names, name in zip(LOOK, (item.shape, item.colour, item.size), strict=True)]


class Reader(nn.Module):
    """Linear guesses at the answers from the text encoder's state at each token. Needed for training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.guess = nn.Linear(width, sum(map(len, QUESTIONS)))

    def forward(self, states: Tensor, known: Sequence[Sequence[int]]) -> Tensor:
        """states: (N, tokens, width), known: N times `answers` -> the mean error over what is asked and the tokens

        A token knows what came before it; those after the caption's end know all. Cross entropy, in nats.
        """
        right = torch.tensor(known)[:, None].expand(-1, states.shape[1], -1)
        guesses = self.guess(states).split([len(names) for names in QUESTIONS], -1)
        errors = [
            nn.functional.cross_entropy(
                guess.flatten(0, 1), right[..., i].flatten(), ignore_index=NOT_ASKED, reduction="sum"
            )
            for i, guess in enumerate(guesses)
        ]
        return torch.stack(errors).sum() / (right != NOT_ASKED).sum().clamp(min=1)
