"""Scenes, their pictures and captions: seeded, and true to the scene's data."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import scenes
from numpy.random import Generator, default_rng
from scenes import Item, Scene, caption, random_scene, render

MANY = 150


def drawn(kind: str, count: int = MANY, *, held_out: bool = False) -> list[Scene]:
    return [random_scene(default_rng((7, i)), kind, held_out=held_out) for i in range(count)]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_a_seed_gives_the_same_scene_picture_and_caption(kind: str) -> None:
    def made(seed: int) -> tuple[Scene, bytes, str]:
        scene = random_scene(default_rng(seed), kind)
        return scene, render(scene, 64).tobytes(), caption(scene, default_rng(seed))

    assert made(3) == made(3)
    assert made(3)[0] != made(4)[0]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_shapes_lie_apart_and_within_the_picture(kind: str) -> None:
    for scene in drawn(kind):
        assert len(scene.items) == {"single": 1, "triple": 3}.get(kind, 2)
        assert len({item.colour for item in scene.items}) == len(scene.items)
        for item in scene.items:
            low, high = scenes.RADII[item.size]
            assert low <= item.radius <= high
            assert item.radius <= min(item.x, item.y, 1 - item.x, 1 - item.y)
        if scene.relation != "inside":
            for a, b in itertools.combinations(scene.items, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + scenes.GAP


def test_relations_hold() -> None:
    related = drawn("relation", 400)
    assert {scene.relation for scene in related} == set(scenes.RELATIONS)
    for scene in related:
        a, b = scene.items
        apart = a.radius + b.radius
        holds = {
            "left of": b.x - a.x > apart and abs(a.y - b.y) < apart,
            "right of": a.x - b.x > apart and abs(a.y - b.y) < apart,
            "above": b.y - a.y > apart and abs(a.x - b.x) < apart,
            "below": a.y - b.y > apart and abs(a.x - b.x) < apart,
            "inside": math.hypot(a.x - b.x, a.y - b.y) + a.radius < b.radius,
        }
        assert [relation for relation, true in holds.items() if true] == [scene.relation]


@pytest.mark.parametrize("shape", scenes.ROOM)
@pytest.mark.parametrize("inner", scenes.SHAPES)
def test_what_is_inside_is_surrounded(shape: str, inner: str) -> None:
    """The inner shape, with room to spare, touches neither what is around the outer one nor, in a ring, the ring."""
    nested = next(scene for scene in drawn("relation") if scene.relation == "inside")
    outer = Item(shape, "blue", "large", 0.5, 0.5, nested.items[1].radius)
    small = Item(inner, "red", "small", 0.5, 0.5 + scenes.ROOM[shape] * outer.radius, 1.08 * nested.items[0].radius)
    filled = Item("circle" if shape == "ring" else shape, "blue", "large", 0.5, 0.5, outer.radius)
    image = render(Scene("black", (small, filled), "inside"), 128)
    alone = render(Scene("black", (filled,)), 128)
    assert (image == scenes.COLOURS["red"]).all(-1).any(), "it lies on top"
    assert not ((image != alone).any(-1) & (alone != scenes.COLOURS["blue"]).any(-1)).any()
    if shape == "ring":
        ring = render(Scene("black", (outer,)), 128)
        assert not ((image != alone).any(-1) & (ring != scenes.BACKGROUNDS["black"]).any(-1)).any()


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_shape_is_where_the_scene_says(shape: str) -> None:
    item = Item(shape, "green", "large", 0.401, 0.602, 0.2)
    image = render(Scene("white", (item,)), 200).astype(float)
    white, green = np.array(scenes.BACKGROUNDS["white"]), np.array(scenes.COLOURS["green"])
    cover = (image - white) @ (green - white) / ((green - white) @ (green - white))
    rows, columns = np.nonzero(cover > 0.5)
    reach = 200 * item.radius
    assert abs((columns.min() + columns.max() + 1) / 2 - 80) < 0.15 * reach
    assert abs((rows.min() + rows.max() + 1) / 2 - 120) < 0.15 * reach
    assert 0.85 * reach < (columns.max() + 1 - columns.min()) / 2 <= scenes.EXTENT * reach + 1
    part = (cover > 0.02) & (cover < 0.98)
    assert part.any(), "the edges are smooth"
    assert part.mean() < 0.05


def test_areas() -> None:
    side, radius = 512, scenes.RADII["large"][0]
    expected = {"circle": math.pi, "ring": math.pi * (1 - scenes.RING_HOLE**2), "square": 1.8**2, "diamond": 2 * 1.1**2}
    for shape, area in expected.items():
        rows, columns, cover = scenes._coverage(Item(shape, "red", "large", 0.5, 0.5, radius), side)
        assert cover.sum() == pytest.approx(area * (radius * side) ** 2, rel=0.005)
        assert cover.shape == (rows.stop - rows.start, columns.stop - columns.start)


def test_held_out_contents_are_never_drawn_for_training() -> None:
    kept = {scene.content for kind in scenes.KINDS for scene in drawn(kind)}
    held = {scene.content for kind in scenes.KINDS for scene in drawn(kind, 40, held_out=True)}
    assert not kept & held
    assert len(held) > 60


def test_content_is_one_however_it_is_said() -> None:
    a, b = (Item("circle", colour, "small", 0.5, 0.5, 0.1) for colour in ("red", "blue"))
    assert Scene("white", (a, b), "left of").content == Scene("black", (b, a), "right of").content
    assert Scene("white", (a, b), "above").content == Scene("black", (b, a), "below").content
    assert Scene("white", (a, b), "left of").content != Scene("white", (b, a), "left of").content
    assert Scene("white", (a, b)).content == Scene("white", (b, a)).content


# ------------------------------------------------------------------------------------------------------------ captions

LOOKUP = {phrase: relation for relation, phrases in scenes.RELATIONS.items() for phrase in phrases}
SIZES = {word: size for size, words in scenes.SIZE_WORDS.items() for word in words if word}
NAME = re.compile(rf"(?:({'|'.join(SIZES)}) )?({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.SHAPES)})")


def said(text: str) -> tuple[list[tuple[str, str, str]], str | None]:
    """The shapes of a caption as (size word, colour, shape), and the relation of the first to the second."""
    found = list(NAME.finditer(text))
    names = [(match[1] or "", match[2], match[3]) for match in found]
    if len(found) != 2:
        return names, None
    between = text[found[0].end() : found[1].start()].split()
    words = between[:-1] if between[-1] in scenes.ARTICLES or between[-1] == "an" else between
    phrase = " ".join(words)
    if phrase == "with":
        assert text[found[1].end() :].startswith(" inside")
        return names[::-1], "inside"
    assert phrase == "and" or phrase in LOOKUP, text
    return names, LOOKUP.get(phrase)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_a_caption_says_what_is_in_the_scene(kind: str) -> None:
    for i, scene in enumerate(drawn(kind)):
        text = caption(scene, default_rng(i))
        names, relation = said(text)
        items = list(scene.items)
        if relation is not None and relation != scene.relation:
            assert relation == scenes.OPPOSITE[scene.relation or ""], text
            items = items[::-1]
        assert (relation is None) == (scene.relation is None), text
        assert [name[1:] for name in names] == [(item.colour, item.shape) for item in items], text
        for (size, _, _), item in zip(names, items, strict=True):
            assert SIZES.get(size, item.size if relation == "inside" else "medium") == item.size, text
        grounds = [
            name for name, words in scenes.BACKGROUND_WORDS.items() if set(words) & set(re.findall(r"\w+", text))
        ]
        assert grounds in ([], [scene.background]), text
        assert not re.search(r"\ban? [^aeiou]\w+(?<=\ban \w)|  |\ba [aeiou]", text), text


def test_phrasings_vary() -> None:
    scene = drawn("relation", 1)[0]
    rng: Generator = default_rng(0)
    assert len({caption(scene, rng) for _ in range(100)}) > 60


def test_words_are_those_of_the_captions() -> None:
    used = {
        word
        for kind in scenes.KINDS
        for i, scene in enumerate(drawn(kind, 300))
        for word in re.findall(r"\w+", caption(scene, default_rng(i)))
    }
    assert used == set(scenes.words())
