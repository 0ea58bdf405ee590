"""Text out of files that anyone may have written: JSON, read strictly, and values as they may stand in a message."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import Any

from fastldm.errors import FileError

MAX_INTEGER = 1 << 53  # beyond, JSON readers that use doubles disagree
MAX_TENSORS = 65_536
MAX_VALUES = 12 * MAX_TENSORS  # a tensor's entry in a header has at most 11 commas, 6 brackets and 5 strings
MAX_MEMBERS = 4 * MAX_TENSORS + 4096  # of all objects: four for a tensor, and the metadata
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def strict_json(raw: bytes, where: str, depth: int) -> dict[str, Any]:
    """One JSON object in UTF-8, without duplicate keys, NaN, Infinity, integers from 2^53 on, deep nesting.

    Raises `FileError` naming the file as `where`. Memory is bounded before anything is parsed.
    """
    _check_structure(raw, where, depth)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=partial(_unique, where),
            parse_int=partial(_integer, where),
            parse_float=partial(_float, where),
            parse_constant=partial(_float, where),
        )
    except ValueError as error:
        raise FileError(f"{where}: is not valid JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"{where}: must be a JSON object, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A value out of a file as it may stand in a message: escaped and short."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_structure(raw: bytes, where: str, depth: int) -> None:
    """Bounds what a parser would build: the number of strings and values, and the nesting."""
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")  # now every quote begins or ends a string
    too_many = unescaped.count(b'"') > 2 * MAX_VALUES
    structure = b"" if too_many else b"".join(unescaped.split(b'"')[::2])
    brackets = structure.translate(None, _NOT_BRACKETS)
    if too_many or max(structure.count(b","), len(brackets)) > MAX_VALUES or structure.count(b":") > MAX_MEMBERS:
        raise FileError(f"{where}: has more than {MAX_VALUES} values, or {MAX_MEMBERS} of them with names")
    level = 0
    for bracket in brackets:
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            raise FileError(f"{where}: is nested deeper than {depth} levels")


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FileError(f"{where}: duplicate key {shown(key)}", field=key)
    strings = (value for value in found.values() if isinstance(value, str))
    "".join((*found, *strings)).encode("utf-8")  # a lone surrogate is a ValueError
    return found


def _integer(where: str, text: str) -> int:
    if len(text) > 17 or abs(int(text)) >= MAX_INTEGER or text == "-0":  # readers disagree on -0, too
        raise FileError(f"{where}: integer {shown(text)} is -0 or beyond 2^53")
    return int(text)


def _float(where: str, text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FileError(f"{where}: number {shown(text)} is not finite")
    return value
