"""The header of a safetensors file, read strictly: all of it is checked before a byte of a tensor is read.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, little-endian;
the header, JSON padded by spaces; the tensors, which cover the rest without overlap, hole or remainder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastldm.errors import FileError
from fastldm.weights.strict import MAX_INTEGER, MAX_TENSORS, shown, strict_json

MAX_HEADER = 16 << 20
MAX_RANK = 8
MAX_DIM = 1 << 31
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

ReadAt = Callable[[int, int], bytes]
"""`read(length, offset)`: that many bytes from there, fewer at the end of the file."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(TensorInfo):
    """One tensor as the header describes it; its bytes, `start` to `stop`, count from `data_offset`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their bytes, the free text, and where the bytes begin."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_offset: int


def read_header(read: ReadAt, size: int, where: str) -> Header:
    """The header of the file of `size` bytes that `read` reads.

    Raises `FileError` naming the file as `where`, and as its field the tensor if one is at fault.
    """
    length = int.from_bytes(read(8, 0), "little")
    if size < 8:
        raise FileError(f"{where}: is truncated: 8 bytes of header length expected, {size} present")
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


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FileError(f"{where}: __metadata__ must map names to strings", field="__metadata__")
    return value


def _tensor(name: str, entry: object, where: str) -> Entry:
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
    return Entry(name, DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _naturals(value: object, high: int) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= high for v in value)


def _check_cover(tensors: list[Entry], present: int, where: str) -> None:
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
