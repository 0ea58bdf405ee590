"""PNG files: their text is read back exactly, by us and by others; no file does harm; writing is atomic."""

from __future__ import annotations

import os
import re
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo

from fastldm import paint, png
from fastldm.errors import FileError
from fastldm.png import Parameters
from fastldm.sampling.names import NAMES, samplers
from tests.single import disk

SETTINGS = {
    "Steps": "20",
    "Sampler": "DPM++ 2M Karras",
    "CFG scale": "7.5",
    "Seed": "1",
    "Size": "512x768",
    "Model": "name",
    "Denoising strength": "0.6",
    "Clip skip": "2",
    "Version": "fastldm 0.1.0",
}
LINE = (
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 1, Size: 512x768, Model: name, "
    "Denoising strength: 0.6, Clip skip: 2, Version: fastldm 0.1.0"
)


# ------------------------------------------------------------------------------------------------------------- the text


def test_the_form() -> None:
    assert Parameters("a lighthouse, rain", "blurry", SETTINGS).text == (
        f"a lighthouse, rain\nNegative prompt: blurry\n{LINE}"
    )
    assert Parameters("a lighthouse", "", SETTINGS).text == f"a lighthouse\n{LINE}"
    assert Parameters("", "blurry", SETTINGS).text == f"Negative prompt: blurry\n{LINE}"
    assert Parameters("", "", SETTINGS).text == LINE


def test_values_that_would_end_early_are_quoted() -> None:
    named = SETTINGS | {"Model": 'v1, "final": x'}
    assert r'Model: "v1, \"final\": x", ' in Parameters("a", "", named).text
    assert png.parsed(Parameters("a", "", named).text).settings == named


NASTY = [
    "\n",
    " ",
    ", ",
    ": ",
    '"',
    "\\",
    "\0",
    "\r",
    "\x0b",
    "\x85",
    "\u2028",
    "Negative prompt:",
    "Negative prompt: x",
    "Steps: 30",
    LINE,
    'Exact prompt: "x"',
    "é",
    "灯台",
    "🌧",
]
PROMPTS = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
).map("".join)


@settings(deadline=None, max_examples=300)
@given(PROMPTS, PROMPTS, PROMPTS)
def test_it_is_read_back_exactly(prompt: str, negative: str, model: str) -> None:
    made = Parameters(prompt, negative, SETTINGS | {"Model": model})
    found = png.parsed(made.text)
    assert (found.prompt, found.negative_prompt, found.settings) == (prompt, negative, made.settings)


@pytest.mark.parametrize("prompt", ["a\nb", "Steps: 30, Sampler: x, Seed: 2", "two: words, three: words, four: words"])
def test_ordinary_prompts_stand_there_once(prompt: str) -> None:
    assert "Exact" not in Parameters(prompt, prompt, SETTINGS).text


def web_ui(text: str) -> tuple[str, str, dict[str, str]]:
    """As the web UI and what is made for it read a text, in their own words."""
    *lines, last = text.strip().splitlines()
    pairs = re.findall(r'(\w[\w \-/]+): ?("(?:\\.|[^"])+"|[^,]*)', last)
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    return "\n".join(lines[:at]), "\n".join(lines[at:])[16:].strip(), dict(pairs)


def test_other_programs_read_it() -> None:
    made = Parameters("a lighthouse: rain,\nsea", "blurry, dull", SETTINGS)
    assert web_ui(made.text) == (made.prompt, made.negative_prompt, SETTINGS)


OTHERS = {
    "with hashes": (
        "a cat <lora:x:0.8>\nNegative prompt: (bad:1.3),\n dull\nSteps: 28, Sampler: Euler a, Schedule type: Auto, "
        'Lora hashes: "x: 0123, y: 4567", TI: "a, \\"b\\"", Version: v1.9.4\n',
        ("a cat <lora:x:0.8>", "(bad:1.3),\n dull"),
        {"Lora hashes": "x: 0123, y: 4567", "TI": 'a, "b"', "Version": "v1.9.4"},
    ),
    "a prompt alone": ("a cat", ("a cat", ""), {}),
    "no settings": ("a cat\nNegative prompt: dull", ("a cat", "dull"), {}),
    "nothing": ("", ("", ""), {}),
    "too few settings": ("a cat\nSteps: 20, Seed: 1", ("a cat\nSteps: 20, Seed: 1", ""), {}),
    "what is no setting is skipped": (
        "a\nSteps: 1, ?, Seed: 2, , =x, Size: 8x8",
        ("a", ""),
        {"Seed": "2", "Size": "8x8"},
    ),
    "a quote without an end": ('a\nSteps: 1, Seed: 2, Model: "x, Size: 8x8', ("a", ""), {"Model": '"x', "Size": "8x8"}),
    "lines of Windows": ("a\r\nSteps: 1, Seed: 2, Size: 8x8\r\n", ("a\r", ""), {"Size": "8x8"}),
}


