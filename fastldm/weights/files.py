"""What is on disk, safely: a model's folder, its JSON and its tensors, and nothing outside of it.

Every file is opened once, must be a regular file inside the model's folder (links of the hub's cache aside),
and is read by `pread` into memory of our own: a file that shrinks later is an error and never a crash.
What a file is, its content says and not its name. Nothing that a model's folder holds is imported or run: a pickle is
read by `pickles.py` alone, and no failure of another format leads there.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import torch

from fastldm.errors import FileError
from fastldm.weights.header import MAX_HEADER, TensorInfo, read_header
from fastldm.weights.pickles import Pickled
from fastldm.weights.strict import shown, strict_json

MAX_FILE = 64 << 30
MAX_SHARDS = 256
MAX_JSON = 1 << 20
JSON_DEPTH = 32
READ_CHUNK = 1 << 30  # one preadv moves less than 2 GiB
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PICKLED_STEMS = {"model": "pytorch_model"}  # transformers' older name; others are the same in both formats
TOKENIZERS = ("tokenizer", "tokenizer_2")
SAFETENSORS, PICKLE = "safetensors", "a pickle"
# In a zip archive; with a protocol; without, as of old: a global, or a container that is noted.
_PICKLES = rb"PK\x03\x04|\x80[\0-\x05]|\(?[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\(?[dlt]p\d+\n|[\]}]q\0"
_KINDS = {  # what stands in place of weights in the wild, by its first bytes
    rb"version https://git-lfs": "is a Git LFS pointer, not the weights: run `git lfs pull` in its folder",
    rb"GGUF": "is a GGUF file, which is not supported",
    rb"7z\xbc\xaf\x27\x1c|\x1f\x8b|Rar!|PK\x05\x06|PK\x07\x08|BZh|\xfd7zXZ": "is an archive: unpack it",
    rb"(?s).{257}ustar": "is a tar archive: unpack it",
    rb"\x93NUMPY|\x89HDF": "is a NumPy or HDF5 file, which is not supported",
    rb"(?i)\s*<(!doctype|html|head|\?xml)": "is a web page, often the error page of a failed download",
    rb"\s*[{\[]\s*[\"}\]{\[]": "is a JSON file, not the weights",
    rb"[\t\n\r\x20-\x7e]+\Z": "is a text file",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_ADVICE = {
    "GatedRepoError": "it is gated: accept its terms on the hub, then pass token= or run `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: check the name, or pass token=",
    "RevisionNotFoundError": "it has no such revision: check revision=",
}
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40,64}")  # the hub's checksum of the file: SHA-1 or SHA-256
_PART = re.compile(r"[A-Za-z0-9_][\w.+ -]{0,254}", re.ASCII)
_NOT_BLOCKING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would wait for its writer


def open_model(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> ModelFolder:
    """The folder of a pipeline: one on disk, or a model of the hub ("owner/name"), through the hub's cache.

    Raises `FileError` naming the folder or id and what to do, if it is in neither place.
    """
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise FileError(f"variant = {shown(variant)} must be a plain word such as 'fp16'", field="variant")
    name = os.fspath(path_or_id)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return ModelFolder(path, variant)
    if os.path.lexists(path):
        raise FileError(f"{name} is not a folder; the folder with model_index.json is expected", field="model")
    if not _HUB_ID.fullmatch(name) or ".." in name:
        reason = "is neither a folder nor a model id of the form 'owner/name'"
        raise FileError(f"{shown(name)} {reason}", field="model")
    return ModelFolder(_fetch(name, revision, variant, cache_dir, local_files_only, token), variant)


class ModelFolder:
    """A model's folder. Names are relative to it, parts joined by "/"; nothing outside of it is ever opened.

    Raises `FileError` naming the file where one is missing, damaged, too large, not regular, or leads out.
    """

    def __init__(self, root: str | os.PathLike[str], variant: str | None = None) -> None:
        self.root = Path(os.path.realpath(root))
        self.variant = variant
        self._blobs = _hub_blobs(self.root)

    def has(self, relative: str) -> bool:
        """Whether there is a file or folder of that name, readable or not."""
        return os.path.lexists(self._named(relative))

    def path(self, relative: str) -> Path:
        """The checked place of a file or folder, for libraries that open files themselves."""
        named = self._named(relative)
        real = Path(os.path.realpath(named))
        is_blob = real.parent == self._blobs and _BLOB.fullmatch(real.name)
        if not real.is_relative_to(self.root) and not is_blob:
            raise FileError(f"{named} is a link that leads out of the model's folder: put the file itself there")
        return real

    def open(self, relative: str) -> File:
        """The file, open for reading; the caller closes it."""
        return File(self.path(relative), str(self._named(relative)))

    def read_json(self, relative: str) -> dict[str, Any]:
        """One JSON object of at most 1 MiB, read strictly (see `strict_json`)."""
        return strict_json(self.read_bytes(relative, MAX_JSON), str(self._named(relative)), JSON_DEPTH)

    def read_bytes(self, relative: str, limit: int) -> bytes:
        """All of a file of at most `limit` bytes."""
        with self.open(relative) as file:
            if file.size > limit:
                raise FileError(f"{file.where} has {file.size} bytes; at most {limit} are allowed")
            return file.read(file.size, 0)

    def tensors(self, component: str, stem: str | None = None) -> TensorFiles:
        """The weights of a component ("unet"): one file, or the shards that an index lists.

        `stem` is the name of the weights without variant and extension; None: the usual one of the component.
        Files named as pickles ("diffusion_pytorch_model.bin") are opened only where none is named as safetensors.
        """
        if stem is None:
            if component not in STEMS:
                raise FileError(f"{shown(component)} has no usual file name; known: {', '.join(STEMS)}")
            stem = STEMS[component]
        pickled = PICKLED_STEMS.get(stem, stem)
        for name in (*_weight_names(stem, self.variant), *_weight_names(pickled, self.variant, "bin")):
            relative = inside(component, name)
            if self.has(relative) and name.endswith(".json"):
                return self._sharded(component, relative)
            if self.has(relative):
                return TensorFiles(str(self._named(relative)), [self.open(relative)])
        raise self._no_weights(component, stem)

    def _named(self, relative: str) -> Path:
        return self.root.joinpath(*_parts(relative, str(self.root)))

    def _sharded(self, component: str, index: str) -> TensorFiles:
        where = str(self._named(index))
        weight_map = self.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FileError(f"{where}: weight_map must map the tensors' names to file names")
        listed: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _PART.fullmatch(shard):
                raise FileError(f"{where}: {shown(name)}: {shown(shard)} is not a plain file name", field=name)
            listed.setdefault(shard, set()).add(name)
        if len(listed) > MAX_SHARDS:
            raise FileError(f"{where}: lists {len(listed)} files; at most {MAX_SHARDS} are allowed")
        return TensorFiles(where, (self.open(inside(component, shard)) for shard in listed), [*listed.values()])

    def _no_weights(self, component: str, stem: str) -> FileError:
        folder = self.path(component) if component else self.root
        if not folder.is_dir():
            return FileError(f"{self.root} has no folder {shown(component)}")
        names = os.listdir(folder)
        variants = _variants(names, stem)
        if variants:
            wanted = f"variant {shown(self.variant)}" if self.variant else "weights without a variant"
            found = ", ".join(shown(v) if v else "none" for v in variants)
            return FileError(f"{folder} has no {wanted}; variants here: {found}", field="variant")
        return FileError(f"{folder / _weight_names(stem, self.variant)[0]} is missing")


class File:
    """A regular file, open for reading at any place; `where` is its name in messages."""

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        try:
            self._fd = os.open(path, _NOT_BLOCKING)
        except FileNotFoundError:
            raise FileError(f"{where} is missing") from None
        except (OSError, ValueError) as error:
            raise FileError(f"{where} cannot be opened: {error}") from None
        status = os.fstat(self._fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileError(f"{where} is not a regular file ({stat.filemode(status.st_mode)})")
        if self.size > MAX_FILE:
            self.close()
            raise FileError(f"{where} has {self.size} bytes; at most {MAX_FILE} are allowed")

    def read(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer at the end of the file."""
        buffer = bytearray(length)
        return bytes(buffer[: self.read_into(memoryview(buffer), offset)])

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills `buffer` from `offset`; returns how many bytes there were."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done : done + READ_CHUNK]], offset + done)
            except OSError as error:
                raise FileError(f"{self.where} cannot be read: {error}") from None
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Opened(Protocol):
    """The tensors of one open file."""

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor: ...


