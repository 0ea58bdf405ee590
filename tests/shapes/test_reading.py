"""What the text encoder is asked about captions, and that it learns to answer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from reading import CONVERSE, LOOK, NAMED, NOT_ASKED, PLACES, QUESTIONS, Reader, answers
from scenes import BACKGROUNDS, KINDS, Item, Scene, caption, random_scene

CIRCLE = Item("circle", "red", "small", 0.2, 0.5, 0.09)
STAR = Item("star", "blue", "large", 0.7, 0.5, 0.2)
HEART = Item("heart", "pink", "medium", 0.5, 0.9, 0.14)
WHO = (*(f"named {i}" for i in range(NAMED)), *PLACES)


def told(scene: Scene, text: str) -> Mapping[str, str]:
    """The answers in words, without those that are not asked."""
    keys = [*(f"{who} {what}" for who in WHO for what in ("shape", "colour", "size")), "first", "background"]
    found = zip(keys, QUESTIONS, answers(scene, text), strict=True)
    return {key: names[number] for key, names, number in found if number != NOT_ASKED}


def look(who: str, item: Item) -> dict[str, str]:
    return {f"{who} shape": item.shape, f"{who} colour": item.colour, f"{who} size": item.size}


@pytest.mark.parametrize(
    ("text", "named", "relation", "first"),
    [
        ("a small red circle left of a large blue star", (CIRCLE, STAR), "left of", "left of"),
        ("a picture of the big blue star, to the right of a tiny red circle", (STAR, CIRCLE), "left of", "right of"),
        ("a red circle inside a blue star on white", (CIRCLE, STAR), "inside", "inside"),
        ("a blue star with a red circle inside, white background", (STAR, CIRCLE), "inside", "around"),
    ],
)
def test_two_wordings_of_a_relation(text: str, named: tuple[Item, Item], relation: str, first: str) -> None:
    """The order of the names differs, what lies where does not."""
    converse = {"left of": "right of", "inside": "around"}[relation]
    assert told(Scene("white", (CIRCLE, STAR), relation), text) == {
        **look("named 0", named[0]),
        **look("named 1", named[1]),
        **look(relation, CIRCLE),
        **look(converse, STAR),
        "first": first,
        **({"background": "white"} if "white" in text else {}),
    }


def test_without_a_relation_nothing_lies_anywhere() -> None:
    scene = Scene("black", (CIRCLE, STAR, HEART))
    text = "a red circle, a blue star and a pink heart"
    names = {key: value for i, item in enumerate(scene.items) for key, value in look(f"named {i}", item).items()}
    assert told(scene, text) == {**names, "first": "anywhere"}
    assert told(Scene("grey", (HEART,)), "pink heart on gray") == {
        **look("named 0", HEART),
        "first": "anywhere",
        "background": "grey",
    }


def test_of_a_dropped_caption_nothing_is_asked() -> None:
    assert answers(Scene("black", (CIRCLE,)), "") == [NOT_ASKED] * len(QUESTIONS)


def test_every_caption_has_answers() -> None:
    for i in range(400):
        scene = random_scene(np.random.default_rng(i), KINDS[i % len(KINDS)])
        text = caption(scene, np.random.default_rng(i))
        found = told(scene, text)
        order = sorted((item.colour for item in scene.items), key=text.index)
        assert [found[f"named {k} colour"] for k in range(len(order))] == order
        assert sum(key.startswith("named") for key in found) == 3 * len(scene.items)
        assert found.get("background", scene.background) == scene.background
        if scene.relation is not None:
            assert look(scene.relation, scene.items[0]).items() <= found.items()
            assert look(CONVERSE[scene.relation], scene.items[1]).items() <= found.items()
            assert found["first"] in (scene.relation, CONVERSE[scene.relation])


def test_the_reader_counts_what_is_asked_alone() -> None:
    """A guess of equal odds costs the logarithm of the number of choices; right ones cost nothing."""
    torch.manual_seed(0)
    reader, states = Reader(8), torch.randn(2, 5, 8)
    with torch.no_grad():
        reader.guess.weight.zero_()
        reader.guess.bias.zero_()
    asked = [NOT_ASKED] * len(QUESTIONS)
    assert reader(states, [asked, asked]).item() == 0
    colour, background = 1, len(QUESTIONS) - 1
    one = [*asked[:colour], 3, *asked[colour + 1 :]]
    both = [*one[:background], 0]
    sizes = np.log([len(LOOK[1]), len(BACKGROUNDS)])
    assert reader(states, [asked, one]).item() == pytest.approx(sizes[0])
    assert reader(states, [one, both]).item() == pytest.approx((2 * sizes[0] + sizes[1]) / 3)
    with torch.no_grad():
        reader.guess.bias[len(LOOK[0]) + 3] = 50.0
    assert reader(states, [asked, one]).item() == pytest.approx(0)
