"""Scenes of coloured shapes: data, from which the picture, its caption and any check of it are made.

    scene = random_scene(np.random.default_rng(0), "relation")
    render(scene, 128), caption(scene, np.random.default_rng(1))

Lengths are fractions of the picture's side; x grows to the right, y downwards. The colours of a scene's shapes differ.
A size that no word says is the medium one, but for shapes inside one another: there the inner is always small and the
outer large. One content in sixteen is held out: random_scene draws either those or the others, never both.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

RGB = tuple[int, int, int]
Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS: Mapping[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (50, 205, 220),
    "blue": (40, 80, 215),
    "purple": (130, 50, 175),
    "pink": (245, 130, 190),
}
BACKGROUNDS: Mapping[str, RGB] = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (15, 15, 15)}
RADII: Mapping[str, tuple[float, float]] = {"small": (0.085, 0.1), "medium": (0.135, 0.15), "large": (0.19, 0.205)}
KINDS = ("single", "pair", "relation", "triple")

EXTENT = 1.1  # no shape of radius 1 reaches further from its centre along an axis
MARGIN = 0.02  # to the picture's border
GAP = 0.05  # between two shapes, at least
DRIFT = 0.06  # how far two shapes side by side may be from one height
RING_HOLE = 0.62  # of a ring's radius
ROOM: Mapping[str, float] = {"circle": 0.0, "square": 0.0, "diamond": 0.0, "ring": 0.0, "triangle": 0.19}
"""What a small shape fits into when large -> how far below its centre the room is, in radii."""

SUPERSAMPLES = 4  # along each axis
HELD_OUT = 16


@dataclass(frozen=True)
class Item:
    """One shape, with its centre (x, y)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """relation: how the first of two items lies to the second, one of `RELATIONS`; None: nothing is said of it."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None

    @property
    def content(self) -> str:
        """What is in the picture, not where exactly nor on which background; one spelling however it is said."""
        items, relation = self.items, self.relation
        if relation in ("right of", "below"):
            items, relation = items[::-1], OPPOSITE[relation]
        names = [f"{item.size} {item.colour} {item.shape}" for item in items]
        return f" {relation} ".join(names) if relation else ", ".join(sorted(names))

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.content.encode()) % HELD_OUT == 0


# ------------------------------------------------------------------------------------------------------ drawing scenes


def random_scene(rng: Generator, kind: str, *, held_out: bool = False) -> Scene:
    """kind: one of `KINDS`. The same state of `rng` gives the same scene."""
    draw = {"single": _single, "pair": _apart, "triple": _apart, "relation": _related}[kind]
    while True:
        scene = draw(rng, {"single": 1, "triple": 3}.get(kind, 2))
        if scene is not None and scene.held_out == held_out:
            return scene


def _single(rng: Generator, count: int) -> Scene:
    (look,) = _looks(rng, count)
    return Scene(_pick(rng, BACKGROUNDS), (_place(look, *_anywhere(rng, look)),))


def _apart(rng: Generator, count: int) -> Scene | None:
    """Shapes anywhere, none near another; None where there was no room."""
    looks = _looks(rng, count)
    items = tuple(_place(look, *_anywhere(rng, look)) for look in looks)
    free = all(
        max(abs(a.x - b.x), abs(a.y - b.y)) >= EXTENT * (a.radius + b.radius) + GAP
        for a, b in itertools.combinations(items, 2)
    )
    return Scene(_pick(rng, BACKGROUNDS), items) if free else None


def _related(rng: Generator, count: int) -> Scene:
    relation = _pick(rng, RELATIONS)
    if relation == "inside":
        return _nested(rng)
    looks = _looks(rng, count)
    in_order = looks if relation in ("left of", "above") else looks[::-1]
    along = _in_a_row(rng, [EXTENT * look.radius for look in in_order])
    if in_order is not looks:
        along = along[::-1]
    across = _side_by_side(rng, looks)
    items = []
    for look, main, other in zip(looks, along, across, strict=True):
        x, y = (main, other) if relation in ("left of", "right of") else (other, main)
        items.append(_place(look, x, y))
    return Scene(_pick(rng, BACKGROUNDS), tuple(items), relation)


def _nested(rng: Generator) -> Scene:
    """The smallest of the small shapes in the largest of the large: a square's corners just fit into a ring."""
    inner, outer = _looks(rng, 2, sizes=("small", "large"))
    inner = inner._replace(radius=RADII["small"][0])
    outer = outer._replace(radius=RADII["large"][1], shape=_pick(rng, ROOM))
    x, y = _anywhere(rng, outer)
    items = _place(inner, x, y + ROOM[outer.shape] * outer.radius), _place(outer, x, y)
    return Scene(_pick(rng, BACKGROUNDS), items, "inside")


