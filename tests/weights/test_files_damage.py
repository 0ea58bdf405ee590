"""Files that are cut, rewritten, of another kind or not files at all."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import struct
from pathlib import Path

import pytest
import torch

from fastldm.errors import FileError
from fastldm.weights import files as module
from fastldm.weights.files import open_file, open_model
from tests.weights.folders import STEM, Gadget, refused, weights

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")


def test_f01_f02_a_file_cut_anywhere_is_an_error(root: Path, tmp_path: Path) -> None:
    whole = (root / f"unet/{STEM}.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(9), *random.Random(1).sample(range(len(whole)), 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.safetensors: is truncated: .* expected, \d+ present"):
            open_file(cut)


def test_f04_f32_a_sparse_giant_is_refused_by_its_size(tmp_path: Path) -> None:
    giant = tmp_path / "giant.safetensors"
    with giant.open("wb") as file:
        file.truncate(module.MAX_FILE + 1)
    with pytest.raises(FileError, match=f"has {module.MAX_FILE + 1} bytes; at most {module.MAX_FILE}"):
        open_file(giant)


def test_f18_a_file_cut_while_open_is_an_error(root: Path) -> None:
    path = root / f"unet/{STEM}.safetensors"
    whole = path.read_bytes()
    for length in random.Random(2).sample(range(len(whole)), 100):
        path.write_bytes(whole)
        with open_model(root).tensors("unet") as tensors:
            os.truncate(path, length)
            kept = 0
            for name, value in weights().items():
                try:
                    assert torch.equal(tensors.read(name), value)
                    kept += 1
                except FileError as error:
                    message = str(error)
            assert kept < len(weights())
            assert f"{STEM}.safetensors: tensor" in message
            assert "cut while open" in message


def test_f19_a_file_rewritten_after_the_read_changes_nothing(root: Path) -> None:
    path = root / f"unet/{STEM}.safetensors"
    with open_model(root).tensors("unet") as tensors:
        values = {name: tensors.read(name) for name in tensors.infos}
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(path.stat().st_size))
        for name, value in weights().items():
            assert torch.equal(values[name], value)


def test_mutated_files_are_read_right_or_refused(root: Path, tmp_path: Path) -> None:
    """The same verdict through the disk as in memory: seeded damage to a whole file."""
    rng = random.Random(3)
    whole = (root / f"unet/{STEM}.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "mutated"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with open_file(path) as tensors:
                for name, info in tensors.infos.items():
                    assert tensors.read(name).shape == info.shape
        except FileError as error:
            message = str(error)
            assert message.startswith(str(path))


# ----------------------------------------------------------------------------------------------------- kinds of files


def hostile(canary: Path) -> dict[str, bytes]:
    """Files that are no weights, by what must be said of them."""
    archive = canary.parent / "archive"
    torch.save({"a": Gadget(canary)}, archive)
    old = canary.parent / "old"
    torch.save({"a": Gadget(canary)}, old, _use_new_zipfile_serialization=False)
    return {
        "its pickle names 'posix.mkdir'": archive.read_bytes(),
        "names 'posix.mkdir', which may run code": pickle.dumps(Gadget(canary)),
        "names 'posix.mkdir', .* never loaded": old.read_bytes(),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n",
        "web page": b"<html><head><title>403</title></head></html>",
    }


def test_f20_content_is_judged_and_extensions_are_not(root: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    kinds = [
        ".safetensors",
        ".SAFETENSORS",
        ".Safetensors",
        ".bin",
        ".ckpt",
        ".pt",
        ".safetensors.bin",
        ".gguf",
        "",
    ]
    names = [f"{stem}{kind}" for kind in kinds for stem in ("model", "a b", "model.fp16", "x")][:30]
    for match, content in hostile(canary).items():
        for name in names:
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(FileError, match=match) as caught:
                open_file(path)
            assert str(path) in str(caught.value)
        (root / f"unet/{STEM}.safetensors").write_bytes(content)
        refused(root, match)
    assert not canary.exists()


KINDS = {
    "Git LFS pointer, .*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "is a zip archive": b"PK\x03\x04" + bytes(60),
    "its pickle names 'os.system'.* as safetensors": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01cos\nsystem\n.",
    "GGUF file": b"GGUF\x03\x00\x00\x00" + b"\x01" * 60,
    "is an archive": b"7z\xbc\xaf\x27\x1c" + b"\x01" * 60,
    "tar archive": b"weights".ljust(257, b"\0") + b"ustar\x0000" + bytes(248),
    "NumPy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "web page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "JSON file": b'{"error": "Repository not found"}',
    "text file": b"Access to this resource is denied.\n",
}


@pytest.mark.parametrize("match", KINDS)
def test_f20_other_files_are_refused_by_what_they_are(tmp_path: Path, match: str) -> None:
    for padding in (b"", b" " * 4096):
        (tmp_path / "model.safetensors").write_bytes(KINDS[match] + padding)
        with pytest.raises(FileError, match=match):
            open_file(tmp_path / "model.safetensors")


def test_f20_what_a_file_is_stands_in_its_first_bytes(root: Path, tmp_path: Path) -> None:
    def kind(path: Path) -> str:
        return module.kind_of(path.read_bytes()[:512])

    assert kind(root / f"unet/{STEM}.safetensors") == module.SAFETENSORS
    for zipped in (True, False):
        torch.save(weights(), tmp_path / "x", _use_new_zipfile_serialization=zipped)
        assert kind(tmp_path / "x") == module.PICKLE
    for protocol in range(6):
        assert module.kind_of(pickle.dumps({"a": [1, 2], "b": 3}, protocol)) == module.PICKLE
    header = json.dumps({"a" * 1100: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = struct.pack("<Q", 0x480) + header.ljust(0x480)  # begins as a pickle does
    assert module.kind_of(file[:512]) == module.SAFETENSORS
    assert module.kind_of(b"") == module.SAFETENSORS  # whose reader says that it is truncated


def test_f32_only_regular_files_are_read(root: Path, tmp_path: Path) -> None:
    place = root / f"unet/{STEM}.safetensors"
    place.unlink()
    os.mkfifo(place)
    refused(root, r"is not a regular file \(p")
    place.unlink()
    place.mkdir()
    refused(root, r"is not a regular file \(d")
    place.rmdir()
    here = os.getcwd()
    os.chdir(place.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place.name)
        os.chdir(here)
        refused(root, "cannot be opened")
    for device in ("/dev/zero", "/dev/null", "/dev/stdin"):
        with pytest.raises(FileError, match=r"is not a regular file|is truncated|cannot be opened|missing"):
            open_file(device)
    os.mkfifo(root / "unet/pipe.json")
    with pytest.raises(FileError, match="is not a regular file"):
        open_model(root).read_json("unet/pipe.json")


# --------------------------------------------------------------------------------------------------------------- json


def test_unreadable_and_oversized_json(root: Path) -> None:
    (root / "big.json").write_text('{"a": "' + "x" * (1 << 20) + '"}')
    with pytest.raises(FileError, match=r"big\.json has 1048585 bytes; at most 1048576"):
        open_model(root).read_json("big.json")


@pytest.mark.parametrize("depth", [2, 32, 33, 1000, 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_f16_json_nests_32_levels(root: Path, depth: int, name: str) -> None:
    (root / "scheduler").mkdir()
    (root / name).write_text('{"a":' * depth + "1" + "}" * depth)
    folder = open_model(root)
    if depth <= 32:
        assert folder.read_json(name)
    else:
        with pytest.raises(FileError, match=f"{name}: is nested deeper than 32 levels"):
            folder.read_json(name)
