"""The good files of `faults.py`, and the ways in which `fault_cases.py` damages copies of them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastldm import config
from fastldm.weights import ldm
from fastldm.weights.keymap import present_name
from tests.oracle import saved, stable_diffusion
from tests.weights.other_kinds import KINDS

FOLDER, CHECKPOINT, CKPT = "tiny", "checkpoint.safetensors", "checkpoint.ckpt"
SNAPSHOT = "hub/models--some-one--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
STEM = "diffusion_pytorch_model"
UNET, VAE = f"{FOLDER}/unet/{STEM}.safetensors", f"{FOLDER}/vae/{STEM}.safetensors"
TEXT = f"{FOLDER}/text_encoder/model.safetensors"
INDEX, SCHEDULER = f"{FOLDER}/model_index.json", f"{FOLDER}/scheduler/scheduler_config.json"
UNET_JSON, VAE_JSON = f"{FOLDER}/unet/config.json", f"{FOLDER}/vae/config.json"
TEXT_JSON = f"{FOLDER}/text_encoder/config.json"
VOCABULARY = f"{FOLDER}/tokenizer/tokenizer.json"
SHARDS = f"{FOLDER}/unet/{STEM}.safetensors.index.json"
CANARY = "canary"  # what the code in a file would make, where it runs

Change = Callable[[Path], object]
Tensors = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------- the good files


def make_good(at: Path) -> None:
    """A tiny Stable Diffusion 1.x with random weights: as a folder, and as single files in the original layout."""
    saved(stable_diffusion(), at / FOLDER)
    tensors = original_layout(at / FOLDER)
    save_file(tensors, at / CHECKPOINT)
    torch.save({"state_dict": tensors, "global_step": 1000}, at / CKPT)


def original_layout(folder: Path) -> Tensors:
    clip = "cond_stage_model.transformer.text_model."
    sections: tuple[tuple[str, Callable[..., Any], Callable[..., ldm.Places], str], ...] = (
        (UNET, config.unet_config, ldm.unet_places, "model.diffusion_model."),
        (VAE, config.vae_config, ldm.vae_places, "first_stage_model."),
        (TEXT, config.text_config, ldm.clip_places, clip),
    )
    found: Tensors = {}
    for file, read, places, prefix in sections:
        path = folder.parent / file
        place = places(read(json.loads((path.parent / "config.json").read_text()), file))
        for name, tensor in load_file(path).items():
            there = place(present_name(name) or name)
            found[prefix + there.name] = there.there(tensor).contiguous()
    return found


def copy_good(good: Path, at: Path, *, files: bool) -> None:
    """A fresh copy of the folder, and with `files` of the single files."""
    at.mkdir()
    shutil.copytree(good / FOLDER, at / FOLDER)
    for name in (CHECKPOINT, CKPT) if files else ():
        shutil.copyfile(good / name, at / name)


# ------------------------------------------------------------------------------------------------------ kinds of change


def nothing(_: Path) -> None:
    pass


def cut(keep: float | int) -> Change:
    """Keeps that many bytes, from the end where negative; or that share, where a fraction."""

    def change(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size if keep < 0 else keep)

    return change


def content(raw: bytes | str) -> Change:
    return lambda path: path.write_bytes(raw.encode() if isinstance(raw, str) else raw)


def appended(raw: bytes) -> Change:
    return lambda path: path.write_bytes(path.read_bytes() + raw)


def swapped(old: bytes, new: bytes) -> Change:
    """The first match of a pattern replaced; there must be one."""

    def change(path: Path) -> None:
        raw, count = re.subn(old, lambda _: new, path.read_bytes(), count=1)
        assert count == 1, f"{path} has no {old!r}"
        path.write_bytes(raw)

    return change


def each(*changes: Change) -> Change:
    def change(path: Path) -> None:
        for one in changes:
            one(path)

    return change


def moved(name: str) -> Change:
    """To another name, relative to its folder."""

    def change(path: Path) -> None:
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(path.parent / name)

    return change


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def beside(name: str, change: Change) -> Change:
    """The change of another file, by its place relative to the case's."""
    return lambda path: change(path.parent / name)


def edited(**changes: Any) -> Change:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def literal(key: str, text: str) -> Change:
    """A value that Python's json would not write."""

    def change(path: Path) -> None:
        edited(**{key: "@"})(path)
        path.write_text(path.read_text().replace('"@"', text))

    return change


def tensors(alter: Callable[[Tensors], object]) -> Change:
    """Changes the dict of a safetensors file's tensors."""

    def change(path: Path) -> None:
        found = load_file(path)
        alter(found)
        save_file(found, path, metadata={"format": "pt"})

    return change