class _Look(NamedTuple):
    shape: str
    colour: str
    size: str
    radius: float


def _looks(rng: Generator, count: int, sizes: Sequence[str] | None = None) -> list[_Look]:
    colours = [str(colour) for colour in rng.choice(list(COLOURS), count, replace=False)]
    chosen = sizes or [_pick(rng, RADII) for _ in range(count)]
    return [
        _Look(_pick(rng, SHAPES), c, s, float(rng.uniform(*RADII[s]))) for c, s in zip(colours, chosen, strict=True)
    ]


def _place(look: _Look, x: float, y: float) -> Item:
    return Item(look.shape, look.colour, look.size, x, y, look.radius)


def _anywhere(rng: Generator, look: _Look) -> tuple[float, float]:
    reach = MARGIN + EXTENT * look.radius
    x, y = rng.uniform(reach, 1 - reach, 2)
    return float(x), float(y)


def _in_a_row(rng: Generator, halves: Sequence[float]) -> list[float]:
    """Centres of two things of these half widths, the first one first."""
    first, second = halves
    slack = 1 - 2 * (MARGIN + first + second) - GAP
    before, between = np.sort(rng.uniform(0, slack, 2))
    start = MARGIN + before + first
    return [float(start), float(start + first + second + GAP + between - before)]


def _side_by_side(rng: Generator, looks: Sequence[_Look]) -> list[float]:
    """Coordinates across the row, near one another."""
    reach = [MARGIN + EXTENT * look.radius for look in looks]
    line = rng.uniform(max(reach), 1 - max(reach))
    return [float(np.clip(line + rng.uniform(-DRIFT, DRIFT), r, 1 - r)) for r in reach]


def _pick(rng: Generator, choices: Sequence[str] | Mapping[str, object]) -> str:
    return list(choices)[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------------------ pictures


def render(scene: Scene, side: int) -> NDArray[np.uint8]:
    """-> (side, side, 3), anti-aliased; smaller shapes lie on larger ones."""
    image = np.empty((side, side, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in sorted(scene.items, key=lambda item: -item.radius):
        rows, columns, cover = _coverage(item, side)
        image[rows, columns] += cover[..., None] * (np.array(COLOURS[item.colour], np.float32) - image[rows, columns])
    return np.rint(image).astype(np.uint8)


def _coverage(item: Item, side: int) -> tuple[slice, slice, Floats]:
    """The rows and columns that an item may touch, and how much of each of their pixels it covers."""
    reach = EXTENT * item.radius
    spans = []
    for centre in (item.y, item.x):
        first, last = int(np.floor((centre - reach) * side)), int(np.ceil((centre + reach) * side))
        spans.append(slice(max(first, 0), min(last, side)))
    v, u = (
        ((np.arange(span.start * SUPERSAMPLES, span.stop * SUPERSAMPLES) + 0.5) / (SUPERSAMPLES * side) - centre)
        / item.radius
        for span, centre in zip(spans, (item.y, item.x), strict=True)
    )
    inside = _inside(item.shape, u.astype(np.float32)[None, :], v.astype(np.float32)[:, None])
    height, width = (span.stop - span.start for span in spans)
    cover = inside.reshape(height, SUPERSAMPLES, width, SUPERSAMPLES).mean((1, 3), dtype=np.float32)
    return spans[0], spans[1], cover


def _inside(shape: str, u: Floats, v: Floats) -> Mask:
    """u: (1, W), v: (H, 1), in radii from the centre -> (H, W)."""
    if shape in ("circle", "ring"):
        square = u * u + v * v
        return (square <= 1) & (square >= RING_HOLE**2) if shape == "ring" else square <= 1
    return _in_polygon(_OUTLINES[shape], u, v)


def _in_polygon(corners: Floats, u: Floats, v: Floats) -> Mask:
    """By the even-odd rule: how many edges lie to the right."""
    odd = np.zeros((v.shape[0], u.shape[1]), bool)
    for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if v0 != v1:
            crossed = (v < v0) != (v < v1)
            odd ^= crossed & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
    return odd


def _outlines() -> dict[str, Floats]:
    turn = np.arange(10) * np.pi / 5
    spikes = np.where(np.arange(10) % 2 == 0, 1.1, 0.48)
    bend = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    heart_v = -(13 * np.cos(bend) - 5 * np.cos(2 * bend) - 2 * np.cos(3 * bend) - np.cos(4 * bend))
    arm, half = 1.02, 0.36
    corner = [(-half, -arm), (half, -arm), (half, -half)]
    outlines = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.05), (1.08, 0.8), (-1.08, 0.8)],
        "diamond": [(0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)],
        "star": np.stack([spikes * np.sin(turn), 0.06 - spikes * np.cos(turn)], 1),
        "heart": np.stack([16 * np.sin(bend) ** 3, heart_v - 2.5], 1) / 15.5,
        "cross": [point for quarters in range(4) for point in _turned(corner, quarters)],
    }
    return {name: np.asarray(points, np.float32) for name, points in outlines.items()}


