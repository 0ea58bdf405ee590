"""From prompts to PNG files: what the command paints, and what each file says about it.

Nothing here needs torch until a `Painter` is made, so that what can be refused before is refused at once.
"""

from __future__ import annotations

import os
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps

from fastldm import __version__, png
from fastldm.errors import Error, FileError, brief
from fastldm.png import Parameters

if TYPE_CHECKING:
    from fastldm.request import Request
    from fastldm.sampling import SchedulerConfig

MAX_PROMPT = 64 << 10  # bytes; the pipeline's limit, and the next, which it would bring torch to ask for
MAX_SIDE = 4096
MAX_PROMPTS = 100_000
MAX_PROMPTS_FILE = 64 << 20  # bytes
MAX_IMAGE_FILE = 256 << 20  # bytes
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
DEFAULT_STEM = "out"
USE_ETA = ("ddim", "tcd")  # samplers
QUOTES = "'\""
# What a file says of how the model was read, by the names of `Pipeline`'s arguments.
SAID = {
    "vae": "VAE",
    "text_encoder": "Text encoder",
    "variant": "Variant",
    "prediction_type": "Prediction type",
    "extract_ema": "Averaged weights",
}


# ------------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Picture:
    """An image that is painted on, or its mask. digest: ten digits of its file's SHA-256."""

    pixels: PIL.Image.Image
    digest: str


@dataclass(frozen=True)
class Settings:
    """What the images of a run have in common. None is the default of the model and the task."""

    model: str
    loading: Mapping[str, Any] = field(default_factory=dict)  # arguments of `Pipeline`
    dtype: str = "fp32"
    device: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    size: tuple[int, int] | None = None  # width, height
    negative: str = ""
    image: Picture | None = None
    mask: Picture | None = None
    strength: float | None = None
    clip_skip: int | None = None
    eta: float | None = None
    overlay: bool = False

    @property
    def uses_eta(self) -> bool:
        """False also while the sampler is the model's, which is not read yet."""
        return self.sampler in USE_ETA

    def said(self, prompt: str, seed: int) -> Parameters:
        """What a file says: the web UI's words where it has one. What is None here is left out."""
        words: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": self.sampler and png.sampler_label(self.sampler),
            "CFG scale": self.guidance,
            "Image CFG scale": self.image_guidance,
            "Seed": seed,
            "Size": self.size and f"{self.size[0]}x{self.size[1]}",
            "Model": _name(self.model),
            **{SAID[key]: _name(value) for key, value in self.loading.items() if key in SAID},
            "Denoising strength": self.strength,
            "Init image hash": self.image and self.image.digest,
            "Mask hash": self.mask and self.mask.digest,
            "Overlay": self.overlay or None,
            "Clip skip": self.clip_skip and self.clip_skip + 1,  # the web UI counts from the last layer, 1
            "Eta": (self.eta or None) if self.uses_eta else None,
            "Precision": None if self.dtype == "fp32" else self.dtype,
            "Version": f"fastldm {__version__}",
        }
        settings = {key: _shown(value) for key, value in words.items() if value is not None}
        return Parameters(prompt, self.negative, settings)


