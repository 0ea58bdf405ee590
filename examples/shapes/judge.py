"""Whether a picture shows what its caption says: the caption is parsed, the picture looked at, the two compared.

    verdict = judge("a small red circle left of a big blue square", image)
    verdict.right, [check for check in verdict.checks if not check.right]

Nothing here is trained. A pixel between two colours is taken for a blend of them, so that blurred edges are no shapes;
a shape is told by its correlation with the rendered ones, shifted and scaled to the same centre and area.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scenes import (
    ARTICLES,
    BACKGROUND_WORDS,
    BACKGROUNDS,
    COLOURS,
    ENDINGS,
    OPENINGS,
    OPPOSITE,
    RADII,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    Item,
    Scene,
    render,
)
from scipy import ndimage
from scipy.spatial import ConvexHull

from fastldm.errors import ArgumentError, brief

Floats = NDArray[np.float32]
Labels = NDArray[np.intp]
Mask = NDArray[np.bool_]

PROPERTIES = ("background", "count", "colour", "shape", "size", "relation")

SIDE = 128  # of the picture that is looked at, in pixels; the lengths below are in its pixels, the colours in 0..255
SMOOTHING = 0.7
FRAME = 2  # width of the border that shows the background
FAR = 75.0  # from a colour: not that colour
BLEND = 45.0  # from the line between two colours: no blend of them
NEAR = 4  # reach of a blend, from either side
SPECK = 60  # a smaller area is no shape; the smallest star has 184
DOUBT = 0.8  # a lower correlation with every shape is none
WITHIN = 0.9  # of a shape's pixels, in the other's hull: inside
CROWD = 12  # more regions than these are not looked at
MOST = 6  # found shapes that are compared with the caption's, the largest


# ------------------------------------------------------------------------------------------------------------- captions


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Wish:
    """What a caption asks for. relation: how the first of two things lies to the second. None: nothing is said."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


