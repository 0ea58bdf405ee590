"""The judge, on pictures whose content is known: real ones are found right, wrong captions are rejected."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import judge
import numpy as np
import PIL.Image
import pytest
import scenes
from judge import Thing, Wish
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from scenes import BACKGROUNDS, COLOURS, KINDS, RADII, RELATIONS, ROOM, SHAPES, Item, Scene
from scipy import ndimage

from fastldm.errors import ArgumentError

MANY = 200
Image = NDArray[np.uint8]


def wish_of(scene: Scene) -> Wish:
    things = tuple(Thing(item.shape, item.colour, item.size) for item in scene.items)
    return Wish(things, scene.relation, scene.background)


def drawn(count: int = MANY, seed: int = 0) -> list[Scene]:
    return [scenes.random_scene(default_rng((seed, i)), KINDS[i % len(KINDS)]) for i in range(count)]


@pytest.fixture(scope="module")
def looked() -> list[tuple[Scene, judge.Sight]]:
    return [(scene, judge.look(scenes.render(scene, 128))) for scene in drawn()]


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_is_parsed_to_its_scene(kind: str) -> None:
    for i in range(500):
        rng = default_rng((1, i))
        scene = scenes.random_scene(rng, kind)
        text = scenes.caption(scene, rng)
        wish, true = judge.parse(text), wish_of(scene)
        if wish.relation != true.relation:
            assert wish.relation == scenes.OPPOSITE[true.relation or ""], text
            wish = dataclasses.replace(wish, things=wish.things[::-1], relation=true.relation)
        assert wish.background in (None, true.background), text
        assert dataclasses.replace(wish, background=true.background) == true, text


def test_the_background_is_asked_for_where_it_is_said() -> None:
    asked = {text: judge.parse(f"a red ring{text}").background for text in ("", " on gray", ", black background")}
    assert list(asked.values()) == [None, "grey", "black"]
    assert judge.parse("A picture of a red ring on a White background").background == "white"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size or a colour .*found nothing at character 0"),
        ("a maroon circle", r"expected a size or a colour \(red, .*, pink\), found 'maroon' at character 2"),
        ("a small circle", r"expected a colour \(red, .*\), found 'circle' at character 8"),
        ("a red dog on white", "expected a shape .*found 'dog' at character 6"),
        ("a red ring near a blue star", "expected a relation, .*found 'near' at character 11"),
        ("a red ring, a blue star", "expected 'and', found nothing at character 23"),
        ("a red ring with a blue star", "expected 'inside', found nothing at character 27"),
        ("a red ring on a purple background", "expected a relation, .*found 'on' at character 11"),
        ("a red ring and", "found nothing at character 14"),
    ],
)
def test_other_text_is_an_error_that_says_where(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        judge.parse(text)
    assert caught.value.field == "caption"


# -------------------------------------------------------------------------------------------------------- real pictures


def blurred(image: Image, rng: Generator) -> Image:
    return ndimage.gaussian_filter(image.astype(np.float32), (1.5, 1.5, 0)).round().astype(np.uint8)


def noisy(image: Image, rng: Generator) -> Image:
    return (image + rng.normal(0, 12, image.shape)).clip(0, 255).round().astype(np.uint8)


def compressed(image: Image, rng: Generator) -> Image:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(PIL.Image.open(file))


def shares(pairs: list[tuple[Wish, judge.Sight]]) -> tuple[float, float]:
    """Of the properties, and of the scenes, how many are found right."""
    verdicts = [judge.compare(wish, sight) for wish, sight in pairs]
    checks = [check.right for verdict in verdicts for check in verdict.checks]
    return sum(checks) / len(checks), sum(verdict.right for verdict in verdicts) / len(verdicts)


def test_real_pictures_are_found_right(looked: list[tuple[Scene, judge.Sight]]) -> None:
    properties, whole = shares([(wish_of(scene), sight) for scene, sight in looked])
    assert properties >= 0.99
    assert whole >= 0.99


@pytest.mark.parametrize("spoil", [blurred, noisy, compressed])
def test_so_are_spoilt_ones(spoil: Callable[[Image, Generator], Image]) -> None:
    rng = default_rng(3)
    spoilt = [(wish_of(scene), judge.look(spoil(scenes.render(scene, 128), rng))) for scene in drawn(MANY // 3, 2)]
    assert shares(spoilt)[0] >= 0.99


@pytest.mark.parametrize("inner", SHAPES)
@pytest.mark.parametrize("outer", ROOM)
def test_one_shape_inside_another(inner: str, outer: str) -> None:
    small = Item(inner, "red", "small", 0.5, 0.5 + ROOM[outer] * RADII["large"][1], RADII["small"][0])
    large = Item(outer, "blue", "large", 0.5, 0.5, RADII["large"][1])
    scene = Scene("grey", (small, large), "inside")
    assert judge.compare(wish_of(scene), judge.look(scenes.render(scene, 128))).wrong == ()


@pytest.mark.parametrize("colours", list(itertools.permutations(("red", "yellow", "cyan", "blue"), 2)))
def test_blurred_edges_are_no_shapes(colours: tuple[str, str]) -> None:
    """Between two colours there are others of the palette: orange between red and yellow."""
    inner, outer = colours
    items = Item("circle", inner, "small", 0.5, 0.5, 0.1), Item("square", outer, "large", 0.5, 0.5, 0.2)
    image = ndimage.gaussian_filter(scenes.render(Scene("white", items), 128).astype(np.float32), (3, 3, 0))
    assert {found.colour for found in judge.look(image.round().astype(np.uint8)).found} == {inner, outer}


def test_where_a_shape_is_and_how_large(looked: list[tuple[Scene, judge.Sight]]) -> None:
    for scene, sight in looked:
        for item in scene.items:
            found = next(found for found in sight.found if found.colour == item.colour)
            assert abs(found.x - item.x) < 0.005
            assert abs(found.y - item.y) < 0.005
            assert found.radius == pytest.approx(item.radius, rel=0.03)


# ------------------------------------------------------------------------------------------------------- wrong captions


def other(value: str, choices: Mapping[str, Any] | tuple[str, ...], rng: Generator, but: tuple[str, ...] = ()) -> str:
    left = [choice for choice in choices if choice != value and choice not in but]
    return left[int(rng.integers(len(left)))]


def changed(wish: Wish, name: str, rng: Generator) -> Wish | None:
    """With one property changed; None where there is none of this name."""
    things = list(wish.things)
    i = int(rng.integers(len(things)))
    if name == "relation":
        return wish.relation and dataclasses.replace(wish, relation=other(wish.relation, RELATIONS, rng))
    if name == "background":
        return dataclasses.replace(wish, background=other(wish.background or "", BACKGROUNDS, rng))
    colours = tuple(thing.colour for thing in things)
    if name == "one more":
        things.append(Thing("circle", other("", COLOURS, rng, colours), "medium"))
    elif name == "one less":
        if len(things) == 1 or wish.relation:
            return None
        del things[i]
    else:
        choices = {"colour": COLOURS, "shape": SHAPES, "size": RADII}[name]
        new = other(getattr(things[i], name), choices, rng, colours if name == "colour" else ())
        things[i] = things[i]._replace(**{name: new})
    return dataclasses.replace(wish, things=tuple(things))


@pytest.mark.parametrize("name", ["colour", "shape", "size", "relation", "background", "one more", "one less"])
def test_wrong_captions_are_rejected(name: str, looked: list[tuple[Scene, judge.Sight]]) -> None:
    rng = default_rng(4)
    wrong = [(changed(wish_of(scene), name, rng), sight) for scene, sight in looked]
    accepted = [judge.compare(wish, sight).right for wish, sight in wrong if wish is not None]
    assert len(accepted) >= MANY // 4
    assert sum(accepted) <= 0.05 * len(accepted)


def test_colours_of_two_shapes_swapped(looked: list[tuple[Scene, judge.Sight]]) -> None:
    """Everything asked for is there, but not together."""
    for scene, sight in looked:
        if len(scene.items) == 2 and scene.items[0].shape != scene.items[1].shape:
            a, b = wish_of(scene).things
            swapped = (a._replace(colour=b.colour), b._replace(colour=a.colour))
            verdict = judge.compare(Wish(swapped), sight)
            assert not verdict.right
            assert {check.name for check in verdict.wrong} <= {"shape", "size"}, "colours are matched first"


# ------------------------------------------------------------------------------------------------------------- verdicts


def test_a_verdict_says_what_is_wrong() -> None:
    items = Item("circle", "red", "small", 0.3, 0.5, 0.09), Item("star", "blue", "medium", 0.7, 0.5, 0.14)
    image = scenes.render(Scene("white", items), 128)
    assert judge.judge("a small red circle left of a blue star on white", image).right
    verdict = judge.judge("a big red ring to the right of a blue star on a black background", image)
    wrong = {(check.name, check.asked, check.found, check.thing) for check in verdict.wrong}
    assert wrong == {
        ("background", "black", "white", None),
        ("shape", "ring", "circle", 0),
        ("size", "large", "small", 0),
        ("relation", "right of", "left of", None),
    }
    missing = judge.judge("a tiny red circle, a blue star and a green heart", image)
    assert {(c.name, c.found, c.thing) for c in missing.wrong} == {
        ("count", 2, None),
        *((name, None, 2) for name in ("colour", "shape", "size")),
    }


@pytest.mark.parametrize(("x", "y"), [(0.3, 0.1), (-0.3, 0.1), (0.1, 0.3), (0.1, -0.3)])
def test_opposite_relations_are_one(x: float, y: float) -> None:
    items = Item("cross", "red", "small", 0.5, 0.5, 0.09), Item("heart", "blue", "small", 0.5 + x, 0.5 + y, 0.09)
    cross, heart = sorted(judge.look(scenes.render(Scene("black", items), 128)).found, key=lambda f: f.colour != "red")
    named = judge.relation(cross, heart)
    assert named == {(True, True): "left of", (True, False): "right of", (False, True): "above"}.get(
        (abs(x) > abs(y), x + y > 0), "below"
    )
    assert judge.relation(heart, cross) == scenes.OPPOSITE[named]


def test_pictures_of_nothing() -> None:
    flat = np.full((128, 128, 3), 250, np.uint8)
    assert judge.look(flat) == judge.Sight("white", ())
    noise = default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    coarse = np.asarray(PIL.Image.fromarray(noise[:16, :16]).resize((128, 128), PIL.Image.Resampling.BICUBIC))
    for image in (flat, noise, coarse):
        assert not judge.judge("a red circle", image).right
    assert judge.look(np.full((128, 128, 3), (220, 40, 40), np.uint8)).background is None


def test_a_shape_that_is_none_and_a_colour_that_is_none() -> None:
    image = np.full((128, 128, 3), 250, np.uint8)
    image[20:30, 20:100] = COLOURS["green"]
    image[60:90, 40:70] = 90, 60, 30
    bar, brown = sorted(judge.look(image).found, key=lambda found: found.y)
    assert (bar.shape, bar.colour) == (None, "green")
    assert (brown.shape, brown.colour) == ("square", None)


def test_other_sizes_and_forms_of_the_image_make_no_difference() -> None:
    text = "a small red circle above a large blue square"
    items = Item("circle", "red", "small", 0.5, 0.2, 0.09), Item("square", "blue", "large", 0.5, 0.6, 0.2)
    scene = Scene("grey", items, "above")
    image = scenes.render(scene, 128)
    for form in (image, image / 255, PIL.Image.fromarray(image), scenes.render(scene, 256), scenes.render(scene, 64)):
        assert judge.judge(text, form).wrong == ()
    for bad in (image[:100], image[..., :1], image[0]):
        with pytest.raises(ArgumentError, match="image: has the shape"):
            judge.judge(text, bad)


def test_shapes_are_told_apart_clearly() -> None:
    """As long as they are sharp."""
    sharp: dict[str, NDArray[np.float32]] = {}
    for shape, form in judge._templates():
        sharp.setdefault(shape, form.values)
    assert set(sharp) == set(SHAPES)
    for a, b in itertools.combinations(SHAPES, 2):
        assert float(sharp[a] @ sharp[b]) < 0.95
