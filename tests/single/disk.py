"""A disk that is full after a number of writes."""

from __future__ import annotations

from typing import Any

import pytest

from fastldm.weights import write


class Disk:
    """room: how many writes it still takes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Any, mode: str) -> File:
        return File(open(path, mode), self)


class File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        if self.disk.room == 0:
            raise OSError(28, "No space left on device")
        self.disk.room -= 1
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def with_room(patch: pytest.MonkeyPatch, room: int) -> Disk:
    """What fastldm writes goes to such a disk."""
    disk = Disk(room)
    patch.setattr(write, "open", disk.open, raising=False)
    return disk
