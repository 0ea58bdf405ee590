"""The header of a safetensors file, read strictly: all of it is checked before a byte of a tensor is read.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, little-endian;
the header, JSON padded by spaces; the tensors, which cover the rest without overlap, hole or remainder.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastldm.errors import FileError

MAX_HEADER = 16 << 20
MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_DIM = 1 << 31
MAX_INTEGER = 1 << 53  # beyond, JSON readers that use doubles disagree
MAX_VALUES = 12 * MAX_TENSORS  # a tensor's entry has at most 11 commas, 6 brackets and 5 strings
HEADER_DEPTH = 3
EMPTY_MARKERS = ("v_pred", "ztsnr")  # checkpoints say with these how they were trained
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_PICKLED = "holds pickled weights, which can run code: convert them to safetensors"
_KINDS = {  # what stands in place of a safetensors file in the wild, by its first bytes
    rb"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull` in its folder",
    rb"PK\x03\x04": f"is a zip archive as torch.save writes it; it {_PICKLED}",
    rb"\x80[\x02-\x05]": f"is a pickle; it {_PICKLED}",
    rb"GGUF": "is a GGUF file, which is not supported",
    rb"7z\xbc\xaf\x27\x1c|\x1f\x8b|Rar!": "is an archive: unpack it",
    rb"\x93NUMPY|\x89HDF": "is a NumPy or HDF5 file, which is not supported",
    rb"(?i)\s*<(!doctype|html|head|\?xml)": "is a web page, often the error page of a failed download",
    rb"\s*[{\[]\s*[\"}\]{\[]": "is a JSON file, not the weights",
    rb"[\t\n\r\x20-\x7e]+\Z": "is a text file",
}

ReadAt = Callable[[int, int], bytes]
"""`read(length, offset)`: that many bytes from there, fewer at the end of the file."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; its bytes, `start` to `stop`, count from `data_offset`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their bytes, the free text, and where the bytes begin."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int


def read_header(read: ReadAt, size: int, where: str) -> Header:
    """The header of the file of `size` bytes that `read` reads.

    Raises `FileError` naming the file as `where`, and as its field the tensor if one is at fault.
    """
    first = read(64, 0)
    length = int.from_bytes(first[:8], "little")
    if size < 8:
        raise FileError(f"{where}: is truncated: 8 bytes of header length expected, {size} present")
    if length > MAX_HEADER or first[8:9] != b"{":
        _refuse_other_kinds(first, where)
    if length > MAX_HEADER:
        raise FileError(f"{where}: has a header of {length} bytes; at most {MAX_HEADER} are allowed")
    raw = read(length, 8) if 8 + length <= size else b""
    if len(raw) < length:
        raise FileError(f"{where}: is truncated: at least {8 + length} bytes expected, {size} present")
    if not (raw.startswith(b"{") and raw.rstrip(b" ").endswith(b"}")):
        raise FileError(f"{where}: its header must begin with '{{' and end with '}}', padded by spaces only")
    if raw.count(b'"data_offsets"') > MAX_TENSORS:  # before the work; escapes could hide some
        raise FileError(f"{where}: has more than {MAX_TENSORS} tensors")
    entries = strict_json(raw, where, HEADER_DEPTH)
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    if len(entries) > MAX_TENSORS:
        raise FileError(f"{where}: has more than {MAX_TENSORS} tensors")
    tensors = [_tensor(name, entry, where) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_cover(tensors, size - 8 - length, where)
    return Header({t.name: t for t in tensors}, metadata, 8 + length)


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


def _refuse_other_kinds(first: bytes, where: str) -> None:
    for pattern, description in _KINDS.items():
        if re.match(pattern, first):
            raise FileError(f"{where}: {description}")


def _check_structure(raw: bytes, where: str, depth: int) -> None:
    """Bounds what a parser would build: the number of strings and values, and the nesting."""
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")  # now every quote begins or ends a string
    too_many = unescaped.count(b'"') > 2 * MAX_VALUES
    structure = b"" if too_many else b"".join(unescaped.split(b'"')[::2])
    brackets = structure.translate(None, _NOT_BRACKETS)
    if too_many or max(structure.count(b","), len(brackets)) > MAX_VALUES:
        raise FileError(f"{where}: has more than {MAX_VALUES} values")
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


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FileError(f"{where}: __metadata__ must map names to strings", field="__metadata__")
    return value


def _tensor(name: str, entry: object, where: str) -> TensorInfo:
    def fail(reason: str) -> FileError:
        return FileError(f"{where}: tensor {shown(name)}: {reason}", field=name)

    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = shown(sorted(entry)) if isinstance(entry, dict) else shown(entry)
        raise fail(f"must have exactly dtype, shape and data_offsets, not {found}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"unsupported dtype {shown(dtype)}; supported: {', '.join(DTYPES)}")
    if not _naturals(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise fail(f"shape {shown(shape)} must be at most {MAX_RANK} integers from 0 to {MAX_DIM}")
    if not _naturals(offsets, MAX_INTEGER) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {shown(offsets)} must be two ascending integers from 0")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise fail(f"{dtype} of shape {shape} takes {nbytes} bytes, not those from {offsets[0]} to {offsets[1]}")
    if nbytes == 0 and name not in EMPTY_MARKERS:
        raise fail(f"is empty: shape {shape}; only {' and '.join(EMPTY_MARKERS)} may be")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _naturals(value: object, high: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= high for v in value)


def _check_cover(tensors: list[TensorInfo], present: int, where: str) -> None:
    """`tensors`, sorted, must cover the `present` bytes behind the header exactly."""
    end = 0
    for t in tensors:
        if t.start != end:
            what = "overlaps the tensor" if t.start < end else f"leaves a hole of {t.start - end} bytes"
            raise FileError(f"{where}: tensor {shown(t.name)}: {what} before it", field=t.name)
        end = t.stop
    if end > present:
        raise FileError(f"{where}: is truncated: {end} bytes of tensors expected, {present} present")
    if end < present:
        raise FileError(f"{where}: has {present - end} bytes behind its last tensor")
