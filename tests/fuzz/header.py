"""The reader of a safetensors header, on any bytes: `FileError`, or what the safetensors library reads.

It refuses more than the library does, but for the reasons of the library it refuses nothing that this one takes.
"""

from __future__ import annotations

import json
import random
import struct
import time
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastldm.errors import FileError
from fastldm.weights.header import DTYPES, EMPTY_MARKERS, MAX_RANK, Header, read_header
from tests.fuzz.json_changes import Object, changed, parsed, written

WHERE = "m.safetensors"
WORDS = (*DTYPES, *EMPTY_MARKERS, "F4", "F8_E4M3", "U64", "C64", "__metadata__", "dtype", "shape", "data_offsets")
NOT_STRICTER = ("is truncated", "overlaps the tensor", "leaves a hole", "behind its last tensor", " bytes, not those ")
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def seeds() -> list[bytes]:
    """Valid files, written by the library: empty, one of each dtype, names of a model, markers, free text."""
    each = {name: torch.ones(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    model = {
        "conv_in.weight": torch.zeros(4, 2, 3, 3),
        "conv_in.bias": torch.zeros(4),
        "mid_block.attentions.0.to_out.0.weight": torch.zeros(2, 2).half(),
        "scalar": torch.tensor(0.5),
        "v_pred": torch.zeros(0),
    }
    odd = {"": torch.zeros(1), 'é"\\\n': torch.zeros((1,) * MAX_RANK), "ztsnr": torch.zeros(0)}
    notes = {"format": "pt", 'a "quoted" \\ [{ note': "\u2028"}
    return [bytes(safetensors.torch.save(t, metadata=m)) for t in ({}, each, model, odd) for m in (None, notes)]


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """A few changes in the header's JSON, often with the offsets put right again; None where it is no JSON."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = parsed(data[8:end].decode())
        for _ in range(rng.choice([1, 1, 2, 4])):
            entries = changed(entries, rng, WORDS)
        body = _laid_out(entries) if rng.random() < 0.6 else data[end:]
        text = written(entries).encode() + rng.choice([b"", b"", b"   ", b"\n"])
    except (ValueError, RecursionError, OverflowError):
        return None
    length = len(text) + rng.choice([0] * 20 + [1, -1, 2**40])
    return struct.pack("<Q", max(0, length)) + text + body + rng.choice([b""] * 9 + [b"\0"])


def one_input(data: bytes) -> bool:
    """Whether the file was accepted. Asserts what must hold for it."""
    start = time.thread_time()
    header, message = _read(data)
    seconds = time.thread_time() - start
    assert seconds < 0.1 or len(data) > 1 << 16, f"{len(data)} bytes take {seconds} s"
    if header is None:
        assert message.startswith(WHERE), message
        assert message.isprintable(), message
        assert len(message) < 400, message
        assert not any(reason in message for reason in NOT_STRICTER) or not _accepted_by_the_library(data), message
        return False
    _check_strict(data, header)
    _check_same(data, header)
    return True


def _read(data: bytes) -> tuple[Header | None, str]:
    try:
        return read_header(lambda length, offset: data[offset : offset + length], len(data), WHERE), ""
    except FileError as error:
        return None, str(error)


def _accepted_by_the_library(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def _check_strict(data: bytes, header: Header) -> None:
    """The rules, from the bytes anew: names once, and tensors that cover the rest without overlap or hole."""
    entries = json.loads(data[8 : header.data_offset], object_pairs_hook=Object)
    names = [name for name, _ in entries if name != "__metadata__"]
    assert sorted(names) == sorted(header.tensors)
    assert len(entries) - len(names) <= 1
    at = 0
    for info in header.tensors.values():
        assert info.start == at, info
        at += torch.Size(info.shape).numel() * info.dtype.itemsize
        assert info.stop == at, info
        assert info.nbytes or info.name in EMPTY_MARKERS, info
        assert len(info.shape) <= MAX_RANK, info
    assert header.data_offset + at == len(data)


def _check_same(data: bytes, header: Header) -> None:
    """The library reads the same names, dtypes, shapes, bytes and free text."""
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == header.tensors.keys()
    for name, info in header.tensors.items():
        found: dict[str, Any] = theirs[name]
        assert (DTYPES[found["dtype"]], tuple(found["shape"])) == (info.dtype, info.shape), name
        assert bytes(found["data"]) == data[header.data_offset :][info.start : info.stop], name
    assert all(isinstance(text, str) for item in header.metadata.items() for text in item)


def _laid_out(entries: Any) -> bytes:
    """Gives each entry that can have one its place behind the one before; the bytes for all of them."""
    at = 0
    for _, entry in entries if isinstance(entries, Object) else ():
        if not isinstance(entry, Object):
            continue
        dtype, shape = dict(entry).get("dtype"), dict(entry).get("shape")
        plain = isinstance(shape, list) and all(type(n) is int and 0 <= n < 64 for n in shape)
        if not isinstance(dtype, str) or dtype not in SIZES or not plain or len(shape) > 2 * MAX_RANK:
            continue
        size = torch.Size(shape).numel() * SIZES[dtype]
        if at + size > 1 << 14:
            continue
        for i, (key, _) in enumerate(entry):
            if key == "data_offsets":
                entry[i] = key, [at, at + size]
        at += size
    return bytes(at)
