"""Damaged, oversized and misleading checkpoints: an error at once, or the tensors that torch reads (F40 to F44)."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import signal
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastldm.errors import FileError
from fastldm.weights import archive as zipped
from fastldm.weights import opcodes
from fastldm.weights.files import open_file
from tests.weights import pickled
from tests.weights.folders import equal, weights
from tests.weights.pickled import (
    archive,
    constant,
    directory,
    in_memory,
    legacy,
    listed,
    local,
    name,
    raw_bytes,
    saved,
    state_dict,
    tensor,
    text,
)

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")


def refused_unseen(file: bytes, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before torch sees it."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    with pytest.raises(FileError, match=match) as caught:
        in_memory(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


# ----------------------------------------------------------------------------------------------------------- bombs


def deflated(value: dict[str, torch.Tensor], which: str) -> bytes:
    """A checkpoint of torch, packed anew with the files named `which` compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(value))) as old, zipfile.ZipFile(buffer, "w") as new:
        for file in old.infolist():
            method = zipfile.ZIP_DEFLATED if which in file.filename else zipfile.ZIP_STORED
            new.writestr(file.filename, old.read(file), method)
    return buffer.getvalue()


def shared_content(copies: int) -> bytes:
    """Many files of an archive that all are the same bytes."""
    names = {f"{i}": b"" for i in range(copies)}
    items = {key: tensor((1 << 16,), key=key) for key in names}
    file = archive(state_dict(items), {**names, "last": bytes(1 << 18)})
    place = directory(file)
    last = zipped._LISTED.unpack_from(file, place[-2])
    for i in range(2, 2 + copies):
        file = listed(file, i, f8=1 << 18, f9=1 << 18, f16=last[16])
    return file


