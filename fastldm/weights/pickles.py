"""Checkpoints that torch.save wrote (.ckpt, .bin, .pt), read without running anything that they hold.

A pickle is a program. Before torch sees the file, the program is followed without being run (`opcodes.py`), and a zip
archive is checked to its last byte (`archive.py`); so all tensors are described, and their sizes held against the file,
before memory is taken. Then torch's restricted loader reads the same open file, and must give just these tensors.
There is no other way, and no flag for one.
"""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fastldm.errors import FileError
from fastldm.weights import archive
from fastldm.weights.header import EMPTY_MARKERS, MAX_DIM, TensorInfo
from fastldm.weights.opcodes import ADVICE, Dense, Program, Storage
from fastldm.weights.strict import MAX_TENSORS, shown

log = logging.getLogger("fastldm")

OLDEST_TORCH = "2.10"  # before, its restricted loader wrote outside of the memory of hostile files (CVE-2026-24747)
MAX_PICKLE = 16 << 20
_LEGACY = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION)


class Pickled:
    """The tensors of a checkpoint, all of them in memory; those of its "state_dict" where it has one.

    `metadata` holds "global_step" where the training left it. Raises `FileError` naming the file and the reason.
    """

    def __init__(self, file: archive.Source) -> None:
        where = file.where
        if TorchVersion(torch.__version__) < OLDEST_TORCH:
            reason = f"is a pickle, and only torch {OLDEST_TORCH} or newer reads it safely; this is {torch.__version__}"
            raise FileError(f"{where}: {reason}. Convert it to safetensors elsewhere")
        described = _describe_zip(file) if file.read(4, 0) == archive.ZIP else _describe_legacy(file)
        tensors = _checked(_state_dict(described), where)
        loaded = _state_dict(_load(file))
        self._tensors: dict[str, Tensor] = {}
        for name, dense in tensors.items():
            tensor = dict.get(loaded, name)
            if not _is(tensor, dense):
                raise FileError(f"{where}: tensor {shown(name)}: torch read another one than is described", field=name)
            self._tensors[name] = tensor.detach()
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, d.storage.dtype, d.shape) for name, d in tensors.items()
        }
        step = described.get("global_step") if isinstance(described, dict) else None
        self.metadata: Mapping[str, str] = {"global_step": str(step)} if type(step) is int else {}
        log.warning("%s: is a pickle, read by torch's restricted loader; safetensors are safer, and faster", where)

    def read(self, name: str) -> Tensor:
        """A copy of the tensor."""
        tensor = self._tensors[name].clone(memory_format=torch.contiguous_format)
        return tensor.view(torch.uint8).ne(0) if tensor.dtype is torch.bool else tensor


def _state_dict(root: object) -> dict[Any, Any]:
    """What holds the tensors: the checkpoint itself, or its "state_dict"."""
    if not isinstance(root, dict):
        return {}
    inner = dict.get(root, "state_dict")
    return inner if isinstance(inner, dict) else root


def _checked(state_dict: dict[Any, Any], where: str) -> dict[str, Dense]:
    """Those of the values that are tensors, every one within its storage."""
    tensors = {name: value for name, value in dict.items(state_dict) if isinstance(value, Dense)}
    if not tensors:
        raise FileError(f"{where}: holds no tensors by name")
    if len(tensors) > MAX_TENSORS:
        raise FileError(f"{where}: has more than {MAX_TENSORS} tensors")
    for name, dense in tensors.items():
        if not isinstance(name, str) or not _encodes(name):
            raise FileError(f"{where}: {shown(name)} is not the name of a tensor")
        problem = _problem(name, dense)
        if problem:
            raise FileError(f"{where}: tensor {shown(name)}: {problem}", field=name)
    return tensors


def _problem(name: str, dense: Dense) -> str | None:
    info = TensorInfo(name, dense.storage.dtype, dense.shape)
    if any(size > MAX_DIM for size in dense.shape):
        return f"shape {shown(dense.shape)} must be of integers from 0 to {MAX_DIM}"
    if info.nbytes == 0:
        return None if name in EMPTY_MARKERS else f"is empty: shape {dense.shape}"
    present = dense.storage.numel * info.dtype.itemsize
    if info.nbytes > present:
        return f"{info.dtype} of shape {dense.shape} takes {info.nbytes} bytes; its storage has {shown(present)}"
    last = dense.offset + sum((size - 1) * step for size, step in zip(dense.shape, dense.stride, strict=True))
    return "leads out of its storage" if last >= dense.storage.numel else None