class Safetensors:
    """The tensors of one safetensors file, read one by one into memory of their own."""

    def __init__(self, file: File) -> None:
        header = read_header(file.read, file.size, file.where)
        self.infos: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, str] = header.metadata
        self._file, self._header = file, header

    def read(self, name: str) -> torch.Tensor:
        info = self._header.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
        present = self._file.read_into(data.numpy().data, self._header.data_offset + info.start)
        if present != info.nbytes:
            cut = f"was cut while open: {info.nbytes} bytes expected, {present} present"
            raise FileError(f"{self._file.where}: tensor {shown(name)}: {cut}", field=name)
        return (data.ne(0) if info.dtype is torch.bool else data.view(info.dtype)).view(info.shape)


class TensorFiles:
    """The tensors of one or several files, safetensors or pickles.

    `where` names the file, or the index of several; `infos` describes all tensors, `metadata` is free text.
    `listed`: the names that an index expects in each file. A `with` block closes the files.
    Raises `FileError` naming file and tensor.
    """

    def __init__(self, where: str, files: Iterable[File], listed: list[set[str]] | None = None) -> None:
        self.where = where
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files: list[File] = []
        self._places: dict[str, Opened] = {}
        try:
            for i, file in enumerate(files):
                self._files.append(file)
                opened = _opened(file)
                if listed is not None:
                    _check_listed(opened.infos.keys(), listed[i], file.where)
                self.infos |= opened.infos
                self.metadata |= opened.metadata
                self._places |= dict.fromkeys(opened.infos, opened)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor on the CPU, in the dtype of the file."""
        if name not in self.infos:
            raise FileError(f"{self.where} has no tensor {shown(name)}", field=name)
        if name not in self._places:
            raise FileError(f"{self.where} cannot be read: it is closed")
        return self._places[name].read(name)

    def close(self) -> None:
        self._places.clear()
        for file in self._files:
            file.close()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(path: str | os.PathLike[str]) -> TensorFiles:
    """The tensors of one file, safetensors or a pickle, whatever its name. Raises `FileError` naming it."""
    return TensorFiles(os.fspath(path), [open_regular(path)])


def open_regular(path: str | os.PathLike[str]) -> File:
    """A file that the caller names, links followed. Raises `FileError` naming it."""
    where = os.fspath(path)
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise FileError(f"{shown(where)} cannot be opened: {error}") from None
    return File(real, where)


def kind_of(first: bytes) -> str:
    """What a file is by its first 512 bytes: `SAFETENSORS`, `PICKLE`, or what it is instead, for a message.

    Where nothing is known of them they are taken for damaged safetensors: that reader says what is wrong.
    """
    if len(first) < 8 or (first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= MAX_HEADER):
        return SAFETENSORS
    if re.match(_PICKLES, first):
        return PICKLE
    return next((kind for pattern, kind in _KINDS.items() if re.match(pattern, first)), SAFETENSORS)


def _opened(file: File) -> Opened:
    kind = kind_of(file.read(512, 0))
    if kind == SAFETENSORS:
        return Safetensors(file)
    if kind == PICKLE:
        return Pickled(file)
    raise FileError(f"{file.where}: {kind}")


def _check_listed(present: Set[str], listed: set[str], where: str) -> None:
    for name in sorted(listed ^ present):
        reason = "is not in it, but the index says so" if name in listed else "is in it, but the index says otherwise"
        raise FileError(f"{where}: tensor {shown(name)} {reason}", field=name)


def inside(component: str, name: str) -> str:
    """The name of a file of a component, relative to the model's folder; "" is the folder itself."""
    return f"{component}/{name}" if component else name