def doubling(count: int) -> bytes:
    """Tuples of twice the last one: 2^count elements to whoever walks them."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * count + b"."


def many(opcode: bytes, count: int, rest: bytes) -> bytes:
    return b"\x80\x02" + opcode * count + rest


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed storages": (lambda: deflated({"a": torch.zeros(1 << 22)}, "data/"), "is compressed or encrypted"),
    "a compressed pickle": (lambda: deflated({"a": torch.zeros(1)}, "data.pkl"), "is compressed or encrypted"),
    "one content for all": (lambda: shared_content(200), "another header than the directory"),
    "a size beyond the file": (
        lambda: listed(saved({"a": torch.zeros(1)}), 4, f8=1 << 31, f9=1 << 31),
        "is out of place",
    ),
    "a packed size beyond the file": (
        lambda: listed(saved({"a": torch.zeros(1)}), 4, f9=1 << 31),
        "is compressed or encrypted",
    ),
    "a pickle of 17 MiB": (lambda: archive(bytes(17 << 20)), "has a pickle of 17825792 bytes; at most 16777216"),
    "too many files": (lambda: archive(b"", {f"{i}": b"" for i in range(300)}), "it holds 303 files"),
    "a long directory": (lambda: archive(b"", {f"{i:09000}": b"" for i in range(10)}), "listed in 90"),
    "an old pickle of 17 MiB": (lambda: legacy(b"\x80\x02(" + b"N" * (17 << 20) + b"t."), "more than|before seeing"),
    "opcodes": (lambda: archive(many(b"N", 5_001, b".")), "more than 5000 opcodes"),
    "marks": (lambda: archive(many(b"(", 5_001, b".")), "more than 5000 opcodes"),
    "doubled tuples": (lambda: archive(doubling(60)), "holds no tensors by name"),
    "doubled tuples as a key": (
        lambda: archive(b"\x80\x02}" + doubling(60)[2:-1] + b"Ns."),
        "neither text nor a number",
    ),
    "a deep key": (lambda: archive(b"\x80\x02})" + b"\x85" * 4_000 + b"Ns."), "neither text nor a number"),
    "doubled tuples as the old list": (
        lambda: legacy(b"\x80\x02}.").replace(b"]q\x00.", doubling(60)[2:]),
        "its storages are not those",
    ),
    "doubled tuples as a size": (
        lambda: archive(state_dict({"a": tensor((1,), stride=(doubling(60)[2:-1],))}), {"0": bytes(4)}),
        "is called otherwise",
    ),
    "a long text": (lambda: archive(b"\x80\x02X\xff\xff\xff\xff."), "expected 4294967295 bytes"),
    "a long number": (lambda: archive(b"\x80\x02\x8b\xff\xff\xff\x7f."), "not enough data"),
    "an old storage of 4 TiB": (
        lambda: legacy(state_dict({"a": tensor((1,), numel=1 << 40, legacy=True)}), {"0": torch.zeros(1)}),
        "storage '0' has 1 values; 1099511627776 of torch.float32 expected",
    ),
    "one storage under names of other case": (
        lambda: archive(state_dict({k: tensor((8,), key=k) for k in ("aa", "aA", "Aa", "AA")}), {"aa": bytes(32)}),
        "storage 'aA' is missing",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_f40_a_bomb_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    assert (opcodes.MAX_OPCODES, zipped.MAX_FILES, zipped.MAX_DIRECTORY) == (3_145_728, 65_552, 16 << 20)
    monkeypatch.setattr(opcodes, "MAX_OPCODES", 5_000)
    monkeypatch.setattr(zipped, "MAX_FILES", 300)
    monkeypatch.setattr(zipped, "MAX_DIRECTORY", 1 << 16)
    build, match = BOMBS[bomb]
    file = build()
    start = time.process_time()
    refused_unseen(file, match, monkeypatch)
    assert time.process_time() - start < 2.0
    tracemalloc.start()
    refused_unseen(file, match, monkeypatch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


# ------------------------------------------------------------------------------------------------------ misleading


def whole() -> bytes:
    return saved(weights())


def plain() -> bytes:
    """An archive as Python writes it: sizes of 32 bits, no records between the files."""
    return archive(*small())


def small() -> tuple[bytes, dict[str, bytes]]:
    values = torch.arange(4.0)
    return state_dict({"a": tensor((4,))}), {"0": values.numpy().tobytes()}


def rewritten(change: Callable[[zipfile.ZipFile, dict[str, bytes]], None]) -> bytes:
    """The small archive, written by `change` itself."""
    data, storages = small()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        change(file, {"archive/data.pkl": data, "archive/data/0": storages["0"], "archive/version": b"3\n"})
    return buffer.getvalue()


def named(*names: str, content: bytes = b"3\n") -> bytes:
    """The small archive with more files, of these names."""

    def change(file: zipfile.ZipFile, files: dict[str, bytes]) -> None:
        for key, value in files.items():
            file.writestr(key, value)
        for key in names:
            file.writestr(zipfile.ZipInfo(key), content)

    return rewritten(change)


def replaced(old: str, new: str) -> bytes:
    """The small archive with a file under another name of the same length."""
    return plain().replace(old.encode(), new.encode())


def tail(**fields: int) -> bytes:
    file = plain()
    return pickled.patched(file, len(file) - 22, zipped._END, **fields)


def tail64(**fields: int) -> bytes:
    file = whole()
    return pickled.patched(file, len(file) - 98, zipped._END64, **fields)


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        for part in ("sys_info", "pickle", "tensors", "storages"):
            file.addfile(tarfile.TarInfo(part))
    return buffer.getvalue()


def swapped() -> bytes:
    """The files listed in another order than they stand in."""
    file = plain()
    first, second, *_ = places = directory(file)
    third = places[2]
    return file[:first] + file[second:third] + file[first:second] + file[third:]


def hidden() -> bytes:
    """A second pickle between two files, which only a reader from the front finds."""
    file = plain()
    other = named("archive/.x")[: len(named()) - 200]
    start = zipped._LISTED.unpack_from(file, directory(file)[1])[-1]
    return moved(file[:start] + other + file[start:], len(other))


def moved(file: bytes, by: int, first: int = 1) -> bytes:
    """`file`, whose files from number `first` on and whose directory begin `by` bytes later."""
    end = len(file) - 22
    start = zipped._END.unpack_from(file, end)[6]
    file = pickled.patched(file, end, zipped._END, f6=start + by)
    at, index = start + by, 0
    while at < end:
        fields = zipped._LISTED.unpack_from(file, at)
        if index >= first:
            file = pickled.patched(file, at, zipped._LISTED, f16=fields[16] + by)
        at += zipped._LISTED.size + sum(fields[10:13])
        index += 1
    return file


ARCHIVE = "is a zip archive that torch.save did not write, or damaged"
EVASIONS: dict[str, tuple[Callable[[], bytes], str]] = {
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\x00\x04" + whole(), "is an archive: unpack it"),
    "rar": (lambda: b"Rar!\x1a\x07\x01\x00" + whole(), "is an archive: unpack it"),
    "gzip": (lambda: gzip.compress(whole()), "is an archive: unpack it"),
    "bzip2": (lambda: bz2.compress(whole()), "is an archive: unpack it"),
    "xz": (lambda: lzma.compress(whole()), "is an archive: unpack it"),
    "the oldest format": (tarred, "is a tar archive: unpack it"),
    "an empty archive": (lambda: b"PK\x05\x06" + bytes(18), "is an archive: unpack it"),
    "a spanned archive": (lambda: b"PK\x07\x08" + whole(), "is an archive: unpack it"),
    "no directory": (lambda: plain()[: directory(plain())[0]], f"{ARCHIVE}: it does not end with its directory"),
    "half a directory": (lambda: plain()[: directory(plain())[1]], f"{ARCHIVE}: it does not end"),
    "cut in the last record": (lambda: plain()[:-1], f"{ARCHIVE}: it does not end"),
    "cut before the last record": (lambda: plain()[:-22], f"{ARCHIVE}: it does not end"),
    "four bytes": (lambda: b"PK\x03\x04", r"is truncated|or damaged: unpack"),
    "bytes before": (lambda: b"#!/bin/sh\n\xff" + plain(), "has a header of"),
    "another header before": (lambda: b"PK\x03\x04" + plain(), f"{ARCHIVE}: it does not end"),
    "a pickle before": (lambda: b"\x80\x02N." + plain(), "is a pickle, but none of torch.save"),
    "another archive before": (lambda: plain() + plain(), f"{ARCHIVE}: it does not end"),
    "a moved archive before": (lambda: moved(plain() + plain(), len(plain()), 0), f"{ARCHIVE}: .* is out of place"),
    "a byte behind": (lambda: plain() + b"\0", f"{ARCHIVE}: it does not end"),
    "a pickle behind": (lambda: plain() + name("os.system") + b".", f"{ARCHIVE}: it does not end"),
    "a comment": (lambda: tail(f7=4) + b"note", f"{ARCHIVE}: it does not end"),
    "a comment that is not there": (lambda: tail(f7=4), f"{ARCHIVE}: it does not end"),
    "a comment of a file": (lambda: listed(plain(), 0, f12=4), f"{ARCHIVE}: its directory is damaged|{ARCHIVE}"),
    "encrypted in the directory": (lambda: listed(plain(), 0, f3=1), "is compressed or encrypted"),
    "encrypted at the file": (lambda: local(plain(), 0, f2=1), "has another header than the directory says"),
    "encrypted in both": (lambda: local(listed(plain(), 0, f3=1), 0, f2=1), "is compressed or encrypted"),
    "strongly encrypted": (lambda: listed(plain(), 0, f3=0x41), "is compressed or encrypted"),
    "masked headers": (lambda: listed(plain(), 1, f3=0x2000), "is compressed or encrypted"),
    "compressed in the directory": (lambda: listed(plain(), 0, f4=8), "is compressed or encrypted"),
    "compressed at the file": (lambda: local(plain(), 0, f3=8), "has another header than the directory says"),
    "compressed in both": (lambda: local(listed(plain(), 0, f4=8), 0, f3=8), "is compressed or encrypted"),
    "a folder by its attributes": (lambda: listed(plain(), 2, f15=0x10), "its directory is damaged"),
    "an unknown method": (lambda: listed(plain(), 0, f4=99), "is compressed or encrypted"),
    "another checksum of the pickle": (lambda: listed(plain(), 0, f7=1), "the checksum of its data.pkl is another"),
    "a changed pickle": (lambda: replaced("_rebuild", "_rebuilt"), "the checksum of its data.pkl is another"),
    "the pickle twice": (lambda: named("archive/data.pkl"), "a name twice"),
    "the pickle in other case": (lambda: named("archive/.x", "archive/.X"), "a name twice"),
    "a pickle in capitals": (lambda: named("archive/DATA.PKL"), "'archive/DATA.PKL' in it is no part of a state dict"),
    "a second folder": (lambda: named("other/data.pkl"), "several folders"),
    "a folder above": (lambda: named("archive/../data.pkl"), "is no part of a state dict"),
    "an absolute name": (lambda: named("/archive/data.pkl"), "is no part of a state dict"),
    "backslashes": (lambda: replaced("archive/data.pkl", "archive\\data.pkl"), "is no part of a state dict"),
    "no folder": (lambda: named("data.pkl"), "is no part of a state dict"),
    "a name with an end inside": (lambda: replaced("archive/data.pkl", "archive/data.pk\0"), "is no part of a state"),
    "a name that differs": (lambda: plain().replace(b"data.pkl", b"data.pkx", 1), "has another header than"),
    "no pickle": (lambda: replaced("archive/data.pkl", "archive/data/pkl"), "none of torch.save: it has no data.pkl"),
    "a program": (lambda: named("archive/code/__torch__.py"), "is no part of a state dict"),
    "TorchScript": (lambda: named("archive/constants.pkl"), "'archive/constants.pkl' in it is no part of a state dict"),
    "a folder as a file": (lambda: named("archive/data/"), "is no part of a state dict"),
    "a storage too few": (lambda: archive(small()[0]), "storage '0' is missing; 4 of torch.float32 expected"),
    "a storage too short": (lambda: archive(small()[0], {"0": bytes(12)}), "storage '0' has 12 bytes; 4 of"),
    "a storage too long": (lambda: archive(small()[0], {"0": bytes(20)}), "storage '0' has 20 bytes; 4 of"),
    "bytes between": (lambda: hidden(), "is out of place"),
    "listed in another order": (swapped, "is out of place"),
    "bytes before the directory": (
        lambda: moved(plain()[: directory(plain())[0]] + b"x" * 9 + plain()[directory(plain())[0] :], 9, 99),
        "its directory is out of place",
    ),
    "one file fewer in the count": (lambda: tail(f3=3, f4=3), "its directory is out of place"),
    "one file more in the count": (lambda: tail(f3=5, f4=5), f"{ARCHIVE}"),
    "counts that differ": (lambda: tail(f3=3), "it does not end with its directory"),
    "several disks": (lambda: tail(f1=1), "it does not end with its directory"),
    "a file on another disk": (lambda: listed(plain(), 0, f13=1), "its directory is damaged"),
    "a directory elsewhere": (lambda: tail(f6=0), "it does not end with its directory"),
    "a file beyond the end": (lambda: listed(plain(), 1, f16=1 << 30), f"{ARCHIVE}"),
    "full fields without more": (lambda: tail(f3=0xFFFF, f4=0xFFFF), f"{ARCHIVE}"),
    "full sizes without more": (lambda: listed(plain(), 0, f8=0xFFFF_FFFF, f9=0xFFFF_FFFF), f"{ARCHIVE}"),
    "a size in 64 bits that lies": (lambda: wide(1 << 40), f"{ARCHIVE}"),
    "a place in 64 bits beyond all": (
        lambda: listed(wide(2, struct.pack("<2H3Q", 1, 24, 2, 2, 1 << 63)), 3, f16=0xFFFF_FFFF),
        "its directory is damaged",
    ),
    "a field of 64 bits cut": (lambda: wide(16, b"\x01\x00\x0c\x00" + bytes(12)), f"{ARCHIVE}"),
    "64 bits with other counts": (lambda: tail64(f6=3, f7=3), "contradict each other"),
    "64 bits with another place": (lambda: tail64(f9=0), "contradict each other"),
    "64 bits on other disks": (lambda: tail64(f4=1), "contradict each other"),
    "64 bits without their mark": (
        lambda: whole()[:-98] + b"PK\x06\x05" + whole()[-94:],
        "contradict each other",
    ),
    "64 bits found elsewhere": (
        lambda: pickled.patched(whole(), len(whole()) - 42, zipped._LOCATOR, f2=0),
        "contradict each other",
    ),
    "64 bits of several disks": (
        lambda: pickled.patched(whole(), len(whole()) - 42, zipped._LOCATOR, f3=2),
        "contradict each other",
    ),
}


def wide(size: int, extra: bytes | None = None, full: int = 0xFFFF_FFFF) -> bytes:
    """The small archive whose directory gives the sizes of its last file in 64 bits."""
    file = plain()
    field = struct.pack("<2H2Q", 1, 16, size, size) if extra is None else extra
    end = len(file) - 22
    last = directory(file)[-1]
    file = pickled.patched(file, last, zipped._LISTED, f8=full, f9=full, f11=len(field))
    size_of_directory = zipped._END.unpack_from(file, end)[5]
    file = pickled.patched(file, end, zipped._END, f5=size_of_directory + len(field))
    return file[:end] + field + file[end:]


def test_f44_there_are_enough_of_them() -> None:
    assert len(EVASIONS) >= 40


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", EVASIONS)
def test_f44_a_misleading_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    build, match = EVASIONS[kind]
    for suffix in (".ckpt", ".zip"):
        (tmp_path / f"m{suffix}").write_bytes(build())
        with pytest.raises(FileError, match=match) as caught:
            open_file(tmp_path / f"m{suffix}")
        assert str(caught.value).isprintable()


def streamed() -> bytes:
    """The small archive as it is written where one cannot go back: the sizes follow the files."""
    data, storages = small()

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.written = b""

        def writable(self) -> bool:
            return True

        def write(self, piece: bytes) -> int:  # type: ignore[override]
            self.written += bytes(piece)
            return len(piece)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as file:  # type: ignore[arg-type]
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storages["0"])
        file.writestr("archive/version", "3\n")
    return pipe.written


SOUND: dict[str, Callable[[], bytes]] = {
    "plain": plain,
    "streamed": streamed,
    "sizes in 64 bits": lambda: wide(2),
    "torch's other notes": lambda: named("archive/.data/serialization_id", "archive/.format_version", content=b"1"),
    "another folder": lambda: archive(*small(), folder="v1-5 pruned é"),
    "a checksum of a storage": lambda: listed(plain(), 2, f7=1),
}


@pytest.mark.parametrize("kind", SOUND)
def test_f44_sound_archives_are_read_as_torch_reads_them(kind: str) -> None:
    file = SOUND[kind]()
    assert raw_bytes(in_memory(file)) == raw_bytes(pickled.by_torch(file)) == raw_bytes({"a": torch.arange(4.0)})


@pytest.mark.parametrize("file_name", ["m.7z", "m.zip", "m.safetensors", "m", "m.py", "m.ckpt.txt", "m.tar.gz"])
def test_f44_a_sound_file_is_read_whatever_its_name(tmp_path: Path, file_name: str) -> None:
    (tmp_path / file_name).write_bytes(whole())
    with open_file(tmp_path / file_name) as opened:
        equal(opened, weights())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_f01_a_checkpoint_cut_anywhere_is_an_error(monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    file = saved({"a": torch.ones(3), "b": torch.ones(2).half()}, zipped)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    for length in range(4, len(file)):
        with pytest.raises(FileError):
            in_memory(file[:length])


def test_f18_a_checkpoint_cut_after_it_was_described_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.load
    path = tmp_path / "model.ckpt"
    for zip_format in (True, False):
        file = saved(weights(), zip_format)

        def cut_first(*arguments: object, size: int = len(file), **options: object) -> object:
            with path.open("r+b") as opened:
                opened.truncate(size // 2)
            return load(*arguments, **options)  # type: ignore[arg-type]

        path.write_bytes(file)
        monkeypatch.setattr(torch, "load", cut_first)
        with pytest.raises(FileError, match=r"model\.ckpt: torch cannot load it"):
            open_file(path)


# ------------------------------------------------------------------------------------------------------------ mutants


def read_as_torch_does_or_refused(file: bytes) -> bool:
    message = ""
    try:
        found = in_memory(file)
    except FileError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 500
    if not message:
        assert raw_bytes(found) == raw_bytes(pickled.by_torch(file))
    return not message


@pytest.mark.filterwarnings("ignore")
def test_f43_mutants_are_read_as_torch_reads_them_or_refused() -> None:
    signal.setitimer(signal.ITIMER_REAL, 120)
    rng = random.Random(43)
    read = sum(read_as_torch_does_or_refused(pickled.mutant(rng)) for _ in range(3000))
    assert 60 < read < 1000


WORDS: dict[str, bytes] = {
    "an item on a number": b"K\x01" + text("a") + b"Ns.",
    "items on a tensor": tensor((1,)) + b"(" + text("a") + b"Nu.",
    "an item on a list": b"]K\x00Ns.",
    "appending to a tensor": tensor((1,)) + b"Na.",
    "an empty stack": b"s.",
    "an unknown note": b"h\x07.",
    "a mark never made": b"t.",
    "an end too early": b"(.",
    "a storage by number": constant(5) + b"Q.",
    "a storage of the wrong kind": constant(("module", name("torch.FloatStorage"), "0", "cpu", 1)) + b"Q.",
    "a storage without size": constant(("storage", name("torch.FloatStorage"), "0", "cpu")) + b"Q.",
    "a storage as a list": b"](" + constant(("storage", name("torch.FloatStorage"), "0", "cpu", 1))[1:-1] + b"eQ.",
    "a storage in a storage": constant(("storage", tensor((1,)), "0", "cpu", 1)) + b"Q.",
    "a parameter of a number": name("torch._utils._rebuild_parameter") + constant((5, False, None)) + b"R.",
    "state of a tensor": tensor((1,)) + constant((1, 2)) + b"b.",
    "a text that is none": b"X\x02\x00\x00\x00\xff\xfe.",
    "arguments in a list": name("collections.OrderedDict") + b"]R.",
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", WORDS)
def test_f43_opcodes_are_used_as_torch_uses_them(monkeypatch: pytest.MonkeyPatch, kind: str, zipped: bool) -> None:
    program = b"\x80\x02" + WORDS[kind]
    file = archive(program, {"0": bytes(4)}) if zipped else legacy(program, {"0": torch.zeros(1)})
    refused_unseen(file, "its pickle is not one of tensors, or damaged", monkeypatch)