def _encodes(name: str) -> bool:
    return not re.search("[\ud800-\udfff]", name)


def _is(tensor: object, dense: Dense) -> TypeGuard[Tensor]:
    """Whether torch built what was described: a plain dense tensor on the CPU over a storage of that size."""
    return (
        isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and (tensor.layout, tensor.is_nested, tensor.device.type) == (torch.strided, False, "cpu")
        and (tensor.dtype, tuple(tensor.shape), tensor.stride()) == (dense.storage.dtype, dense.shape, dense.stride)
        and tensor.storage_offset() == dense.offset
        and tensor.untyped_storage().nbytes() >= dense.storage.numel * tensor.itemsize
    )


# ------------------------------------------------------------------------------------------------------ by torch


class _Stream(io.RawIOBase):
    """The open file as torch reads it: by place, and without a number by which it could be reached otherwise."""

    def __init__(self, file: archive.Source) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = self._file.read_into(memoryview(buffer), self._at)
        self._at += count
        return count


def _load(file: archive.Source) -> object:
    try:
        with io.BufferedReader(_Stream(file)) as stream:
            return torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except FileError:
        raise
    except Exception as error:  # torch raises whatever a library of its own does
        advised = str(error).partition("\n\nCheck the documentation")[
            0
        ]  # around its reason stands how to load unsafely
        cause = re.split(r"WeightsUnpickler error:|\n\n", advised)[-1].strip()
        raise FileError(f"{file.where}: torch cannot load it: {type(error).__name__}: {shown(cause)}") from None


# ------------------------------------------------------------------------------------------- its two file formats


def _describe_zip(file: archive.Source) -> object:
    """What the archive's data.pkl would build, every storage held against its file in the archive."""
    try:
        members = archive.members(file)
    except (ValueError, struct.error) as error:
        raise FileError(f"{file.where}: is a zip archive that torch.save did not write, or damaged: {error}") from None
    if "data.pkl" not in members:
        raise FileError(f"{file.where}: is a zip archive, but none of torch.save: it has no data.pkl")
    start, size, crc = members["data.pkl"]
    if size > MAX_PICKLE:
        raise FileError(f"{file.where}: has a pickle of {size} bytes; at most {MAX_PICKLE} are allowed")
    data = file.read(size, start)
    if zlib.crc32(data) != crc:
        raise FileError(f"{file.where}: is damaged: the checksum of its data.pkl is another one")
    program = Program(data, file.where)
    root = program.run()
    for storage in program.storages.values():
        member = members.get(f"data/{storage.key}")
        if member is None or member.size != storage.numel * storage.dtype.itemsize:
            _refuse_storage(file, storage, "is missing" if member is None else f"has {member.size} bytes")
    return root


def _describe_legacy(file: archive.Source) -> object:
    """What the fourth of the pickles in a row would build. The storages follow them, each behind its length."""
    program = Program(file.read(min(file.size, MAX_PICKLE), 0), file.where)
    if program.run() != _LEGACY[0] or program.run() != _LEGACY[1]:
        raise FileError(f"{file.where}: is a pickle, but none of torch.save: {ADVICE}")
    system = program.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FileError(f"{file.where}: was not written on a little-endian machine: {ADVICE}")
    root, keys, end = program.run(), program.run(), program.position
    if not isinstance(keys, list) or not _lists_all(keys, program.storages):
        raise FileError(f"{file.where}: is damaged: its storages are not those of its tensors")
    for storage in (program.storages[str(key)] for key in keys):
        present = int.from_bytes(file.read(8, end), "little")
        if present != storage.numel:
            _refuse_storage(file, storage, f"has {present} values")
        end += 8 + storage.numel * storage.dtype.itemsize
    if end != file.size:
        raise FileError(
            f"{file.where}: is truncated or has something behind: {end} bytes expected, {file.size} present"
        )
    return root


def _lists_all(keys: list[object], storages: Mapping[str, Storage]) -> bool:
    strings = [key for key in keys if isinstance(key, str)]
    return len(strings) == len(keys) and sorted(strings) == sorted(storages)


def _refuse_storage(file: archive.Source, storage: Storage, found: str) -> NoReturn:
    expected = f"{shown(storage.numel)} of {storage.dtype} expected"
    raise FileError(f"{file.where}: is damaged: storage {shown(storage.key)} {found}; {expected}")
