"""Pickles and the two files that torch.save puts them into, written opcode by opcode, and damaged on purpose."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from fastldm.weights.pickles import Pickled

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


# ---------------------------------------------------------------------------------------------- pieces of a pickle


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(path: str) -> bytes:
    """The opcode that names a global, "torch.FloatStorage"."""
    module, _, attribute = path.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def constant(value: object) -> bytes:
    """A constant or a tuple of constants, as torch.save writes them."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(constant, value)) + b"t"
    if isinstance(value, str):
        return text(value)
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    shape: tuple[Any, ...],
    *,
    numel: Any = None,
    stride: tuple[Any, ...] | None = None,
    offset: Any = 0,
    kind: str = "FloatStorage",
    key: Any = "0",
    legacy: bool = False,
    hooks: bytes = b"ccollections\nOrderedDict\n)R",
    rest: bytes = b"",
) -> bytes:
    """A dense tensor; `numel`: how many elements its storage has, all that the shape needs."""
    needed = 1
    for size in shape:
        needed *= size
    if stride is None:
        steps = [1]
        for size in reversed(shape[1:]):
            steps.insert(0, steps[0] * size)
        stride = tuple(steps[: len(shape)])
    identity = ("storage", name(f"torch.{kind}"), key, "cpu", needed if numel is None else numel)
    storage = constant((*identity, None) if legacy else identity) + b"Q"
    arguments = (storage, offset, shape, stride, False, hooks, *([rest] if rest else []))
    return name("torch._utils._rebuild_tensor_v2") + constant(arguments) + b"R"