@pytest.mark.parametrize(("text", "prompts", "some"), OTHERS.values(), ids=OTHERS.keys())
def test_texts_of_other_programs(text: str, prompts: tuple[str, str], some: dict[str, str]) -> None:
    found = png.parsed(text)
    assert (found.prompt, found.negative_prompt) == prompts
    assert found.settings.items() >= some.items()
    assert bool(found.settings) == bool(some)


LONG = 1 << 20
ENDLESS = [
    "a",
    " ",
    "\n",
    ":",
    ",",
    '"',
    "\\",
    "a:",
    'a:"',
    'a:",',
    '\\"',
    'a:"\\",',
    " a",
    "a ",
    'a: "\\',
    "Negative prompt:\n",
    "-/",
]


@pytest.mark.parametrize("piece", ENDLESS)
def test_a_long_text_is_read_at_once(piece: str) -> None:
    """In linear time: twice the square of a million would take hours."""
    begin = time.perf_counter()
    for start in ("", 'a: "', "a: b, c: d, e: f, "):
        png.parsed(start + piece * (LONG // len(piece)))
    assert time.perf_counter() - begin < 2


def test_a_text_of_too_many_settings_keeps_the_first() -> None:
    found = png.parsed("a\n" + ", ".join(f"k{k}: {k}" for k in range(1000)))
    assert (found.prompt, list(found.settings)) == ("a", [f"k{k}" for k in range(png.MAX_PAIRS)])


def test_the_longest_text_of_our_own_can_be_read() -> None:
    """Two prompts at the limit, each character of which is six in quotes."""
    prompt = "\nNegative prompt:".ljust(paint.MAX_PROMPT, "\x01")
    made = Parameters(prompt, prompt, SETTINGS)
    assert len(made.text) <= png.MAX_TEXT
    assert (png.parsed(made.text).prompt, png.parsed(made.text).negative_prompt) == (prompt, prompt)


def test_names_of_samplers() -> None:
    assert png.sampler_label("dpmpp_2m_karras") == "DPM++ 2M Karras"
    assert png.sampler_label("dpmpp_2m_sde_exponential") == "DPM++ 2M SDE Exponential"
    assert png.sampler_label("euler_a") == "Euler a"
    assert png.sampler_label("unipc_3_karras") == "unipc_3_karras"
    assert set(png.SAMPLERS) <= set(NAMES)
    labels = [png.sampler_label(name) for name in samplers()]
    assert len({label.casefold() for label in labels}) == len(labels), "two samplers would have one name"


# ------------------------------------------------------------------------------------------------------------- the file


def picture(colour: tuple[int, int, int] = (1, 2, 3)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 6), colour)


def written(path: Path, prompt: str = "a", *, new: bool = False) -> Path:
    png.write(picture(), path, Parameters(prompt, "", SETTINGS), new=new)
    return path


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


@pytest.mark.parametrize(("prompt", "kind"), [("café\nx", b"tEXt"), ("灯台\nx", b"iTXt")])
def test_the_chunk_and_what_pillow_reads(tmp_path: Path, prompt: str, kind: bytes) -> None:
    path = written(tmp_path / "a.png", prompt)
    texts = [(k, data) for k, data in chunks(path.read_bytes()) if k in (b"tEXt", b"iTXt", b"zTXt")]
    assert [(k, data.partition(b"\0")[0]) for k, data in texts] == [(kind, b"parameters")]
    with PIL.Image.open(path) as image:
        assert image.info["parameters"] == f"{prompt}\n{LINE}"
        assert image.convert("RGB").tobytes() == picture().tobytes()
    assert png.read(path) == png.Picture(8, 6, f"{prompt}\n{LINE}")


def test_no_zero_ends_the_text(tmp_path: Path) -> None:
    """For a reader in C; the prompt is read back with it."""
    path = written(tmp_path / "a.png", "a\0b")
    (text,) = (data for kind, data in chunks(path.read_bytes()) if kind == b"tEXt")
    assert text.startswith(b"parameters\0a b\nSteps: 20, ")
    assert text.count(b"\0") == 1
    assert png.parsed(text.decode()[11:]).prompt == "a\0b"


@settings(deadline=None, max_examples=50)
@given(PROMPTS)
def test_a_file_is_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = written(tmp_path_factory.getbasetemp() / "again.png", prompt)
    text = png.read(path).text
    assert text is not None
    assert png.parsed(text).prompt == prompt


def test_a_file_without_text(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", dpi=(72, 72))
    assert png.read(tmp_path / "a.png") == png.Picture(8, 6, None)


NO_PNG = {
    "missing": (lambda path: None, "a.png is missing"),
    "a folder": (lambda path: path.mkdir(), "a.png is no file"),
    "a pipe": (os.mkfifo, "a.png is no file"),
    "empty": (lambda path: path.write_bytes(b""), "a.png is no PNG file"),
    "a JPEG": (lambda path: picture().save(path, "JPEG"), "a.png is no PNG file"),
    "a signature": (lambda path: path.write_bytes(png.SIGNATURE), "a.png is a damaged PNG file"),
}


@pytest.mark.parametrize(("make", "words"), NO_PNG.values(), ids=NO_PNG.keys())
def test_what_is_no_png(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(FileError, match=words):
        png.read(tmp_path / "a.png")


# -------------------------------------------------------------------------------------------------------- hostile files


def chunk(kind: bytes, data: bytes, *, length: int | None = None) -> bytes:
    sized = struct.pack(">I", len(data) if length is None else length)
    return sized + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int = 8, height: int = 6) -> bytes:
    return png.SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


TEXT = chunk(b"tEXt", b"parameters\0a")
BOMB = zlib.compress(b"a" * (64 << 20))
HOSTILE = {
    "a text that unpacks to 64 MiB": header() + chunk(b"zTXt", b"parameters\0\0" + BOMB),
    "the same in Unicode": header() + chunk(b"iTXt", b"parameters\0\1\0\0\0" + BOMB),
    "a profile that unpacks to 64 MiB": header() + chunk(b"iCCP", b"x\0\0" + BOMB),
    "a chunk of 2 GiB": header() + chunk(b"tEXt", b"parameters\0a", length=2**31 - 1),
    "5 MiB of text": header() + chunk(b"tEXt", b"parameters\0" + b"a" * (5 << 20)) + chunk(b"IDAT", b""),
    "a hundred large texts": header() + chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * (1 << 20))) * 100,
    "no pixels": header() + TEXT,
    "no header": png.SIGNATURE + TEXT + chunk(b"IDAT", b""),
    "a wrong sum": header() + TEXT[:-1] + b"?" + chunk(b"IDAT", b""),
    "no size": header(0, 0) + TEXT + chunk(b"IDAT", b""),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(FileError, match=r"a\.png is a damaged PNG file"):
        png.read(tmp_path / "a.png")


CUT = {
    "nothing": (png.SIGNATURE, "it ends too early"),
    "no pixels": (header() + TEXT, "it ends too early"),
    "an end without pixels": (header() + TEXT + chunk(b"IEND", b""), "it ends too early"),
    "half a chunk": (header() + TEXT[:-6], "it ends too early"),
    "pixels far behind": (header() + chunk(b"abCd", b"a" * (5 << 20)), "4194304 bytes hold no pixels"),
}


@pytest.mark.parametrize(("data", "words"), CUT.values(), ids=CUT.keys())
def test_a_file_without_pixels_says_so(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(FileError, match=rf"a\.png is a damaged PNG file: .*{words}$"):
        png.read(tmp_path / "a.png")


CROWDED = {
    "texts": chunk(b"tEXt", b"a\0") * 200_000,
    "unknown chunks": chunk(b"abCd", b"") * 300_000,
    "profiles": chunk(b"iCCP", b"x\0\0" + zlib.compress(b"a" * (1 << 20))) * 1000,
}


@pytest.mark.parametrize("data", CROWDED.values(), ids=CROWDED.keys())
def test_a_crowd_of_chunks_is_refused_at_once(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(header() + data + TEXT + chunk(b"IDAT", b""))
    begin = time.perf_counter()
    with pytest.raises(FileError, match=r"a\.png is a damaged PNG file: it has over 256 chunks before its pixels"):
        png.read(tmp_path / "a.png")
    assert time.perf_counter() - begin < 0.5


def test_as_many_chunks_as_may_be(tmp_path: Path) -> None:
    more = chunk(b"tEXt", b"a\0") * (png.MAX_CHUNKS - 2)
    (tmp_path / "a.png").write_bytes(header() + more + TEXT + chunk(b"IDAT", b""))
    assert png.read(tmp_path / "a.png").text == "a"
    (tmp_path / "a.png").write_bytes(header() + more + TEXT * 2 + chunk(b"IDAT", b""))
    with pytest.raises(FileError, match="over 256 chunks"):
        png.read(tmp_path / "a.png")


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_that_is_too_long(tmp_path: Path, packed: bool) -> None:
    info = PngInfo()
    info.add_text("parameters", "a" * png.MAX_TEXT, zip=packed)
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert png.read(tmp_path / "a.png").text == "a" * png.MAX_TEXT
    info.add_text("parameters", 'a:"\\",' * 500_000, zip=packed)
    picture().save(tmp_path / "a.png", pnginfo=info)
    words = "is a damaged PNG file" if packed else "the text 'parameters' has 3000000 characters, over 1048576"
    begin = time.perf_counter()
    with pytest.raises(FileError, match=rf"a\.png.* {words}"):
        png.read(tmp_path / "a.png")
    assert time.perf_counter() - begin < 0.5


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    """Nor is there a limit to their number: it takes nothing."""
    (tmp_path / "a.png").write_bytes(header(2**31 - 1, 2**31 - 1) + TEXT + chunk(b"IDAT", b"nonsense"))
    assert png.read(tmp_path / "a.png") == png.Picture(2**31 - 1, 2**31 - 1, "a")


def test_a_large_sparse_file(tmp_path: Path) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.write(header() + chunk(b"tEXt", b"parameters\0a", length=2**31 - 1))
        file.truncate(8 << 30)
    with pytest.raises(FileError, match="damaged"):
        png.read(tmp_path / "a.png")


def sample() -> bytes:
    info, data = PngInfo(), BytesIO()
    for key, value in (("parameters", "a"), ("other", "灯台")):
        info.add_text(key, value, zip=key == "other")
    picture().save(data, "PNG", pnginfo=info, dpi=(72, 72), icc_profile=b"profile")
    return data.getvalue()


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    data = sample()
    pixels = data.index(b"IDAT") + 4
    for length in range(len(data)):
        (tmp_path / "a.png").write_bytes(data[:length])
        if length >= pixels:
            assert png.read(tmp_path / "a.png").text == "a"
        else:
            with pytest.raises(FileError, match=r"a\.png is (no|a damaged) PNG file"):
                png.read(tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_file_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Read or refused, and nothing else; the sums are put right, so that what is behind them is reached."""
    found = list(chunks(sample()))
    place = data.draw(st.integers(0, len(found) - 1))
    kind, body = found[place]
    at = data.draw(st.integers(0, max(len(body) - 1, 0)))
    body = body[:at] + data.draw(st.binary(max_size=6)) + body[at + data.draw(st.integers(0, 6)) :]
    kind = data.draw(st.sampled_from([kind, b"tEXt", b"iTXt", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"pHYs", b"eXIf"]))
    found[place] = kind, body
    path = tmp_path_factory.getbasetemp() / "changed.png"
    path.write_bytes(png.SIGNATURE + b"".join(chunk(*pair) for pair in found))
    with suppress(FileError):
        png.read(path)


# ------------------------------------------------------------------------------------------------------- atomic writing


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses what lies behind, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("old", [b"an old good file", None], ids=["over an old file", "a new file"])
def test_r24_r25_a_disk_that_is_full_at_any_byte(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "a.png"
    size = len(written(path).read_bytes())
    path.unlink()
    if old is not None:
        path.write_bytes(old)
    for room in range(size):
        with (
            file_size_limit(room),
            pytest.raises(FileError, match=r"a\.png cannot be written: File too large") as caught,
        ):
            written(path)
        assert caught.value.field == "out"
        assert os.listdir(tmp_path) == ([] if old is None else ["a.png"])
        assert old is None or path.read_bytes() == old
    with file_size_limit(size):
        written(path)
    assert png.read(path).text == f"a\n{LINE}"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_r25_what_was_there_survives_any_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "a.png").write_bytes(b"an old good file")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if call == "write":
        disk.with_room(monkeypatch, 0)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(FileError, match=r"a\.png cannot be written: No space left on device"):
        written(tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"an old good file"


def test_new_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"of somebody else")
    with pytest.raises(FileError, match=r"a\.png cannot be written: File exists"):
        written(tmp_path / "a.png", new=True)
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"of somebody else"
