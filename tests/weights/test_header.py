"""The header reader against damaged, hostile and mutated headers; the safetensors library is the oracle."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import FileError
from fastldm.weights import header as module
from fastldm.weights.header import DTYPES, Header, read_header
from fastldm.weights.strict import strict_json

UNSUPPORTED = [f"F8_{kind}" for kind in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")]
ALL_DTYPES = [*DTYPES, *UNSUPPORTED, "F4", "F6_E2M3", "F6_E3M2", "U16", "U32", "U64", "C64"]


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file; `header` is JSON text or something to write as such."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parse(file: bytes, read: Callable[[int, int], bytes] | None = None) -> Header:
    return read_header(read or (lambda length, offset: file[offset : offset + length]), len(file), "m.safetensors")


def refused(file: bytes, match: str, field: str | None = None) -> None:
    with pytest.raises(FileError, match=match) as caught:
        parse(file)
    assert str(caught.value).startswith("m.safetensors: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert caught.value.field == field


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@cache
def sample() -> bytes:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "conv_in.weight": torch.randn(2, 3, generator=generator),
        "half": torch.randn(4, generator=generator).half(),
        "brain": torch.randn(1, 2, generator=generator).bfloat16(),
        "ids": torch.arange(3),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "v_pred": torch.tensor([]),
    }
    return bytes(safetensors.torch.save(tensors, metadata={"format": "pt", "note": 'a "quoted" \\ [{ note'}))


def values(file: bytes, header: Header) -> dict[str, torch.Tensor]:
    at = header.data_offset
    return {
        name: torch.tensor(list(file[at + t.start : at + t.stop]), dtype=torch.uint8).view(t.dtype).view(t.shape)
        for name, t in header.tensors.items()
    }


def raw_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def test_a_valid_header_says_what_the_library_says() -> None:
    file = sample()
    header = parse(file)
    assert raw_bytes(values(file, header)) == raw_bytes(safetensors.torch.load(file))
    assert header.metadata == {"format": "pt", "note": 'a "quoted" \\ [{ note'}
    starts = [t.start for t in header.tensors.values()]
    assert starts == sorted(starts)
    assert header.tensors["half"].nbytes == 8


def test_f01_a_cut_at_every_byte_says_expected_and_present() -> None:
    file = sample()
    for length in range(len(file)):
        refused(
            file[:length],
            rf"truncated: .*\d+ bytes .*expected, {length} present|truncated: \d+ bytes of tensors",
        )


@pytest.mark.parametrize("length", range(8))
def test_f02_a_file_shorter_than_its_length_field(length: int) -> None:
    refused(
        b"\x10" + bytes(7)[: length - 1] if length else b"",
        f"8 bytes of header length expected, {length} present",
    )


def test_f03_a_header_length_is_checked_before_anything_is_read() -> None:
    lengths = [0, 1, 2**64 - 1, *(2**n + d for n in range(7, 64) for d in (-1, 0))]
    for length in lengths:
        file = pack(b"{}" + bytes(64), length=length)
        asked = []

        def read(n: int, offset: int, file: bytes = file, asked: list[int] = asked) -> bytes:
            asked.append(n)
            return file[offset : offset + n]

        with pytest.raises(FileError, match=r"truncated|header"):
            parse(file, read)
        assert max(asked) <= 64


def bomb(body: bytes) -> bytes:
    return b"{" + body + b"}"


@pytest.mark.parametrize("length", [(16 << 20) + 1, 99_000_000])
def test_f04_a_header_over_16_mib_is_not_read(length: int) -> None:
    file = pack(b"{", length=length)

    def read(n: int, offset: int) -> bytes:
        assert n <= 64
        return file[offset : offset + n]

    with pytest.raises(FileError, match=f"has a header of {length} bytes; at most 16777216 are allowed"):
        read_header(read, 1 << 40, "m.safetensors")


BOMBS: dict[str, Callable[[], bytes]] = {
    "tensors": lambda: pack({str(i): entry((0,), (0, 0)) for i in range(65_537)}),
    "keys": lambda: pack(bomb(b",".join(b'"%x":0' % i for i in range(200_000)))),
    "metadata": lambda: pack(bomb(b'"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(800_000)) + b"}")),
    "escaped": lambda: pack(bomb(b'"\\\\",' * 1_500_000)),
    "strings": lambda: pack(bomb(b'""' * 4_000_000)),
    "open string": lambda: pack(b'{"' + b'\\"' * 4_000_000 + b"}"),
    "integers": lambda: pack(bomb(b'"a":[' + b"1," * 2_000_000 + b"1]")),
    "lists": lambda: pack(bomb(b"[]" * 4_000_000)),
    "brackets": lambda: pack(bomb(b'"a":[]' + b"[]" * 400_000)),
    "closing": lambda: pack(b"{}" + b"]" * 8_000_000 + b"}"),
    "digits": lambda: pack(bomb(b'"a":' + b"1" * 8_000_000)),
    "name": lambda: pack(bomb(b'"' + b"x" * 8_000_000 + b'":0')),
}


@pytest.mark.parametrize("name", BOMBS)
def test_f04_a_huge_header_is_refused_at_once(name: str) -> None:
    file = BOMBS[name]()
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        parse(file)
    assert time.process_time() - start < 1.0  # the library takes 55 s for a header of 1.8 M tensors
    assert len(str(caught.value)) < 400
    assert name != "digits" or "beyond 2^53" in str(caught.value)


@pytest.mark.parametrize("name", sorted(BOMBS.keys() - {"keys", "open string", "digits", "name"}))
def test_f04_most_are_refused_before_parsing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(json, "loads")
    refused(BOMBS[name](), r"has more than (786432 values|65536 tensors)")


def test_f04_the_largest_allowed_number_of_tensors_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_TENSORS == 65_536
    monkeypatch.setattr(module, "MAX_TENSORS", 100)
    tensors = {f"t{i}": entry((1,), (i, i + 1), "U8") for i in range(101)}
    refused(pack(tensors, bytes(101)), "more than 100 tensors")
    del tensors["t100"]
    assert len(parse(pack({"__metadata__": {}, **tensors}, bytes(100))).tensors) == 100


def test_f04_the_number_of_tensors_cannot_be_hidden_by_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENSORS", 2)
    tensors = {f"t{i}": entry((1,), (i, i + 1), "U8") for i in range(3)}
    refused(pack(json.dumps(tensors).replace("data_", "d\\u0061ta_").encode(), bytes(3)), "more than 2 tensors")


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([(0, 8), (4, 12)], "'b': overlaps"),  # F05
        ([(0, 8), (0, 8)], "'b': overlaps"),
        ([(0, 8), (12, 20)], "'b': leaves a hole of 4 bytes"),  # F06
        ([(8, 16), (16, 24)], "'a': leaves a hole of 8 bytes"),
    ],
)
def test_f05_f06_overlaps_and_holes(offsets: list[tuple[int, int]], match: str) -> None:
    tensors = {name: entry((2,), span) for name, span in zip("ab", offsets, strict=True)}
    refused(pack(tensors, bytes(max(stop for _, stop in offsets))), match, field=match[1])


@pytest.mark.parametrize("extra", [1, 8, 1000])
def test_f07_bytes_behind_the_last_tensor(extra: int) -> None:
    refused(pack({"a": entry()}, bytes(8 + extra)), f"has {extra} bytes behind its last tensor")
    refused(pack({}, bytes(extra)), f"has {extra} bytes behind")


def test_f08_f09_duplicate_keys_everywhere() -> None:
    a, b = (json.dumps(entry((2,), span)) for span in ((0, 8), (8, 16)))
    refused(pack(f'{{"x":{a},"x":{a}}}'.encode(), bytes(8)), "duplicate key 'x'", "x")
    refused(pack(f'{{"x":{a},"x":{b}}}'.encode(), bytes(16)), "duplicate key 'x'", "x")
    refused(pack(f'{{"x":{a},"\\u0078":{a}}}'.encode(), bytes(8)), "duplicate key 'x'", "x")
    refused(pack(b'{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key 'k'", "k")
    refused(pack(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'", "__metadata__")
    refused(
        pack(b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "duplicate",
        "dtype",
    )


def test_f10_zero_size_tensors_only_as_known_markers() -> None:
    refused(pack({"a": entry(), "b": entry((0,), (8, 8))}, bytes(8)), r"'b': is empty: shape \[0\]", "b")
    refused(pack({"b": entry((0, 2**31), (0, 0))}), "is empty", "b")
    for name in ("v_pred", "ztsnr"):
        assert parse(pack({"a": entry(), name: entry((0,), (8, 8))}, bytes(8))).tensors[name].nbytes == 0


@pytest.mark.parametrize(
    "shape", [[2**31] * 8, [2**31, 2**31, 2], [2**16] * 4, [2**32], [2**53], [2**64], [3], [1], [2, 2]]
)
def test_f11_shapes_whose_product_overflows_or_differs(shape: list[int]) -> None:
    with pytest.raises(FileError, match=r"takes \d+ bytes|integers from 0 to|beyond 2\^53"):
        parse(pack({"a": entry(shape)}, bytes(8)))


@pytest.mark.parametrize(
    "value", ["-1", "2.0", "2e0", '"2"', "true", "null", "[2]", "{}", "1e30", "-0", "NaN", "1e999"]
)
def test_f12_shape_and_offsets_are_natural_numbers(value: str) -> None:
    for text in (f'"shape":[{value}],"data_offsets":[0,8]', f'"shape":[2],"data_offsets":[{value},8]'):
        with pytest.raises(FileError):
            parse(pack(f'{{"a":{{"dtype":"F32",{text}}}}}'.encode(), bytes(8)))


@pytest.mark.parametrize("shape", [[-1, -2], [True, 2], [2, 1.0], [2.0], 2, None, "2", {"2": 2}, [2**31 + 1], [0, -1]])
def test_f12_a_shape_whose_product_would_fit_is_still_of_natural_numbers(shape: object) -> None:
    refused(pack({"a": entry(shape)}, bytes(8)), "'a': shape .* must be at most 8 integers from 0 to 2147483648", "a")


@pytest.mark.parametrize("offsets", [[False, 8], [0.0, 8], [], [0], [0, 8, 8], [8, 0], 8, None, "08", {"0": 8}])
def test_f12_offsets_are_an_ascending_pair(offsets: object) -> None:
    refused(pack({"a": entry((2,), offsets)}, bytes(8)), "'a': data_offsets .* must be two ascending", "a")


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_f13_every_dtype_is_read_or_named(dtype: str) -> None:
    size = DTYPES[dtype].itemsize if dtype in DTYPES else 8
    file = pack({"a": entry((1,), (0, size), dtype)}, bytes(size))
    if dtype in DTYPES:
        assert raw_bytes(values(file, parse(file))) == raw_bytes(safetensors.torch.load(file))
    else:
        refused(file, f"'a': unsupported dtype '{dtype}'; supported: F64", "a")


@pytest.mark.parametrize("dtype", ["f32", "", "F32 ", 5, None, ["F32"], {}])
def test_f13_a_dtype_is_a_known_word(dtype: object) -> None:
    refused(pack({"a": entry(dtype=dtype)}, bytes(8)), "unsupported dtype", "a")


@pytest.mark.parametrize("pad", [" ", "  ", " " * 100])
def test_f14_only_spaces_behind_the_header(pad: str) -> None:
    text = json.dumps({"a": entry()})
    assert parse(pack((text + pad).encode(), bytes(8))).tensors["a"].shape == (2,)
    for wrong in (
        f" {text}",
        f"\ufeff{text}",
        f"\n{text}",
        f"{text}\t",
        f"{text}{pad}\n",
        f"{text}\0",
        f"{text}x",
    ):
        refused(
            pack(wrong.encode(), bytes(8)),
            "must begin with '{' and end with '}', padded by spaces only|valid JSON",
        )


@pytest.mark.parametrize("rank", [9, 100, 10_000])
def test_f15_rank(rank: int) -> None:
    refused(pack({"a": entry([1] * rank, (0, 4))}, bytes(4)), "must be at most 8 integers", "a")
    assert parse(pack({"a": entry([1] * 8, (0, 4))}, bytes(4))).tensors["a"].shape == (1,) * 8


@pytest.mark.parametrize("depth", [4, 100, 1000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_f16_nesting_is_bounded_before_parsing(depth: int, opening: str, closing: str) -> None:
    text = '{"a":' + opening * depth + "0" + closing * depth + "}"
    refused(pack(text.encode()), "nested deeper than 3 levels")


def test_f16_brackets_in_strings_do_not_count() -> None:
    notes = ["[[[[{{{{", "[[[[\\", '[[[["', '\\"[[[[', '[[[[\\"', "\\\\", "[[[["]
    metadata = {f"{i}{note}": note for i, note in enumerate(notes)}
    assert parse(pack({"__metadata__": metadata})).metadata == metadata


def test_f16_escapes_hide_no_brackets() -> None:
    for name in ("\\", '"', '\\"', '"\\'):
        refused(pack({name: [[[[0]]]], "b": 0}), "nested deeper than 3 levels")


NAMES = [
    "a\0b",
    "a\nb",
    "../../x",
    "\u202eabc",
    "\x1b[31m",
    "é",
    "a" * 5000,
    "'",
    '"',
    "\\",
    "",
    "/etc/passwd",
    "\u2028",
]


@pytest.mark.parametrize("name", NAMES)
def test_f17_names_stand_escaped_in_messages(name: str) -> None:
    assert list(parse(pack({name: entry()}, bytes(8))).tensors) == [name]
    refused(pack({name: entry(dtype="F4")}, bytes(8)), "unsupported dtype", name)
    refused(pack({name: entry()}, bytes(7)), "truncated")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a":1}', "must have exactly dtype, shape and data_offsets, not 1"),
        (b'{"a":{"dtype":"F32","shape":[2]}}', "must have exactly"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}',
            r"not \['data_offsets', 'dtype', 'shape', 'x'\]",
        ),
        (b'{"__metadata__":{"k":1}}', "__metadata__ must map names to strings"),
        (b'{"__metadata__":[]}', "__metadata__ must map names to strings"),
        (b'{"a":\xff}', "not valid JSON in UTF-8"),
        (b'{"\\ud800":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "not valid JSON in UTF-8"),
        (b'{"__metadata__":{"k":"\\ud800"}}', "not valid JSON in UTF-8"),
        (b'{"a":1,}', "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'{"a":1}{}', "not valid JSON"),
        (b'{"a":9007199254740992}', r"beyond 2\^53"),
    ],
)
def test_entries_of_another_form(text: bytes, match: str) -> None:
    with pytest.raises(FileError, match=match):
        parse(pack(text, bytes(8)))


def same_or_refused(file: bytes) -> bool:
    """Whether the file was read; then it must be read as the safetensors library reads it."""
    message = ""
    try:
        header = parse(file)
    except FileError as error:
        message = str(error)
    assert message.isprintable()
    if message:
        return False
    assert raw_bytes(values(file, header)) == raw_bytes(safetensors.torch.load(file))
    return True


PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"0",
    b"-",
    b".",
    b" ",
    b"\0",
    b"F16",
    b"BOOL",
    b'"a":',
    b"9" * 20,
]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_mutated_bytes_are_read_as_the_library_reads_them_or_refused(data: st.DataObject) -> None:
    file = bytearray(sample())
    end = 8 + struct.unpack("<Q", file[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1) | st.integers(8, end))
        piece = data.draw(st.sampled_from(PIECES) | st.binary(max_size=3))
        cut = data.draw(st.integers(0, 3))
        file[at : at + cut] = piece
    if data.draw(st.booleans()):
        file[:8] = struct.pack("<Q", max(0, end - 8 + len(file) - len(sample())))
    same_or_refused(bytes(file))


def mutated(rng: random.Random, tensors: dict[str, Any]) -> list[tuple[str, Any]]:
    """The entries with one change of a kind that a parser could get wrong."""
    entries = [(name, dict(value)) for name, value in tensors.items()]
    name, value = rng.choice([e for e in entries if e[0] != "__metadata__"])
    numbers = [0, 1, 2, 3, 4, 8, 12, 24, -1, 2**31, 2**53, 2**63, 2**64, 1e30, 1.0, True, None, "1"]
    match rng.randrange(7):
        case 0:
            entries.append((name, value))
        case 1:
            value["dtype"] = rng.choice(ALL_DTYPES)
        case 2:
            value["shape"] = [rng.choice(numbers) for _ in range(rng.randrange(4))]
        case 3:
            value["data_offsets"] = [rng.choice(numbers), rng.choice(numbers)]
        case 4:
            value[rng.choice(["dtype", "shape", "data_offsets", "x"])] = rng.choice(numbers)
        case 5:
            entries.insert(rng.randrange(len(entries)), (rng.choice(["v_pred", "n"]), entry((0,), (0, 0))))
        case 6:
            rng.shuffle(entries)
    return entries


def test_mutated_entries_are_read_as_the_library_reads_them_or_refused() -> None:
    rng = random.Random(11)
    file = sample()
    end = 8 + struct.unpack("<Q", file[:8])[0]
    tensors = json.loads(file[8:end])
    read = 0
    for _ in range(1500):
        entries = mutated(rng, tensors)
        text = "{" + ",".join(f"{json.dumps(n)}:{json.dumps(v)}" for n, v in entries) + "}"
        read += same_or_refused(pack(text.encode(), file[end:]))
    assert 50 < read < 1000


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[]", "must be a JSON object, not list"),
        (b"", "not valid JSON"),
        (b'{"a":NaN}', "number 'NaN' is not finite"),
        (b'{"a":-Infinity}', "not finite"),
        (b'{"a":1e999}', "number '1e999' is not finite"),
        (b'{"a":-9007199254740992}', r"beyond 2\^53"),
        (b'{"a":{"b":1,"b":1}}', "duplicate key 'b'"),
        (b'{"a":[[[]]]}', "nested deeper than 3"),
        (b'\xef\xbb\xbf{"a":1}', "not valid JSON"),
    ],
)
def test_strict_json_refuses(text: bytes, match: str) -> None:
    with pytest.raises(FileError, match=match):
        strict_json(text, "c.json", 3)


def test_strict_json_reads_what_a_config_holds() -> None:
    config = {
        "beta": 0.00085,
        "n": -3,
        "big": 2**53 - 1,
        "s": 'é"\\',
        "l": [1, [2]],
        "none": None,
        "yes": True,
    }
    assert strict_json(json.dumps(config).encode(), "c.json", 3) == config