def state_dict(values: Mapping[str, bytes]) -> bytes:
    items = b"".join(constant(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


# ------------------------------------------------------------------------------------------------------ containers


def archive(data: bytes, storages: Mapping[str, bytes] | None = None, folder: str = "archive") -> bytes:
    """A zip archive with that data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{folder}/data.pkl", data)
        file.writestr(f"{folder}/byteorder", "little")
        for key, content in (storages or {}).items():
            file.writestr(f"{folder}/data/{key}", content)
        file.writestr(f"{folder}/version", "3\n")
    return buffer.getvalue()


def legacy(
    data: bytes, storages: Mapping[str, torch.Tensor] | None = None, *, system: object = SYSTEM, keys: object = None
) -> bytes:
    """The older format: pickles in a row, then the storages."""
    storages = storages or {}
    listed = list(storages) if keys is None else keys
    front = [MAGIC, pickle.dumps(1001, 2), pickle.dumps(system, 2), data, pickle.dumps(listed, 2)]
    behind = [
        struct.pack("<q", t.numel()) + t.contiguous().view(torch.uint8).numpy().tobytes() for t in storages.values()
    ]
    return b"".join(front + behind)


def bare(data: bytes) -> bytes:
    return data


CONTAINERS = {"zip": archive, "legacy": legacy, "bare": bare}


def saved(value: object, zipped: bool = True, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped, **options)
    return buffer.getvalue()


class Memory:
    """A file in memory, as the readers take one."""

    def __init__(self, content: bytes) -> None:
        self.where, self.size, self.content = "memory", len(content), content

    def read(self, length: int, offset: int) -> bytes:
        return self.content[offset : offset + length]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


# --------------------------------------------------------------------------------------------------------- damage

LISTED = struct.Struct("<4s6H3L5H2L")  # a file in the archive's directory
LOCAL = struct.Struct("<4s5H3L2H")  # the header before its content


def directory(file: bytes) -> list[int]:
    """Where the files of an archive are listed."""
    with zipfile.ZipFile(io.BytesIO(file)) as opened:
        at, count = opened.start_dir, len(opened.infolist())
    places = []
    for _ in range(count):
        places.append(at)
        fields = LISTED.unpack_from(file, at)
        at += LISTED.size + sum(fields[10:13])
    return places


def patched(file: bytes, at: int, layout: struct.Struct, **fields: int) -> bytes:
    """`file` with other values in the record at `at`; the fields are f0, f1, ..."""
    values = list(layout.unpack_from(file, at))
    for field, value in fields.items():
        values[int(field[1:])] = value
    return file[:at] + layout.pack(*values) + file[at + layout.size :]


def listed(file: bytes, index: int, **fields: int) -> bytes:
    """`file` with other values in the directory's entry of the file number `index`."""
    return patched(file, directory(file)[index], LISTED, **fields)


def local(file: bytes, index: int, **fields: int) -> bytes:
    """`file` with other values in the header before the content of the file number `index`."""
    return patched(file, LISTED.unpack_from(file, directory(file)[index])[-1], LOCAL, **fields)


OPCODES = b"(.012FIJKMLNPQRSTUVX]abceghijlopqrstu}\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94\x95)"
WORDS = [
    b"cposix\nsystem\n",
    b"0",
    b"2",
    b"q\x01",
    b"h\x01",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"N",
    b")",
    b"}",
    b"]",
    b"t",
    b"R",
]
WORDS += [
    b"\x85",
    b"\x86",
    b"\x87",
    b"Q",
    b"b",
    b"s",
    b"u",
    b"a",
    b"e",
    b"(",
    b"\x88",
    b"X\x01\x00\x00\x00w",
    b"K\x02",
    b".",
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of bytes, opcodes or slices."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, width = rng.randrange(len(out)), rng.choice((0, 1, 1, 2, 4, 8))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] = rng.choice(OPCODES)
            case 2:
                out[at : at + width] = rng.choice(WORDS)
            case 3:
                del out[at : at + width]
            case 4:
                start = rng.randrange(len(out))
                out[at:at] = out[start : start + rng.choice((1, 2, 5, 20, 60))]
            case 5:
                out[at] = (out[at] + rng.choice((-1, 1))) % 256
        out = out or bytearray(b".")
    return bytes(out)


@cache
def sample(zipped: bool) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The pickle of a small state dict, and its storages by key."""
    shared = torch.arange(24.0)
    tensors = {
        "w": shared.view(4, 6).t(),
        "part": shared[3:9],
        "half": torch.tensor([1.5, -2.0]).half(),
        "flag": torch.tensor([True, False, True]),
        "ids": torch.tensor([5, 6, 7]),
        "v_pred": torch.tensor([]),
    }
    storages = {"0": shared, "1": tensors["half"], "2": tensors["flag"], "3": tensors["ids"], "4": tensors["v_pred"]}
    keys = {"w": "0", "part": "0", "half": "1", "flag": "2", "ids": "3", "v_pred": "4"}
    kinds = {"half": "HalfStorage", "flag": "BoolStorage", "ids": "LongStorage"}
    items = {
        name: tensor(
            tuple(value.shape),
            numel=storages[keys[name]].numel(),
            stride=value.stride(),
            offset=value.storage_offset(),
            kind=kinds.get(name, "FloatStorage"),
            key=keys[name],
            legacy=not zipped,
        )
        for name, value in tensors.items()
    }
    wrapped = {"state_dict": state_dict(items)[2:-1], "global_step": constant(470000), "epoch": constant(3)}
    return state_dict(wrapped), storages


def mutant(rng: random.Random) -> bytes:
    """A damaged checkpoint: its pickle or the whole file, of either format."""
    zipped = rng.random() < 0.5
    data, storages = sample(zipped)
    whole = rng.random() < 0.3
    data = data if whole else mutated(rng, data)
    raw = {key: value.view(torch.uint8).numpy().tobytes() for key, value in storages.items()}
    file = archive(data, raw) if zipped else legacy(data, storages)
    return mutated(rng, file) if whole else file


def in_memory(file: bytes) -> dict[str, torch.Tensor]:
    """What the reader makes of a checkpoint."""
    opened = Pickled(Memory(file))
    return {name: opened.read(name) for name in opened.infos}


def by_torch(file: bytes) -> dict[str, torch.Tensor]:
    """What torch's restricted loader makes of it by itself: the oracle."""
    root = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    inner = root.get("state_dict") if isinstance(root, dict) else None
    tensors = inner if isinstance(inner, dict) else root
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def raw_bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Comparable values, whatever the dtype; every true is the same."""
    flat = {
        name: value.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        for name, value in tensors.items()
    }
    return {
        name: (
            value.dtype,
            tuple(value.shape),
            (flat[name].ne(0) if value.dtype is torch.bool else flat[name]).tolist(),
        )
        for name, value in tensors.items()
    }
