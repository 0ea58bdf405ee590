"""PNG files that say what they were made by, in the text chunk `parameters`, as AUTOMATIC1111's web UI writes it:

    a lighthouse in the rain
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 1, Size: 512x768, Model: name, Version: fastldm 0.1.0

Other programs read that. Where such a text would be read as another prompt, because this one has a line "Negative
prompt: ..." of its own, say, the settings hold it once more, quoted: it is always read back exactly.
"""

from __future__ import annotations

import json
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from fastldm.errors import FileError, brief

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "parameters"
NEGATIVE = "Negative prompt:"
EXACT = ("Exact prompt", "Exact negative prompt")
FEWEST = 3  # settings of a line that is taken for one, as in the web UI
MAX_HEAD = 4 << 20  # bytes that are read of a file: what stands before the pixels
MAX_CHUNKS = 256  # before the pixels
MAX_TEXT = 1 << 20  # characters of `parameters`; the longest prompts, quoted once more, need nearly as many
MAX_PAIRS = 256  # settings that are looked for in a line
# Pillow limits what text chunks unpack to; these are what it raises for files that it does not like.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error)
# Possessive: a text of a stranger is read in linear time.
_SETTING = re.compile(r'\s*+(\w[\w \-/]*+):\s*+("(?:\\.|[^"\\])*+"|[^,]*+)(?:,|$)')

# The web UI's names of our samplers; the others keep ours.
SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
CURVES = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}


def sampler_label(name: str) -> str:
    """ "dpmpp_2m_karras" -> "DPM++ 2M Karras"."""
    stem, _, suffix = name.rpartition("_")
    if stem in SAMPLERS and suffix in CURVES:
        return f"{SAMPLERS[stem]} {CURVES[suffix]}"
    return SAMPLERS.get(name, name)


@dataclass(frozen=True)
class Parameters:
    """What an image was made by. settings: in order, such as {"Steps": "20"}."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """`parsed` gives it back, if there are `FEWEST` settings or more."""
        prompts = (self.prompt, self.negative_prompt)
        settings = {key: _quoted(value) for key, value in self.settings.items()}
        found = parsed(_joined(*prompts, settings))
        for key, mine, read in zip(EXACT, prompts, (found.prompt, found.negative_prompt), strict=True):
            if mine != read:
                settings[key] = json.dumps(mine, ensure_ascii=False)
        return _joined(*prompts, settings)


def _joined(prompt: str, negative_prompt: str, settings: Mapping[str, str]) -> str:
    lines = [prompt] if prompt else []
    lines += [f"{NEGATIVE} {negative_prompt}"] if negative_prompt else []
    lines += [", ".join(f"{key}: {value}" for key, value in settings.items())]
    return "\n".join(lines).replace("\0", " ")  # it would end the chunk's text for some readers


def _quoted(value: str) -> str:
    if value == value.strip() and not re.search(r'[,:"\n\0]', value):
        return value
    return json.dumps(value, ensure_ascii=False)


def parsed(text: str) -> Parameters:
    """Of any program's text: a last line that holds no settings belongs to the prompt."""
    *lines, last = text.rstrip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < FEWEST:
        lines, pairs = [*lines, last], []
    settings = dict(pairs)
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(NEGATIVE)), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:])
    negative = negative.lstrip().removeprefix(NEGATIVE).removeprefix(" ")
    return Parameters(settings.pop(EXACT[0], prompt), settings.pop(EXACT[1], negative), settings)


def _pairs(line: str) -> list[tuple[str, str]]:
    found, position = [], 0
    for _ in range(MAX_PAIRS):
        if position >= len(line):
            break
        match = _SETTING.match(line, position)
        if match is not None:
            found.append((match[1], _unquoted(match[2])))
        position = match.end() if match is not None else line.find(",", position) + 1
        if not position:
            break
    return found


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


@dataclass(frozen=True)
class Picture:
    """A PNG file, its pixels unread. text: its `parameters`, None where it has none."""

    width: int
    height: int
    text: str | None


def read(path: Path) -> Picture:
    """Raises `FileError` naming the file, if it is missing, no PNG or damaged before its pixels."""
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is no file")
        with open(path, "rb") as file:
            head = file.read(MAX_HEAD)
    except FileNotFoundError:
        raise FileError(f"{path} is missing") from None
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if not head.startswith(SIGNATURE):
        raise FileError(f"{path} is no PNG file")
    flaw = _flaw(head)
    if flaw is not None:
        raise FileError(f"{path} is a damaged PNG file: {flaw}")
    try:
        with warnings.catch_warnings(action="ignore"), PngImageFile(BytesIO(head)) as image:
            text, size = image.info.get(KEYWORD), image.size
    except DAMAGE as error:
        raise FileError(f"{path} is a damaged PNG file: {brief(str(error))}") from error
    if not isinstance(text, str):
        return Picture(*size, None)
    if len(text) > MAX_TEXT:
        raise FileError(f"{path}: the text {KEYWORD!r} has {len(text)} characters, over {MAX_TEXT}")
    return Picture(*size, text)


def _flaw(head: bytes) -> str | None:
    """Why the pixels are not reached; Pillow would take its time to find many chunks."""
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS + 1):
        kind = head[position + 4 : position + 8]
        if kind in (b"IDAT", b"fdAT"):
            return None
        if kind == b"IEND" or (len(kind) < 4 and len(head) < MAX_HEAD):
            return "it ends too early"
        if len(kind) < 4:
            return f"its first {MAX_HEAD} bytes hold no pixels"
        position += 12 + int.from_bytes(head[position : position + 4], "big")
    return f"it has over {MAX_CHUNKS} chunks before its pixels"


def is_png(path: Path) -> bool:
    """Whether a file begins as one."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


def write(image: PIL.Image.Image, path: Path, parameters: Parameters, *, new: bool) -> None:
    """Whole or not at all: what was there survives any failure, with `new` also success, which is an error then.

    Raises `FileError` naming `path`.
    """
    from fastldm.weights.write import whole  # it brings torch, which reading does without

    chunks, data = PngInfo(), BytesIO()
    chunks.add_text(KEYWORD, parameters.text)  # tEXt if it is Latin-1, else iTXt
    image.save(data, "PNG", pnginfo=chunks)
    with whole(path, new=new) as file:
        file.write(data.getbuffer())