def _turned(points: Sequence[tuple[float, float]], quarters: int) -> list[tuple[float, float]]:
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return list(points)


_OUTLINES = _outlines()


# ------------------------------------------------------------------------------------------------------------ captions

SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("",),
    "large": ("large", "big", "huge"),
}
RELATIONS: Mapping[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "inside": ("inside", "in", "within"),
}
OPPOSITE: Mapping[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BACKGROUND_WORDS: Mapping[str, tuple[str, ...]] = {"white": ("white",), "grey": ("grey", "gray"), "black": ("black",)}
OPENINGS = ("", "", "", "there is ", "a picture of ", "an image of ", "a drawing of ")
ENDINGS = ("", "", "", " on a {} background", " on {}", ", {} background")
ARTICLES = ("a", "a", "a", "a", "the", "")


def caption(scene: Scene, rng: Generator) -> str:
    """One of the ways to say what is in the scene; the background is said or not."""
    names = [_name(scene, item, rng) for item in scene.items]
    if scene.relation is None:
        what = " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
    elif scene.relation in OPPOSITE and rng.random() < 0.5:
        what = f"{names[1]} {_pick(rng, RELATIONS[OPPOSITE[scene.relation]])} {names[0]}"
    elif scene.relation == "inside" and rng.random() < 0.25:
        what = f"{names[1]} with {names[0]} inside"
    else:
        what = f"{names[0]} {_pick(rng, RELATIONS[scene.relation])} {names[1]}"
    ending = _pick(rng, ENDINGS).format(_pick(rng, BACKGROUND_WORDS[scene.background]))
    return f"{_pick(rng, OPENINGS)}{what}{ending}"


def _name(scene: Scene, item: Item, rng: Generator) -> str:
    size = _pick(rng, SIZE_WORDS[item.size])
    if scene.relation == "inside" and rng.random() < 0.5:
        size = ""
    words = [word for word in (size, item.colour, item.shape) if word]
    article = _pick(rng, ARTICLES)
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words]).strip()


def words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = itertools.chain(SHAPES, COLOURS, *SIZE_WORDS.values(), *RELATIONS.values(), *BACKGROUND_WORDS.values())
    rest = (*OPENINGS, *(ending.replace("{}", "").replace(",", "") for ending in ENDINGS), *ARTICLES, "an and with")
    return sorted({word for phrase in (*phrases, *rest) for word in phrase.split()})
