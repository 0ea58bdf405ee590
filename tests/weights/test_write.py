"""What `write_safetensors` writes is read by the safetensors library and by our reader; a failure leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastldm.errors import FileError
from fastldm.weights.files import open_file
from fastldm.weights.header import DTYPES, TensorInfo, read_header
from fastldm.weights.write import whole, write_safetensors
from tests.single import disk


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, in sizes that do not line up by themselves; a scalar, a transposed one, one channel of many."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for word, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 5), generator=generator)
        made[f"a.{word.lower()}"] = values.to(dtype)
    made["scalar"] = torch.tensor(2.5)
    made["transposed"] = torch.randn(4, 7, generator=generator).half().T
    made["channels last"] = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    made["a slice"] = torch.randn(6, 9, generator=generator)[1:, 3]
    made["näme"] = torch.randn(3, generator=generator).bfloat16()
    return made


def written(path: Path, found: dict[str, torch.Tensor], **options: Any) -> Path:
    infos = {name: TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    write_safetensors(path, infos, found.__getitem__, **options)
    return path


def test_the_library_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", tensors(), metadata={"made": "today"})
    found = load_file(path)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "today"}


def test_our_reader_reads_it(tmp_path: Path) -> None:
    with open_file(written(tmp_path / "a.safetensors", tensors())) as file:
        assert file.infos.keys() == tensors().keys()
        for name, tensor in tensors().items():
            assert torch.equal(file.read(name), tensor), name


@pytest.mark.parametrize("length", range(1, 9))
def test_every_tensor_is_aligned(tmp_path: Path, length: int) -> None:
    """To the size of its dtype, the data to 8 bytes: so it can be mapped. Whatever the length of the header."""
    found = {**tensors(), "n" * length: torch.ones(1)}
    raw = written(tmp_path / "a.safetensors", found).read_bytes()
    header = read_header(lambda length, offset: raw[offset : offset + length], len(raw), "a")
    assert header.data_offset % 8 == 0
    for entry in header.tensors.values():
        assert (header.data_offset + entry.start) % entry.dtype.itemsize == 0, entry


@pytest.mark.parametrize("marker", ["v_pred", "ztsnr"])
def test_an_empty_tensor(tmp_path: Path, marker: str) -> None:
    path = written(tmp_path / "a.safetensors", {"x": torch.ones(3), marker: torch.empty(0)})
    assert load_file(path)[marker].shape == (0,)
    with open_file(path) as file:
        assert file.read(marker).shape == (0,)


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    backwards = dict(reversed(tensors().items()))
    first, second = written(tmp_path / "a", tensors()), written(tmp_path / "b", backwards)
    assert first.read_bytes() == second.read_bytes()


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    counts: list[int] = []
    written(tmp_path / "a", tensors(), progress=counts.append)
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors().values())
    assert len(counts) == len(tensors())


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """Each is read when the one before it is written."""
    events: list[str] = []
    found = tensors()
    infos = {name: TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}

    def read(name: str) -> torch.Tensor:
        events.append("read")
        return found[name]

    write_safetensors(tmp_path / "a", infos, read, progress=lambda count: events.append("written"))
    assert events == ["read", "written"] * len(found)


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(3).half()])
def test_a_tensor_other_than_announced_is_a_bug(tmp_path: Path, wrong: torch.Tensor) -> None:
    infos = {"x": TensorInfo("x", torch.float32, (3,))}
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "a", infos, lambda name: wrong)
    assert not os.listdir(tmp_path)


def fail_half_way(path: Path, error: BaseException) -> None:
    with whole(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt(), RuntimeError("of another kind")])
def test_what_was_there_survives_a_failure(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("before")
    expected = FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        fail_half_way(tmp_path / "a", error)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize("room", range(len(tensors()) + 1))
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    disk.with_room(monkeypatch, room)
    with pytest.raises(FileError, match="a cannot be written: No space left on device") as caught:
        written(tmp_path / "a", tensors())
    assert caught.value.field == "out"
    assert not os.listdir(tmp_path)


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    with whole(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a").exists()
        (partial,) = os.listdir(tmp_path)
        assert partial.startswith(".fastldm-")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"half"


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse that. The file is there; an error would say that it is not."""
    real = os.fsync

    def refuse(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(22, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    with whole(tmp_path / "a") as file:
        file.write(b"all")
    assert (tmp_path / "a").read_bytes() == b"all"


def test_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut there is no file of that name with nothing in it."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    with whole(tmp_path / "a") as file:
        file.write(b"all")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_very_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 240)
    written(path, {"x": torch.ones(3)})
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere/a cannot be written: No such file") as caught:
        written(tmp_path / "nowhere/a", {"x": torch.ones(3)})
    assert caught.value.field == "out"


def test_a_file_that_came_meanwhile_survives(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be written: File exists"), whole(tmp_path / "a", new=True):
        (tmp_path / "a").write_text("theirs")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "theirs"


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    name = "漢" * 80 + ".safetensors"
    assert len(name.encode()) == 252
    with whole(tmp_path / name) as file:
        file.write(b"content")
    assert os.listdir(tmp_path) == [name]