def _backwards(choices: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {word: name for name, words in choices.items() for word in words if word}


_SIZES, _RELATIONS, _BACKGROUNDS = (_backwards(words) for words in (SIZE_WORDS, RELATIONS, BACKGROUND_WORDS))
_ENDINGS = {ending.format(word): name for ending in ENDINGS if ending for word, name in _BACKGROUNDS.items()}


class _Words:
    """A caption, read word by word."""

    def __init__(self, text: str, end: int) -> None:
        self.text, self.place = text, 0
        self.left = [(match[0].lower(), match.start()) for match in re.finditer(r"\w+|[^\w\s]", text[:end])]
        self.left.append(("", end))

    def take(self, *phrases: str) -> str | None:
        """The longest of these phrases that comes next; it is passed over. None: none does."""
        for phrase in sorted(phrases, key=len, reverse=True):
            parts = phrase.split()
            if [word for word, _ in self.left[self.place : self.place + len(parts)]] == parts:
                self.place += len(parts)
                return phrase
        return None

    def need(self, what: str, choices: Sequence[str]) -> str:
        found = self.take(*choices)
        if found is None:
            raise self.wrong(f"{what} ({', '.join(choices)})")
        return found

    def wrong(self, expected: str) -> ArgumentError:
        word, start = self.left[self.place]
        where = f"{word!r} at character {start}" if word else f"nothing at character {start}"
        return ArgumentError(f"caption = {brief(self.text)}: expected {expected}, found {where}", field="caption")


def parse(caption: str) -> Wish:
    """Any phrasing that `scenes.caption` has. Raises `ArgumentError` that says where a caption leaves the grammar."""
    ending = next((text for text in sorted(_ENDINGS, key=len)[::-1] if caption.lower().endswith(text)), "")
    words = _Words(caption, len(caption) - len(ending))
    words.take(*filter(None, OPENINGS))
    things, relation = [_thing(words)], None
    if words.take("with"):
        things.insert(0, _thing(words))
        if not words.take("inside"):
            raise words.wrong("'inside'")
        relation = "inside"
    elif phrase := words.take(*_RELATIONS):
        things.append(_thing(words))
        relation = _RELATIONS[phrase]
    else:
        while words.take(","):
            things.append(_thing(words))
        if words.take("and"):
            things.append(_thing(words))
        elif len(things) > 1:
            raise words.wrong("'and'")
    if words.left[words.place][0]:
        raise words.wrong("a relation, 'with', 'and', a background or the end")
    return Wish(_sized(things, relation), relation, _ENDINGS.get(ending))


def _thing(words: _Words) -> Thing:
    words.take(*filter(None, ARTICLES), "an")
    size = words.take(*_SIZES)
    colour = words.need("a colour" if size else "a size or a colour", list(COLOURS))
    return Thing(words.need("a shape", SHAPES), colour, _SIZES[size] if size else "")


def _sized(things: Sequence[Thing], relation: str | None) -> tuple[Thing, ...]:
    unsaid = ("small", "large") if relation == "inside" else ("medium",) * len(things)
    return tuple(thing._replace(size=thing.size or size) for thing, size in zip(things, unsaid, strict=True))


# -------------------------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class Found:
    """A shape in a picture; None: no shape, colour that there is a word for. Lengths are fractions of the side."""

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    likeness: float
    mask: Mask


@dataclass(frozen=True)
class Sight:
    background: str | None
    found: tuple[Found, ...]


class _Patch(NamedTuple):
    """A region of one label, and the colour of its middle. depth: how far that is from its border."""

    label: int
    mask: Mask
    colour: Floats
    depth: int


def look(image: Any) -> Sight:
    """image: (H, W, 3), as high as wide, 0..255 in bytes or 0..1 in floats, or an image of PIL."""
    pixels = ndimage.gaussian_filter(_pixels(image), (SMOOTHING, SMOOTHING, 0))
    frame = np.pad(np.zeros((SIDE - 2 * FRAME,) * 2, bool), FRAME, constant_values=True)
    ground = np.median(pixels[frame], axis=0).astype(np.float32)
    colours = _present(pixels, ground)
    patches = _regions(pixels, [ground, *colours]) if colours else []
    below = [_around(patch, patches) for patch in patches]
    found = []
    for patch, around in zip(patches, below, strict=True):
        above = [other.mask for other, under in zip(patches, below, strict=True) if under is patch]
        found.append(_found(_cover(pixels, patch, ground if around is None else around.colour, above), patch))
    return Sight(_nearest(ground, BACKGROUNDS), tuple(sorted(found, key=lambda one: -one.radius)))


def _pixels(image: Any) -> Floats:
    given = np.asarray(image)
    if given.ndim != 3 or given.shape[2] != 3 or given.shape[0] != given.shape[1]:
        raise ArgumentError(f"image: has the shape {given.shape}, must have (side, side, 3)", field="image")
    if given.dtype != np.uint8:
        given = np.rint(given.clip(0, 1) * 255).astype(np.uint8)
    if len(given) != SIDE:
        given = np.asarray(PIL.Image.fromarray(given).resize((SIDE, SIDE), PIL.Image.Resampling.BOX))
    return given.astype(np.float32)


def _nearest(colour: Floats, choices: Mapping[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in choices.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= FAR else None


def _blends(pixels: Floats, colours: Sequence[Floats], pairs: Sequence[tuple[int, int]]) -> tuple[Labels, Floats]:
    """-> for each pixel the nearer colour of the pair whose line it is closest to, and how far it is from that line."""
    ends = np.array([(colours[a], colours[b]) for a, b in pairs])
    way = ends[:, 1] - ends[:, 0]
    square = np.maximum((way * way).sum(1), 1e-6)
    # |p − a|² and (p − a)·w of all pixels and pairs, without a difference for each
    along = (pixels @ way.T - (ends[:, 0] * way).sum(1)) / square
    part = along.clip(0, 1)
    offset = (pixels**2).sum(-1, keepdims=True) - 2 * (pixels @ ends[:, 0].T) + (ends[:, 0] ** 2).sum(1)
    distance = offset + square * part * (part - 2 * along)
    best = distance.argmin(-1)
    nearer = np.take_along_axis(part, best[..., None], -1)[..., 0] >= 0.5
    labels = np.where(nearer, np.array(pairs)[best, 1], np.array(pairs)[best, 0])
    return labels, np.sqrt(np.take_along_axis(distance, best[..., None], -1)[..., 0].clip(0))


def _present(pixels: Floats, ground: Floats) -> list[Floats]:
    """The colours that are there besides the background, without those that are blends of two neighbours."""
    palette = [ground, *(np.array(colour, np.float32) for colour in COLOURS.values())]
    labels, distance = _blends(pixels, palette, [(0, i) for i in range(1, len(palette))])
    labels[distance > FAR] = strange = len(palette)
    accepted = [(_Patch(0, labels == 0, ground, SIDE), _grown(labels == 0, NEAR))]
    for patch in _patches(pixels, labels):
        if not _explained(pixels, patch, accepted):
            accepted.append((patch, _grown(patch.mask, NEAR)))
    colours: dict[object, Floats] = {}
    for patch, _ in accepted[1:]:
        colours.setdefault(id(patch) if patch.label == strange else patch.label, patch.colour)
    return list(colours.values())


def _patches(pixels: Floats, labels: Labels) -> list[_Patch]:
    """What is no speck and more than a line, of every label but 0, the deepest first."""
    found = []
    for label in np.flatnonzero(np.bincount(labels.ravel()) >= SPECK).tolist():
        if label:
            regions, count = ndimage.label(labels == label, np.ones((3, 3)))
            areas = np.bincount(regions.ravel(), minlength=count + 1)
            found += [_patch(pixels, label, regions == i) for i in range(1, count + 1) if areas[i] >= SPECK]
    found = [patch for patch in found if patch.depth >= 2]
    return sorted(found, key=lambda patch: (-patch.depth, -int(patch.mask.sum())))[:CROWD]


def _patch(pixels: Floats, label: int, mask: Mask) -> _Patch:
    depths = ndimage.distance_transform_cdt(mask, "chessboard")
    middle = depths >= min(depths.max(), 3)
    return _Patch(label, mask, np.median(pixels[middle], axis=0).astype(np.float32), int(depths.max()))


def _grown(mask: Mask, reach: int) -> Mask:
    """By a square."""
    out = np.zeros_like(mask)
    if mask.any():
        lines = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = tuple(slice(max(line[0] - reach, 0), line[-1] + 1 + reach) for line in lines)
        out[box] = ndimage.maximum_filter(mask[box], 2 * reach + 1)
    return out


def _explained(pixels: Floats, patch: _Patch, accepted: Sequence[tuple[_Patch, Mask]]) -> bool:
    """Whether most of the patch are blends of two accepted ones that are near."""
    colours = pixels[patch.mask]
    blend = np.zeros(len(colours), bool)
    for (first, near_first), (second, near_second) in itertools.combinations(accepted, 2):
        both = near_first[patch.mask] & near_second[patch.mask]
        if both.any():
            distance = _blends(colours, [first.colour, second.colour], [(0, 1)])[1]
            blend |= both & (distance < BLEND)
    return bool(blend.mean() > 0.6)


def _regions(pixels: Floats, colours: Sequence[Floats]) -> list[_Patch]:
    """The shapes, as far as they are of these colours, the first of which is the background's."""
    labels, distance = _blends(pixels, colours, [(0, i) for i in range(1, len(colours))])
    near = [_grown(labels == i, NEAR) for i in range(len(colours))]
    for i, j in itertools.combinations(range(1, len(colours)), 2):
        seam = near[i] & near[j]
        across, off = _blends(pixels[seam], colours, [(i, j)])
        labels[seam] = np.where(off < distance[seam], across, labels[seam])
        distance[seam] = np.minimum(off, distance[seam])
    patches = _patches(pixels, labels)
    for ring in list(patches):
        outer = _around(ring, patches)
        if outer is not None:
            filled = ndimage.binary_fill_holes(ring.mask)
            holes = [p for p in patches if p.label == outer.label and p is not outer and filled[p.mask].mean() > 0.9]
            gone = {id(patch) for patch in (outer, *holes)}
            patches = [patch for patch in patches if id(patch) not in gone]
            patches.append(outer._replace(mask=np.any([outer.mask, *(hole.mask for hole in holes)], axis=0)))
    return patches


def _found(cover: Floats, patch: _Patch) -> Found:
    form = _form(cover)
    template, likeness = _likest(form)
    radius = (form.area / template.form.area) ** 0.5
    return Found(
        shape=template.shape if likeness >= DOUBT else None,
        colour=_nearest(patch.colour, COLOURS),
        size=_size(radius / SIDE),
        x=(form.x - template.form.x * radius) / SIDE,
        y=(form.y - template.form.y * radius) / SIDE,
        radius=radius / SIDE,
        likeness=likeness,
        mask=patch.mask,
    )


def _around(patch: _Patch, patches: Sequence[_Patch]) -> _Patch | None:
    """What a patch lies on; None: the background."""
    band = _grown(patch.mask, 5) & ~_grown(patch.mask, 2)
    others = (other for other in patches if other.label != patch.label)
    return next((other for other in others if other.mask[band].mean() > 0.5), None)


def _cover(pixels: Floats, patch: _Patch, around: Floats, above: Sequence[Mask]) -> Floats:
    """How much of each pixel the patch covers, by its colour, and wholly where something lies on it."""
    way = patch.colour - around
    cover = ((pixels - around) @ way / max(float(way @ way), 1.0)).clip(0, 1)
    cover[~_grown(patch.mask, 2)] = 0
    for mask in above:
        cover[_grown(mask, 3)] = 1
    return cover.astype(np.float32)


def _size(radius: float) -> str:
    ends = itertools.pairwise(RADII.values())
    borders = [(smaller[1] + larger[0]) / 2 for smaller, larger in ends]
    return list(RADII)[sum(radius > border for border in borders)]


# --------------------------------------------------------------------------------------------------------------- shapes

GRID = 40  # points along each axis
REACH = 1.05  # of the grid from the centre, in roots of the area; a star reaches 0.95
BLURS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)  # in roots of the area: out of focus
STRANGENESS = 0.1  # what a size e times beyond all others takes off a correlation
FINE = 384  # side of the picture that templates are taken from


class _Form(NamedTuple):
    """A mask's area in pixels, its centroid, and itself on a grid around that, scaled by the area; mean 0, norm 1."""

    area: float
    x: float
    y: float
    values: Floats


class _Template(NamedTuple):
    """form: of a shape of radius 1 around (0, 0)."""

    shape: str
    form: _Form


def _form(cover: Floats) -> _Form:
    area = float(cover.sum())
    y, x = (float((cover * axis).sum()) / area for axis in np.indices(cover.shape, np.float32))
    line = np.linspace(-REACH, REACH, GRID) * area**0.5
    values = ndimage.map_coordinates(cover, np.meshgrid(y + line, x + line, indexing="ij"), order=1).ravel()
    values = values - values.mean()
    return _Form(area, x + 0.5, y + 0.5, np.asarray(values / max(float(np.linalg.norm(values)), 1e-6), np.float32))


@cache
def _templates() -> tuple[_Template, ...]:
    return tuple(_Template(shape, form) for shape in SHAPES for form in _forms(shape))


def _forms(shape: str) -> Iterator[_Form]:
    radius = 0.25
    image = render(Scene("black", (Item(shape, "red", "large", 0.5, 0.5, radius),)), FINE).astype(np.float32)
    black, red = (np.array(colour, np.float32) for colour in (BACKGROUNDS["black"], COLOURS["red"]))
    sharp = ((image - black) @ (red - black) / ((red - black) @ (red - black))).clip(0, 1)
    root, scale = float(sharp.sum()) ** 0.5, radius * FINE
    for blur in BLURS:
        form = _form(ndimage.gaussian_filter(sharp, blur * root))
        yield form._replace(area=form.area / scale**2, x=(form.x - FINE / 2) / scale, y=(form.y - FINE / 2) / scale)


def _likest(form: _Form) -> tuple[_Template, float]:
    """The template, and the correlation with it. A shape smaller or larger than all sizes has to be much more alike."""
    templates = _templates()
    likeness = np.array([template.form.values @ form.values for template in templates])
    radii = np.array([(form.area / template.form.area) ** 0.5 / SIDE for template in templates])
    smallest, largest = RADII["small"][0], RADII["large"][1]
    strange = np.maximum(np.log(smallest / radii), np.log(radii / largest)).clip(0)
    best = int((likeness - STRANGENESS * strange).argmax())
    return templates[best], float(likeness[best])


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Check:
    """One asked property. thing: which of the caption's things it belongs to, None for the picture's own."""

    name: str
    asked: object
    found: object
    thing: int | None = None

    @property
    def right(self) -> bool:
        return self.asked == self.found


@dataclass(frozen=True)
class Verdict:
    checks: tuple[Check, ...]

    @property
    def right(self) -> bool:
        return all(check.right for check in self.checks)

    @property
    def wrong(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.right)


def judge(caption: str | Wish, image: Any) -> Verdict:
    """Each property that the caption asks for, of each thing; the things are matched so that most of them is right.

    Raises `ArgumentError` for a caption that is none, or an image of another form.
    """
    wish = parse(caption) if isinstance(caption, str) else caption
    return compare(wish, look(image))


def compare(wish: Wish, sight: Sight) -> Verdict:
    candidates = [*sight.found[:MOST], *[None] * len(wish.things)]
    best = max(itertools.permutations(candidates, len(wish.things)), key=lambda chosen: _score(wish, chosen))
    checks = [Check("count", len(wish.things), len(sight.found))]
    if wish.background is not None:
        checks.append(Check("background", wish.background, sight.background))
    for i, (thing, found) in enumerate(zip(wish.things, best, strict=True)):
        checks += [Check(name, getattr(thing, name), found and getattr(found, name), i) for name in Thing._fields]
    if wish.relation is not None:
        checks.append(Check("relation", wish.relation, _related(best)))
    return Verdict(tuple(checks))


def _score(wish: Wish, chosen: Sequence[Found | None]) -> tuple[int, bool]:
    """A colour tells more than a shape, a shape more than a size."""
    pairs = [(thing, found) for thing, found in zip(wish.things, chosen, strict=True) if found is not None]
    likeness = sum(4 * (t.colour == f.colour) + 2 * (t.shape == f.shape) + (t.size == f.size) for t, f in pairs)
    return likeness, wish.relation is None or _related(chosen) == wish.relation


def _related(chosen: Sequence[Found | None]) -> str | None:
    first, second = chosen[0], chosen[1]
    return None if first is None or second is None else relation(first, second)


def relation(first: Found, second: Found) -> str:
    """How the first lies to the second: inside it or, where it is further, along one axis."""
    if _inside(first.mask, second.mask):
        return "inside"
    x, y = second.x - first.x, second.y - first.y
    name, ahead = ("left of", x > 0) if abs(x) > abs(y) else ("above", y > 0)
    return name if ahead else OPPOSITE[name]


def _inside(inner: Mask, outer: Mask) -> bool:
    hull = ConvexHull(np.argwhere(outer)).equations
    distances = np.argwhere(inner) @ hull[:, :2].T + hull[:, 2]
    return bool((distances <= 0.5).all(1).mean() >= WITHIN)