def _shown(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _name(path: object) -> str:
    """The last part of a path, without the ending of a file of weights; what is no UTF-8 replaced."""
    name = Path(os.path.abspath(str(path))).name
    stem = name.removesuffix(".safetensors").removesuffix(".ckpt")
    return os.fsencode(stem).decode("utf-8", "replace")


@dataclass(frozen=True)
class Order:
    """One image. new: a file that is there already is an error and stays."""

    prompt: str
    seed: int
    path: Path
    new: bool = False


@dataclass(frozen=True)
class Painted:
    """What was painted, in plain values fit for JSON."""

    path: str
    prompt: str
    seed: int
    size: tuple[int, int]
    steps: int
    sampler: str
    seconds: float


# -------------------------------------------------------------------------------------------------------- what comes in


def read_picture(path: str, name: str) -> Picture:
    """A PNG, JPEG or WebP file, upright; its size is checked before it is decoded.

    Raises `FileError` with `name` as its field.
    """
    data = _read(path, name, MAX_IMAGE_FILE)
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise _bad(path, name, f"is {image.width}x{image.height}, over {MAX_SIDE} pixels a side")
            image.load()
            pixels = PIL.ImageOps.exif_transpose(image)
    except PIL.UnidentifiedImageError:
        raise _bad(path, name, "is no PNG, JPEG or WebP file") from None
    except PIL.Image.DecompressionBombError:
        raise _bad(path, name, f"is over {MAX_SIDE} pixels a side") from None
    except Error:
        raise
    except png.DAMAGE as error:
        raise _bad(path, name, f"is damaged: {brief(str(error))}") from error
    return Picture(pixels, sha256(data).hexdigest()[:10])


def read_prompts(path: str) -> list[str]:
    """One a line, in UTF-8; empty lines and those that begin with # are none. "-" is the standard input.

    Raises `FileError` naming the line.
    """
    where = "the standard input" if path == "-" else path
    data = _read(path, "prompts", MAX_PROMPTS_FILE)
    prompts = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if len(line) > MAX_PROMPT:
            raise _bad(where, "prompts", f"line {number} has {len(line)} bytes, over {MAX_PROMPT}")
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError:
            raise _bad(where, "prompts", f"line {number} is not UTF-8: {brief(line)}") from None
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise _bad(where, "prompts", f"holds {len(prompts)} prompts, must hold 1 to {MAX_PROMPTS}")
    return prompts


def _read(path: str, name: str, limit: int) -> bytes:
    try:
        if path == "-" and name == "prompts":
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise _bad(path, name, f"cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise _bad(path, name, f"has over {limit} bytes")
    return data


def _bad(path: str, name: str, reason: str) -> FileError:
    return FileError(f"{name} = {path}: {reason}", field=name)


# -------------------------------------------------------------------------------------------------------- where it goes


def of_prompt(prompt: str, out: str | None, number: int, seed: int) -> list[Order]:
    """`number` images of a prompt: into `out`, which is replaced, or under names that nobody has."""
    paths = _free_paths(number) if out is None else _numbered(Path(out), number)
    for path in paths:
        _check_place(path)
    return [Order(prompt, seed + k, path, new=out is None) for k, path in enumerate(paths)]


def of_prompts(file: str, out: str | None, seed: int, *, overwrite: bool) -> list[Order]:
    """One image of each prompt in a file, into the folder `out`."""
    folder = Path(out or DEFAULT_STEM)
    if os.path.lexists(folder):
        with _writing(folder):
            _check_folder(folder)
    prompts = read_prompts(file)
    pairs = zip(prompts, _in_folder(folder, len(prompts)), strict=True)
    return [Order(prompt, seed + k, path, new=not overwrite) for k, (prompt, path) in enumerate(pairs)]


def _free_paths(number: int) -> list[Path]:
    """Names in the working directory that nobody has: out.png or, for several or if it is taken, out-1.png, ..."""
    first = [Path(f"{DEFAULT_STEM}.png")] if number == 1 else []
    names = chain(first, (Path(f"{DEFAULT_STEM}-{k}.png") for k in count(1)))
    return list(islice((name for name in names if not os.path.lexists(name)), number))


def _numbered(path: Path, number: int) -> list[Path]:
    """out.png for one; for more out-1.png, out-2.png, ..."""
    return [path] if number == 1 else [path.with_stem(f"{path.stem}-{k}") for k in range(1, number + 1)]


def _in_folder(folder: Path, number: int) -> list[Path]:
    """0001.png, 0002.png, ..."""
    digits = max(len(str(number)), 4)
    return [folder / f"{k:0{digits}}.png" for k in range(1, number + 1)]


def _check_place(path: Path) -> None:
    """Raises `FileError` where an image cannot be written, as far as that shows before it is painted."""
    if path.suffix.lower() != ".png":
        raise FileError(f"out = {path}: must end in .png", field="out")
    with _writing(path):
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                raise IsADirectoryError(0, "is a folder")
        except FileNotFoundError:
            pass
        _check_folder(path.parent)


def make_folder(folder: Path) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_folder(folder)


def _check_folder(folder: Path) -> None:
    try:
        os.stat(folder)
    except FileNotFoundError:
        raise FileNotFoundError(0, f"the folder {folder} is missing") from None
    if not folder.is_dir():
        raise NotADirectoryError(0, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(0, f"nothing may be written into {folder}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"out = {path}: cannot be written: {error.strerror or error}", field="out") from error


def still_to_paint(orders: Iterable[Order], settings: Settings, *, complete: bool) -> list[Order]:
    """The orders but those whose file is there and says the same.

    complete: whether the settings hold every default; else only what they hold is compared. Raises `FileError` for a
    file that says something else, or nothing, and must not be replaced.
    """
    return [order for order in orders if not _is_there(order, settings, complete)]


def _is_there(order: Order, settings: Settings, complete: bool) -> bool:
    if not os.path.lexists(order.path):
        return False
    try:
        text = png.read(order.path).text
        if text is None:
            raise FileError(f"{order.path} does not say what it was made by")
        difference = _difference(png.parsed(text), settings.said(order.prompt, order.seed), complete)
        if difference:
            raise FileError(f"{order.path} {difference}")
    except FileError as error:
        if not order.new:
            return False
        raise FileError(f"{error}; --overwrite paints it anew, another -o leaves it", field="out") from None
    return True


def _difference(found: Parameters, wanted: Parameters, complete: bool) -> str | None:
    """What a file says that is not wanted, "" for nothing. The version of the program makes no difference."""
    for name in ("prompt", "negative_prompt"):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if theirs != ours:
            return f"has the {name.replace('_', ' ')} {brief(theirs)}, not {brief(ours)}"
    keys = [*wanted.settings, *(found.settings if complete else ())]
    for key in keys:
        theirs, ours = found.settings.get(key, "nothing"), wanted.settings.get(key, "nothing")
        if key != "Version" and theirs != ours:
            return f"has {brief(key).strip(QUOTES)} {brief(theirs).strip(QUOTES)}, not {ours}"
    return None


# ------------------------------------------------------------------------------------------------------------- painting


class Painter:
    """A pipeline, and the settings with every default filled in. Making one loads the model."""

    def __init__(self, settings: Settings) -> None:
        """Raises what `Pipeline` and its call raise for wrong arguments."""
        import torch

        from fastldm.arguments import Arguments
        from fastldm.pipeline import Pipeline
        from fastldm.request import checked
        from fastldm.surface import geometry

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.dtype]
        self._pipe = Pipeline(settings.model, dtype=dtype, device=settings.device, **settings.loading)
        if settings.sampler is not None:
            self._pipe.scheduler = settings.sampler
        self._call = _call(settings)
        asked = checked(geometry(self._pipe._engine, self._pipe._tokenizer), Arguments(prompt="", **self._call))
        self.settings = _filled(settings, asked, self._pipe.scheduler)

    def hide_steps(self) -> None:
        """Shows no bar over the steps."""
        self._pipe.set_progress_bar_config(disable=True)

    def paint(self, order: Order) -> Painted:
        """Raises `FileError` if the image cannot be written; then what was there before is still there."""
        begin = time.perf_counter()
        images = self._pipe(order.prompt, seed=order.seed, **self._call).images
        assert isinstance(images, list)
        image = images[0]
        settings = replace(self.settings, size=image.size)
        png.write(image, order.path, settings.said(order.prompt, order.seed), new=order.new)
        return Painted(
            path=str(order.path),
            prompt=order.prompt,
            seed=order.seed,
            size=image.size,
            steps=settings.steps or 0,
            sampler=settings.sampler or "",
            seconds=round(time.perf_counter() - begin, 3),
        )


def _call(settings: Settings) -> dict[str, Any]:
    """Arguments of a call of the pipeline; what is None is left to it."""
    width, height = settings.size or (None, None)
    return {
        "negative_prompt": settings.negative or None,
        "image": settings.image and settings.image.pixels,
        "mask_image": settings.mask and settings.mask.pixels,
        "strength": settings.strength,
        "width": width,
        "height": height,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "image_guidance_scale": settings.image_guidance,
        "eta": settings.eta or 0.0,
        "clip_skip": settings.clip_skip,
        "overlay": settings.overlay,
    }


def _filled(settings: Settings, asked: Request, scheduler: SchedulerConfig) -> Settings:
    """With the defaults that the call takes."""
    return replace(
        settings,
        sampler=settings.sampler or sampler_name(scheduler),
        steps=asked.steps,
        guidance=asked.scales.text,
        image_guidance=asked.scales.image if asked.task == "instruct" else None,
        size=(asked.width, asked.height),
        strength=asked.source.strength if asked.source and asked.task != "instruct" else None,
    )


def sampler_name(scheduler: SchedulerConfig) -> str:
    """The name of `samplers()` that a model's own scheduler would have; its kind where it has none."""
    from fastldm.sampling.names import named, samplers

    for name in samplers():
        with suppress(Error):
            if named(name, scheduler) == scheduler:
                return name
    return scheduler.kind