def put(name: str, alter: Callable[[Tensor], Tensor]) -> Change:
    """One tensor in place of another."""
    return tensors(lambda found: found.update({name: alter(found[name]).contiguous()}))


def added(**more: Tensor) -> Change:
    return tensors(lambda found: found.update(more))


def dropped(pattern: str) -> Change:
    def alter(found: Tensors) -> None:
        names = [name for name in found if re.fullmatch(pattern, name)]
        assert names, f"no tensor is called {pattern}"
        for name in names:
            del found[name]

    return tensors(alter)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    """One value of a tensor, in its middle."""
    return lambda tensor: tensor.clone().index_put_(
        tuple(torch.tensor(n // 2) for n in tensor.shape), torch.tensor(value)
    )


def header(alter: Callable[[dict[str, Any], bytes], tuple[str | dict[str, Any], bytes]]) -> Change:
    """Changes what the header of a safetensors file says, and the bytes behind it."""

    def change(path: Path) -> None:
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        said, data = alter(json.loads(raw[8:end]), raw[end:])
        text = (said if isinstance(said, str) else json.dumps(said)).encode("utf-8")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return change


def entry(**changes: Any) -> Change:
    """Changes what the header says about its first tensor."""

    def alter(said: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        return {**said, _first(said): {**said[_first(said)], **changes}}, data

    return header(alter)


def _first(said: Mapping[str, Any]) -> str:
    return min((name for name in said if name != "__metadata__"), key=lambda name: said[name]["data_offsets"])


def _last(said: Mapping[str, Any]) -> str:
    return max((name for name in said if name != "__metadata__"), key=lambda name: said[name]["data_offsets"])


def overlapping(said: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    start, stop = said[_last(said)]["data_offsets"]
    said[_last(said)]["data_offsets"] = [start - 4, stop - 4]
    return said, data[:-4]


def hole(said: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    start, stop = said[_last(said)]["data_offsets"]
    said[_last(said)]["data_offsets"] = [start + 8, stop + 8]
    return said, data[:start] + bytes(8) + data[start:]


def twice(other_bytes: bool) -> Change:
    """The first tensor's entry a second time, for the same bytes or for others of the same length."""

    def alter(said: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        name = _first(said)
        start, stop = said[name]["data_offsets"]
        again = {**said[name], "data_offsets": [stop, 2 * stop - start] if other_bytes else [start, stop]}
        return f"{json.dumps(said)[:-1]}, {json.dumps({name: again})[1:]}", data

    return header(alter)


def high_rank(said: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    offsets = [len(data), len(data) + 4]
    return {**said, "deep": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": offsets}}, data + bytes(4)


def many_tensors(path: Path) -> None:
    """A header of 99 MB beside the real tensors: 1.6 million empty ones."""

    def alter(said: dict[str, Any], data: bytes) -> tuple[str, bytes]:
        empty = (f'"e{i:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_600_000))
        return f"{json.dumps(said)[:-1]},{','.join(empty)}}}", data

    header(alter)(path)


def archive(alter: Callable[[dict[str, bytes]], object], **options: Any) -> Change:
    """Writes the archive that torch.save makes anew, with other contents."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            contents = {info.filename: file.read(info) for info in file.infolist()}
        alter(contents)
        with zipfile.ZipFile(path, "w", **options) as file:
            for name, raw in contents.items():
                file.writestr(name, raw)

    return change


def half_a_storage(contents: dict[str, bytes]) -> None:
    name = next(name for name in contents if name.endswith("/data/0"))
    contents[name] = contents[name][: len(contents[name]) // 8 * 4]


def second_program(contents: dict[str, bytes]) -> None:
    contents["other/data.pkl"] = pickle.dumps(Gadget(), 2)


def pickled_dict(alter: Callable[[dict[str, Any]], object], **options: Any) -> Change:
    """Changes what a .ckpt holds, and writes it with torch.save."""

    def change(path: Path) -> None:
        found = torch.load(path, weights_only=True)["state_dict"]
        alter(found)
        torch.save(found, path, **options)

    return change


def in_pickle(name: str, make: Callable[[Tensor], Any]) -> Change:
    return pickled_dict(lambda found: found.update({name: make(found[name])}))


def sparse(tensor: Tensor) -> Tensor:
    where = torch.zeros(tensor.ndim, 1, dtype=torch.int64)
    return torch.sparse_coo_tensor(where, torch.ones(1), tensor.shape, check_invariants=False)


def zip_bomb(path: Path) -> None:
    """One tensor more: 512 MiB of zeros in 0.5 MB."""
    pickled_dict(lambda found: found.update(bomb=torch.zeros(1 << 27)))(path)
    archive(lambda _: None, compression=zipfile.ZIP_DEFLATED, compresslevel=1)(path)


class Gadget:
    """Unpickling makes the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


class Evaluated:
    """Unpickling evaluates an expression that makes the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({CANARY!r})",)


def bin_in_place_of_safetensors(name: str, alter: Callable[[dict[str, Any]], object]) -> Change:
    """The weights of a folder's component as a pickle, under the name that it has there."""

    def change(path: Path) -> None:
        found: dict[str, Any] = load_file(path)
        alter(found)
        torch.save(found, path.parent / name)
        path.unlink()

    return change


# ---------------------------------------------------------------------------------------------------- folders and links


def sharded(path: Path) -> Path:
    """The U-Net in two files with an index; returns their folder."""
    found = load_file(path)
    names = sorted(found)
    half = len(names) // 2
    places: dict[str, str] = {}
    for i, part in enumerate((names[:half], names[half:]), 1):
        shard = f"{STEM}-0000{i}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, path.parent / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path.parent / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    return path.parent


FIRST_SHARD, SECOND_SHARD = (f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))


def shards(change: Change) -> Change:
    """Shards the U-Net, then changes its folder."""
    return lambda path: change(sharded(path))


def index(alter: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / f"{STEM}.safetensors.index.json"
        said = json.loads(path.read_text())
        alter(said)
        path.write_text(json.dumps(said))

    return shards(change)


def shard_called(name: str) -> Change:
    """The second shard, by that name in the index, where it then is."""

    def change(folder: Path) -> None:
        target = folder / name.format(folder=folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / SECOND_SHARD).rename(target)
        path = folder / f"{STEM}.safetensors.index.json"
        path.write_text(path.read_text().replace(SECOND_SHARD, name.format(folder=folder)))

    return shards(change)


def index_twice(folder: Path) -> None:
    """One tensor listed twice, in two files, of which the second is right."""
    path = folder / f"{STEM}.safetensors.index.json"
    name, place = next(iter(json.loads(path.read_text())["weight_map"].items()))
    other = SECOND_SHARD if place == FIRST_SHARD else FIRST_SHARD
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{other}", ', 1))


def in_both_shards(folder: Path) -> None:
    """A tensor of the first shard also in the second, with other values."""
    first, second = (load_file(folder / name) for name in (FIRST_SHARD, SECOND_SHARD))
    save_file({**second, "conv_in.weight": first["conv_in.weight"] + 1}, folder / SECOND_SHARD)


def linked_outside(path: Path) -> None:
    """To the same content, two folders above the model's."""
    path.rename(path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


def hub_cache(outside: bool) -> Change:
    """The model as the hub's cache lays it out; with `outside`, the U-Net's link leads past the cache's blobs."""

    def change(folder: Path) -> None:
        snapshot = folder.parent / SNAPSHOT
        blobs = snapshot.parents[1] / "blobs"
        blobs.mkdir(parents=True)
        for i, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            place = snapshot / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            away = outside and path == folder.parent / UNET
            blob = folder.parent / "outside" if away else blobs / f"{i:064x}"
            path.rename(blob)
            place.symlink_to(os.path.relpath(blob, place.parent))
        shutil.rmtree(folder)

    return change


def special(kind: str) -> Change:
    """A file of another kind in the place of the good one."""

    def change(path: Path) -> None:
        removed(path)
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(f"/proc/self/cwd/{os.path.relpath(path)}")
            case "giant":
                path.touch()
                os.truncate(path, 65 << 30)
            case device:
                path.symlink_to(device)

    return change


def python_files(folder: Path) -> None:
    for place in ("", "unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        for name in ("pipeline.py", "my_unet.py", "__init__.py"):
            (folder / place / name).write_text(f"import os\nos.mkdir({CANARY!r})\n")


# ---------------------------------------------------------------------------------------------------------- other kinds


def other_kind(name: str) -> Change:
    """A file of that kind, with fewer channels."""

    def change(path: Path) -> None:
        shapes = {key: [n if n <= 16 else 8 + -(-n // 64) for n in shape] for key, shape in KINDS[name].shapes.items()}
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)

    return change


def noise(path: Path) -> None:
    """Other weights in the same place, the same inode."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    found = {name: torch.randn(tensor.shape) for name, tensor in load_file(path).items()}
    save_file(found, path.parent / "noise")
    other = (path.parent / "noise").read_bytes()
    assert len(other) >= len(raw) - end
    with path.open("r+b") as file:
        file.write(other[: len(raw)])
