"""Valid JSON with a few things changed that a reader could get wrong; duplicate keys survive, unlike in a dict."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any


class Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, in their order."""


class Literal(str):
    """JSON text to be written as it is."""


ODD = [
    *("0", "-0", "-1", "1", "1.0", "0.5", "1e30", "1e999", "NaN", "-Infinity", "true", "false", "null"),
    *("2147483648", "9007199254740991", "9007199254740992", str(2**64), "9" * 20, "1" + "0" * 400),
    *('""', '"x"', '"../x"', '"a\\u0000b"', '"\\ud800"', '"\\u202e"', "[]", "{}", "[0]", "[[]]", '{"a":1}', '["x"]'),
]


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Object)


def written(value: Any) -> str:
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{written(v)}" for key, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return value if isinstance(value, Literal) else json.dumps(value)


def changed(value: Any, rng: random.Random, words: Sequence[str]) -> Any:
    """A copy with one change; `words` are strings that mean something to the reader."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places:
        return value
    container, at = rng.choice(places)
    other, there = rng.choice(places)
    match rng.randrange(9):
        case 0 | 1:
            _put(container, at, Literal(rng.choice(ODD)))
        case 2:
            _put(container, at, rng.choice(words))
        case 3:
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[at]))
        case 4:
            del container[at]
        case 5:
            _put(container, at, copy.deepcopy(_get(other, there)))
        case 6:
            _nudge(container, at, rng)
        case 7 if isinstance(container, Object):
            name = rng.choice([rng.choice(words), "", "a\nb", "../x", f"{container[at][0]}x"])
            container[at] = name, container[at][1]
        case _:
            opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
            depth = rng.choice([1, 1, 1, 2, 40, 1200])
            _put(container, at, Literal(opening * depth + written(_get(container, at)) + closing * depth))
    return value


def _places(value: Any) -> list[tuple[Any, int]]:
    """Every value inside `value`: the container and the position."""
    found, todo = [], [value]
    while todo:
        container = todo.pop()
        if isinstance(container, list):
            found += [(container, i) for i in range(len(container))]
            todo += [_get(container, i) for i in range(len(container))]
    return found


def _get(container: Any, at: int) -> Any:
    return container[at][1] if isinstance(container, Object) else container[at]


def _put(container: Any, at: int, value: Any) -> None:
    container[at] = (container[at][0], value) if isinstance(container, Object) else value


def _nudge(container: Any, at: int, rng: random.Random) -> None:
    value = _get(container, at)
    if isinstance(value, bool):
        _put(container, at, not value)
    elif isinstance(value, int | float):
        _put(container, at, rng.choice([value + 1, value - 1, 2 * value, -value, value * 10**6]))
    elif isinstance(value, str):
        _put(container, at, value[::-1] if rng.random() < 0.5 else value + rng.choice("x\0é "))
