"""Yaml files read as data alone. A module of its own: `import yaml` takes a while, and few models have such a file."""

from __future__ import annotations

from typing import Any

import yaml

from fastldm.errors import FileError, brief
from fastldm.weights.strict import shown

MAX_EVENTS = 5_000
DEPTH = 32


def strict_yaml(raw: bytes, where: str) -> dict[str, Any]:
    """One mapping of plain values: at most `DEPTH` deep, no key twice, no anchors, no tags. Raises `FileError`."""
    try:
        _check_events(raw, where)
        value = yaml.load(raw, Loader=_Unique)
    except yaml.YAMLError as error:
        raise FileError(f"{where}: is not valid yaml: {brief(str(error))}") from None
    except (ValueError, ArithmeticError) as error:  # a date that is none, a number of too many digits
        raise FileError(f"{where}: holds a value that cannot be read: {brief(str(error))}") from None
    if not isinstance(value, dict):
        raise FileError(f"{where}: must be a yaml mapping, not {type(value).__name__}")
    return value


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"keys must be different words: {shown(keys)}")
        return super().construct_mapping(node, deep)


def _check_events(raw: bytes, where: str) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(raw, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        named = getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None
        if depth > DEPTH or count > MAX_EVENTS or named:
            limit = f"{DEPTH} levels, {MAX_EVENTS} values, no anchors and no tags are allowed"
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise FileError(f"{where}: line {line}: {limit}")