def _parts(relative: str, where: str) -> list[str]:
    parts = relative.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        raise FileError(f"{where}: {shown(relative)} is not a plain name inside the model's folder")
    return parts


def _hub_blobs(root: Path) -> Path | None:
    """Where the links of a snapshot in the hub's cache, models--owner--name/snapshots/<revision>/, lead.

    None where that is itself a link: such a folder is not the hub's, and could lead anywhere.
    """
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            blobs = place.parent.parent / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def _weight_names(stem: str, variant: str | None, ending: str = "safetensors") -> list[str]:
    """The file name of a component's weights, then those of their index: as now written, formerly, by hand"""
    if variant is None:
        return [f"{stem}.{ending}", f"{stem}.{ending}.index.json"]
    return [
        f"{stem}.{variant}.{ending}",
        f"{stem}.{ending}.index.{variant}.json",
        f"{stem}.{ending}.{variant}.index.json",
        f"{stem}.{variant}.{ending}.index.json",
    ]


def _variants(names: Iterable[str], stem: str) -> list[str]:
    """The variants whose weights are among the file names; "" stands for weights without one."""
    word = r"(?:\.([\w-]+?))?"
    one = rf"{stem}{word}\.safetensors|{PICKLED_STEMS.get(stem, stem)}{word}\.bin"
    pattern = re.compile(rf"(?:{one})(?:{word}\.index{word}\.json)?", re.ASCII)
    groups = [m.groups() for m in map(pattern.fullmatch, names) if m]
    return sorted({next(filter(None, found), "") for found in groups if "-of-" not in str(found[:2])})


def _hub_patterns(variant: str | None) -> list[str]:
    """What a pipeline needs of a model on the hub, and not its other variants and formats."""
    patterns = ["model_index.json", "scheduler/scheduler_config.json"]
    patterns += [f"{folder}/*{kind}" for folder in TOKENIZERS for kind in (".json", ".txt")]
    word = f".{variant}" if variant else ""
    for folder, stem in STEMS.items():
        shards = [f"{stem}{word}-?????-of-?????.safetensors", f"{stem}-?????-of-?????{word}.safetensors"]
        patterns += [f"{folder}/{name}" for name in ("config.json", *_weight_names(stem, variant), *shards)]
    return patterns


def _fetch(
    name: str,
    revision: str | None,
    variant: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=os.fspath(cache_dir) if cache_dir else None,
            allow_patterns=_hub_patterns(variant),
            local_files_only=local_files_only,
            token=token,
        )
    except Exception as error:  # the client lets errors of its HTTP library through, which differ by version
        kind = type(error).__name__
        advice = _HUB_ADVICE.get(kind, "connect to the network, or pass the path of a folder that holds it")
        asked = f"revision {shown(revision)} of {name}" if revision else name
        reason = f"is no folder here, not complete in the hub's cache, and was not fetched ({kind})"
        raise FileError(f"{asked} {reason}: {advice}", field="model") from error
    return Path(folder)
