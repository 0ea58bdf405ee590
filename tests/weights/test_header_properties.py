"""Headers that hypothesis and loops make: valid ones are read as written, changed ones as the library does or not."""

from __future__ import annotations

import itertools
import json
import random
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import FileError
from fastldm.weights.header import DTYPES, EMPTY_MARKERS, MAX_RANK, Header, read_header
from tests.fuzz import header as target
from tests.fuzz.json_changes import changed, parsed, written

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(1, 4), max_size=MAX_RANK).filter(lambda shape: torch.Size(shape).numel() <= 256)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES), max_size=6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
METADATA = st.none() | st.dictionaries(NAMES, TEXTS, min_size=1, max_size=3)  # the library writes broken JSON for {}


def parse(file: bytes) -> Header:
    return read_header(lambda length, offset: file[offset : offset + length], len(file), "m.safetensors")


def file_of(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refused(file: bytes, match: str) -> None:
    with pytest.raises(FileError, match=match) as caught:
        parse(file)
    assert str(caught.value).isprintable()


@EXAMPLES
@given(TENSORS, METADATA, st.booleans())
def test_what_the_library_writes_is_read(
    tensors: dict[str, Any], metadata: dict[str, str] | None, v_pred: bool
) -> None:
    made = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    if v_pred:
        made[EMPTY_MARKERS[0]] = torch.zeros(0)
    file = bytes(safetensors.torch.save(made, metadata=metadata))
    header = parse(file)
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in made.items()
    }
    assert header.metadata == (metadata or {})
    assert target.one_input(file)


@EXAMPLES
@given(TENSORS, METADATA, st.randoms(use_true_random=False), st.integers(1, 3), st.booleans())
def test_a_changed_header_is_read_as_the_library_reads_it_or_refused(
    tensors: dict[str, Any], metadata: dict[str, str] | None, rng: random.Random, changes: int, kept: bool
) -> None:
    made = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    file = bytes(safetensors.torch.save(made, metadata=metadata))
    end = 8 + int.from_bytes(file[:8], "little")
    entries = parsed(file[8:end].decode())
    for _ in range(changes):
        entries = changed(entries, rng, target.WORDS)
    text = written(entries)
    target.one_input(file_of(text, file[end:]))
    target.one_input(file_of(f"{text} " if kept else f" {text}", file[end:]))


def three_files() -> list[bytes]:
    """One that is mostly header, one that is mostly tensors, and one as a model has them."""
    generator = torch.Generator().manual_seed(3)
    names = [f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(10) for j in range(12)]
    return [
        bytes(safetensors.torch.save({name: torch.zeros(1, dtype=torch.uint8) for name in names})),
        bytes(safetensors.torch.save({"a": torch.randn(1000, generator=generator), "b": torch.zeros(1000).half()})),
        bytes(safetensors.torch.save({name: torch.randn(9, 8, generator=generator) for name in names[:16]})),
    ]


def test_f01_three_files_cut_at_every_byte() -> None:
    cuts = 0
    for file in three_files():
        parse(file)
        for length in range(len(file)):
            with pytest.raises(FileError, match="is truncated") as caught:
                parse(file[:length])
            message = str(caught.value)
            assert message.endswith(f"expected, {length} present") or "bytes of tensors expected" in message
            cuts += 1
    assert cuts == sum(map(len, three_files())) >= 20_000


def test_f03_no_length_allocates() -> None:
    tracemalloc.start()
    try:
        for length in [0, 2**64 - 1, *(2**n + d for n in range(7, 64) for d in (-1, 0))]:
            refused(struct.pack("<Q", length) + b"{}" + bytes(64), r"truncated|header")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mib", [0.1, 0.5, 1, 2, 4, 6, 8, 12, 15, 16])
