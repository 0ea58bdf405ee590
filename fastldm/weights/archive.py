"""Where the files of a zip archive lie, if it is one as torch.save writes them.

torch has a reader of its own, and two readers of one archive can see different files in it. So all of it is held
against the one form that torch writes, and everything else is refused.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple, Protocol

from fastldm.weights.strict import MAX_TENSORS, shown

MAX_DIRECTORY = 16 << 20
MAX_FILES = MAX_TENSORS + 16
ZIP = b"PK\x03\x04"

# The records of a zip archive (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3).
_LOCAL = struct.Struct("<4s5H3L2H")
_LISTED = struct.Struct("<4s6H3L5H2L")
_END64, _LOCATOR, _END = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
_TAIL = _END64.size + _LOCATOR.size + _END.size
_FULL = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)  # in _END: see _END64
_FLAGS = 0x0808  # the sizes follow the content; names are UTF-8
_FOLDER = 0x10  # an attribute; torch reads nothing of such a file, and leaves the tensor as memory happens to be
_GAPS = (0, 16, 24)  # between files: nothing, or the sizes again, of 32 or 64 bits
_NAME = re.compile(rb"[^/\\\0]+/(data\.pkl|data/\w+|version|byteorder|\.\w+(/\w+)?)")


class Source(Protocol):
    """An open file, as `files.File` is one."""

    where: str
    size: int

    def read(self, length: int, offset: int) -> bytes: ...
    def read_into(self, buffer: memoryview, offset: int) -> int: ...


class Member(NamedTuple):
    """A file in a zip archive: its bytes, and their checksum."""

    start: int
    size: int
    crc: int


def members(file: Source) -> dict[str, Member]:
    """The files in the archive's one folder, by name.

    They must follow each other as torch writes them: stored as they are, without overlap, hole, second name or second
    directory, so that no two programs can see different files in the archive.
    Raises `ValueError` or `struct.error`.
    """
    count, directory, stop = _directory(file)
    found: dict[str, Member] = {}
    folders, names = set(), set()
    at = end = 0
    for _ in range(count):
        name, offset, member, at = _member(file, directory, at)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{shown(name)} in it is no part of a state dict")
        if offset - end not in (_GAPS if found else (0,)):
            raise ValueError(f"{shown(name)} in it is out of place")
        folder, _, path = name.partition(b"/")
        folders.add(folder)
        names.add(path.lower())  # torch finds them whatever the case
        found[path.decode()] = member
        end = member.start + member.size
    if len(folders) != 1 or len(names) != count:
        raise ValueError("it holds several folders, or a name twice")
    if at != len(directory) or stop - end not in _GAPS:
        raise ValueError("its directory is out of place")
    return found


def _directory(file: Source) -> tuple[int, bytes, int]:
    """The number of files, the directory of the archive, and where it starts: right before the records of the end."""
    tail = file.read(_TAIL, max(file.size - _TAIL, 0))
    kind, *disks, count, size, start, comment = _END.unpack(tail[-_END.size :])
    end = file.size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\6\7"):
        end = file.size - _TAIL
        kind64, _, _, _, *disks64, count64, size64, start64 = _END64.unpack(tail[: _END64.size])
        narrow, wide = (*disks, count, size, start), (*disks64, count64, size64, start64)
        same = all(a in (b, full) for a, b, full in zip(narrow, wide, _FULL, strict=True))
        if kind64 != b"PK\6\6" or _LOCATOR.unpack(locator)[1:] != (0, end, 1) or not same:
            raise ValueError("the records at its end contradict each other")
        disks, count, size, start = disks64, count64, size64, start64
    if (kind, comment, disks) != (b"PK\5\6", 0, [0, 0, count]) or start + size != end:
        raise ValueError("it does not end with its directory")
    if count > MAX_FILES or size > MAX_DIRECTORY:
        raise ValueError(f"it holds {count} files, listed in {size} bytes")
    return count, file.read(size, start), start


def _member(file: Source, directory: bytes, at: int) -> tuple[bytes, int, Member, int]:
    """Name, place of the header and of the content of the file listed at `at`, and where the next is listed."""
    kind, _, _, flags, method, _, _, crc, *sizes, n, extra, comment, disk, _, attributes, offset = _LISTED.unpack_from(
        directory, at
    )
    at += _LISTED.size
    name = directory[at : at + n]
    size, packed, offset = _wide([*reversed(sizes), offset], directory[at + n : at + n + extra])
    if kind != b"PK\1\2" or comment or disk or attributes & _FOLDER or offset > file.size:
        raise ValueError("its directory is damaged")
    if method or flags & ~_FLAGS or packed != size:
        raise ValueError(f"{shown(name)} in it is compressed or encrypted")
    local = file.read(_LOCAL.size + n, offset)
    kind, _, *again, _, _, _, _, _, length, padding = _LOCAL.unpack_from(local)
    if (kind, again, length, local[_LOCAL.size :]) != (ZIP, [flags, method], n, name):
        raise ValueError(f"{shown(name)} in it has another header than the directory says")
    return name, offset, Member(offset + _LOCAL.size + n + padding, size, crc), at + n + extra


def _wide(values: list[int], extra: bytes) -> list[int]:
    """The values of 32 bits; those that did not fit are in a field of `extra`."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            fields = iter(struct.unpack(f"<{length // 8}Q", extra[4 : 4 + length]))
            return [next(fields, value) if value == 0xFFFF_FFFF else value for value in values]
        extra = extra[4 + length :]
    return values
