"""Writes a safetensors file tensor by tensor, in the memory of one, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastldm.errors import Error, FileError
from fastldm.weights.header import DTYPES, TensorInfo

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """The tensors `read` gives, each with the shape and dtype of its info. progress: gets the bytes written each time.

    Larger dtypes come first, so that all are aligned. Raises `FileError` naming `path`; then nothing is left of it.
    """
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    with whole(path, new=True) as file:
        file.write(_header(order, infos, metadata))
        for name in order:
            tensor, info = read(name), infos[name]
            if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {info}")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if len(flat) else b"")
            progress(info.nbytes)


def _header(order: list[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    stop = 0
    for name in order:
        start, stop = stop, stop + infos[name].nbytes
        shape, dtype = list(infos[name].shape), _WORDS[infos[name].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def whole(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an exception, complete and on disk.

    Until then it has a name of its own beside it; a file that was there before survives any failure.
    new: a file that came to be there meanwhile survives, too, and is an error.
    """
    part = partial_name(path)
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (_take if new else os.replace)(part, path)
    except Error:  # of what is read
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}", field="out") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    sync_folder(path.parent)


def _take(part: Path, path: Path) -> None:
    """Gives a file a name that nobody has, which renaming does not ensure."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.replace(part, path)


def partial_name(path: Path) -> Path:
    """A name beside `path` that nobody has."""
    return path.with_name(f".fastldm-{secrets.token_hex(8)}.partial")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut, where the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