def test_f04_a_large_header_takes_little_memory(mib: float) -> None:
    """Of empty tensors, of which a header has room for the most, and for more than are allowed from 4 MiB on."""
    one = '"%06x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(one % i for i in range(int((mib - 0.01) * (1 << 20)) // (len(one) + 3))) + "}"
    file = file_of(text)
    tracemalloc.start()
    try:
        refused(file, "is empty" if mib < 4 else "more than 65536 tensors")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_f08_f09_a_key_twice_anywhere() -> None:
    """At every pair of places among six entries, with the same bytes or others, plain or escaped."""
    count = 0
    for first, second in itertools.permutations(range(6), 2):
        for same, spelt, within in itertools.product((True, False), (False, True), range(10)):
            names = [f"{'abcdef'[i]}{within}" for i in range(6)]
            names[second] = names[first]
            spans = [(i, i + 1) for i in range(6)]
            spans[second] = spans[first] if same else spans[second]
            texts = [
                f"{_escaped(name) if spelt and i == second else json.dumps(name)}:{json.dumps(entry([1], *span))}"
                for i, (name, span) in enumerate(zip(names, spans, strict=True))
            ]
            with pytest.raises(FileError) as caught:
                parse(file_of("{" + ",".join(texts) + "}", bytes(6)))
            assert f"duplicate key {names[first]!r}" in str(caught.value)
            assert caught.value.field == names[first]
            count += 1
    assert count == 1200


def _escaped(name: str) -> str:
    return '"' + "".join(f"\\u{ord(letter):04x}" for letter in name) + '"'


def test_f08_a_key_twice_in_an_entry_or_in_the_free_text() -> None:
    for key, value in (("dtype", '"U8"'), ("shape", "[1]"), ("data_offsets", "[0,1]")):
        plain = json.dumps(entry([1], 0, 1))
        for text in (f'{plain[:-1]},"{key}":{value}}}', f'{{"{key}":{value},{plain[1:]}'):
            refused(file_of('{"a":' + text + "}", bytes(1)), f"duplicate key '{key}'")
    for text in ('{"k":"1","k":"1"}', '{"k":"1","j":"","k":"2"}', '{"":"","":""}'):
        refused(file_of('{"__metadata__":' + text + "}"), "duplicate key '")


def test_f11_shapes_that_overflow_in_64_bits() -> None:
    """A thousand products of more than 2^64 that are small, or right, modulo 2^64."""
    rng = random.Random(11)
    for _ in range(1000):
        rank = rng.randint(3, MAX_RANK)
        shape = [1 << rng.randint(0, 31) for _ in range(rank - 1)]
        shape.append(max(1, (1 << 64) // max(1, torch.Size(shape[:2]).numel())))
        wrapped = (_product(shape) * 4) % (1 << 64)
        refused(
            file_of(json.dumps({"a": entry(shape, 0, min(wrapped, 8), "F32")}), bytes(min(wrapped, 8))),
            r"takes \d+ bytes, not those|must be at most 8 integers from 0|beyond 2\^53",
        )


def _product(shape: list[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def test_f14_only_spaces_may_stand_around() -> None:
    """Decided once: nothing before the object, spaces (0x20) behind it."""
    text = json.dumps({"a": entry([1], 0, 1)})
    around = ["", " ", "  ", "\t", "\n", "\r", "\0", "\ufeff", "\u00a0", "\u3000", " \t"]
    accepted = 0
    for before, behind in itertools.product(around, around):
        file = file_of(before + text + behind, bytes(1))
        if before or behind.strip(" "):
            refused(file, r"must begin with '\{' and end with '\}', padded by spaces only")
        else:
            accepted += parse(file).tensors["a"].nbytes
    assert accepted == 3


@pytest.mark.parametrize("rank", [0, 1, 7, 8, 9, 10, 64, 65, 1000, 10_000])
def test_f15_a_rank_of_at_most_eight(rank: int) -> None:
    file = file_of(json.dumps({"a": entry([1] * rank, 0, 1)}), bytes(1))
    if rank <= MAX_RANK:
        assert parse(file).tensors["a"].shape == (1,) * rank
    else:
        refused(file, "must be at most 8 integers")
