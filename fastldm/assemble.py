"""What a pipeline is made of, from wherever it is: a folder, a single file, or what the caller hands in.

All of it becomes `Part`s, a scheduler and a tokenizer; the files stay open until the parts are read.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fastldm.config import TextConfig
from fastldm.errors import ArgumentError, Error, FileError, brief
from fastldm.prompt import Tokenizer
from fastldm.runtime.build import RUN, check_index
from fastldm.sampling import SchedulerConfig, scheduler_config
from fastldm.weights.families import SD1, Family
from fastldm.weights.files import STEMS, ModelFolder, TensorFiles, inside, open_file, open_model, open_regular
from fastldm.weights.load import StateDict, Tensors
from fastldm.weights.original import MAX_YAML, Original, original_config
from fastldm.weights.single import Checkpoint, Part, lone_text_encoder, lone_vae

CLIP_ID = "openai/clip-vit-large-patch14"  # whose tokenizer every Stable Diffusion uses
SCHEDULER = "scheduler/scheduler_config.json"
MAX_POSITIONS, MAX_TOKENS = 1 << 16, 1 << 24
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
OPEN_CLIP_PAD = 0  # OpenCLIP fills the window with zeros, whatever the tokenizer's files say
FILE_ONLY = ("config", "original_config", "prediction_type", "extract_ema")
FOLDER_ONLY = ("variant", "revision")
_HUB_FILE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)")
PathLike: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Asked:
    """Where a model comes from, as the caller says it; `Pipeline` describes the fields."""

    model: PathLike
    variant: str | None = None
    revision: str | None = None
    cache_dir: PathLike | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    config: PathLike | None = None
    original_config: PathLike | None = None
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    prediction_type: str | None = None
    extract_ema: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "config", "original_config", "cache_dir"):
            value = getattr(self, name)
            if not isinstance(value, str | os.PathLike) and (value is not None or name == "model"):
                raise ArgumentError(f"{name} = {brief(value)}: must be a path", field=name)
        if self.extract_ema not in (True, False):
            reason = f"extract_ema = {brief(self.extract_ema)}: must be True or False"
            raise ArgumentError(reason, field="extract_ema")

    @property
    def path(self) -> str:
        return os.path.expanduser(os.fspath(self.model))

    @property
    def is_file(self) -> bool:
        """Whether a single file is meant: one on disk, by its address on the hub, or by how its name ends."""
        path = self.path
        if os.path.lexists(path):
            return not os.path.isdir(path)
        return _HUB_FILE.fullmatch(path) is not None or path.lower().endswith(FILE_SUFFIXES)

    def file(self) -> Path:
        """The single file, fetched if need be."""
        if self.path.startswith(("http://", "https://")) and not _HUB_FILE.fullmatch(self.path):
            reason = "only files of the hub are fetched: download it, and pass its path"
            raise FileError(f"{brief(self.path)}: {reason}", field="model")
        return self._fetched(self.path) if _HUB_FILE.fullmatch(self.path) else Path(self.path)

    def folder(self, name: PathLike, argument: str) -> ModelFolder:
        """The folder that an argument names, on disk or in the hub's cache: nothing is fetched."""
        try:
            return open_model(name, cache_dir=self.cache_dir, local_files_only=True)
        except FileError as error:
            raise FileError(f"{argument}: {error}", field=argument) from None

    def _fetched(self, url: str) -> Path:
        """A file of the hub, by its address there."""
        from huggingface_hub import hf_hub_download

        matched = _HUB_FILE.fullmatch(url)
        assert matched is not None
        try:
            path = hf_hub_download(
                matched[1],
                matched[3].partition("?")[0],
                revision=self.revision or matched[2],
                cache_dir=os.fspath(self.cache_dir) if self.cache_dir else None,
                local_files_only=self.local_files_only,
                token=self.token,
            )
        except Exception as error:  # the client lets errors of its HTTP library through, which differ by version
            reason = f"is not in the hub's cache, and was not fetched ({type(error).__name__})"
            raise FileError(f"{url} {reason}: download it, and pass its path", field="model") from error
        return Path(path)


@dataclass
class Assembly:
    """parts: by component; a module in place of a part is shared as it is. Use it in a `with` block."""

    parts: dict[str, Part | nn.Module]
    scheduler: SchedulerConfig
    tokenizer: Callable[[TextConfig], Tokenizer]
    files: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def assemble(asked: Asked) -> Assembly:
    """Raises `ArgumentError` naming an argument, `FileError` or `ConfigError` naming a file."""
    files = ExitStack()
    try:
        made = _from_file(asked, files) if asked.is_file else _from_folder(asked, files)
        for name in ("vae", "text_encoder"):
            if getattr(asked, name) is not None:
                made.parts[name] = given(name, asked, files)
    except BaseException:
        files.close()
        raise
    return made


# ----------------------------------------------------------------------------------------------------- a folder


def _from_folder(asked: Asked, files: ExitStack) -> Assembly:
    folder = open_folder(asked)
    check_index(folder)
    parts = {name: folder_part(folder, name, files) for name in RUN if getattr(asked, name, None) is None}
    scheduler = scheduler_config(folder.read_json(SCHEDULER))
    tokenizer = _tokenizer(asked, lambda: folder_tokenizer(asked, folder, "text_encoder"))
    return Assembly(dict(parts), scheduler, tokenizer, files)


def open_folder(asked: Asked) -> ModelFolder:
    """The model's folder, fetched if need be."""
    for name in FILE_ONLY:
        if getattr(asked, name) not in (None, False):
            raise ArgumentError(f"{name}: is for a single file, and the model is a folder", field=name)
    return open_model(
        asked.model,
        revision=asked.revision,
        variant=asked.variant,
        cache_dir=asked.cache_dir,
        local_files_only=asked.local_files_only,
        token=asked.token,
    )


def folder_part(folder: ModelFolder, name: str, files: ExitStack, component: str | None = None) -> Part:
    """The component `name` of a model's folder; its tensors stay open until `files` is closed.

    component: the folder it lies in, where the folder is not the model's; "" for the folder itself.
    """
    place = name if component is None else component
    relative = inside(place, "config.json")
    where = relative if component is None else str(folder.root / relative)

    def opened(config: Any, names: Collection[str]) -> Tensors:
        return files.enter_context(folder.tensors(place, STEMS[name]))

    return Part(folder.read_json(relative), where, opened)


# ------------------------------------------------------------------------------------------------- a single file


def _from_file(asked: Asked, files: ExitStack) -> Assembly:
    folder = None if asked.config is None else asked.folder(asked.config, "config")
    checkpoint = told(asked, open_single(asked, files), folder)
    if not checkpoint.family.runs:
        what = f"is {checkpoint.family.name}, which can be converted and is not painted yet"
        raise FileError(f"{checkpoint.where}: {what}", field="model")
    parts = {name: file_part(checkpoint, folder, name) for name in RUN if getattr(asked, name, None) is None}
    pad = _pad(checkpoint, "text_encoder")
    tokenizer = _tokenizer(asked, lambda: file_tokenizer(asked, folder, checkpoint, "text_encoder"), pad)
    scheduler = scheduler_config(*file_scheduler(checkpoint, folder, asked))
    return Assembly(dict(parts), scheduler, tokenizer, files)


def open_single(asked: Asked, files: ExitStack) -> TensorFiles:
    """The tensors of the single file, open until `files` is closed."""
    _check_for_file(asked)
    return files.enter_context(open_file(asked.file()))


def told(asked: Asked, tensors: TensorFiles, folder: ModelFolder | None) -> Checkpoint:
    """What a single file is, with the yaml beside it or the one that is asked for.

    folder: has the configurations of its components, so that no yaml is needed.
    """
    path, said = Path(tensors.where), None
    if asked.original_config is not None:
        said = read_original(Path(os.path.expanduser(asked.original_config)))
    elif folder is None and os.path.lexists(path.with_suffix(".yaml")):
        said = read_original(path.with_suffix(".yaml"))
    prediction_type = asked.prediction_type
    if prediction_type is None and folder is not None and folder.has(SCHEDULER):
        prediction_type = str(folder.read_json(SCHEDULER).get("prediction_type", "epsilon"))
    configured = folder is not None
    return Checkpoint(
        tensors, original=said, configured=configured, ema=asked.extract_ema, prediction_type=prediction_type
    )


def _check_for_file(asked: Asked) -> None:
    for name in FOLDER_ONLY:
        if getattr(asked, name) is not None and not _HUB_FILE.fullmatch(asked.path):
            raise ArgumentError(f"{name}: is for a folder, and the model is a single file", field=name)
    if asked.prediction_type not in (None, *PREDICTION_TYPES):
        choices = ", ".join(PREDICTION_TYPES)
        reason = f"prediction_type = {brief(asked.prediction_type)}: must be one of {choices}"
        raise ArgumentError(reason, field="prediction_type")
    if asked.config is not None and asked.original_config is not None:
        raise ArgumentError("original_config: config= says the same, pass one of them", field="original_config")


def read_original(path: Path) -> Original:
    """A yaml file as `original_config` reads it."""
    with open_regular(path) as file:
        if file.size > MAX_YAML:
            raise FileError(f"{path} has {file.size} bytes; at most {MAX_YAML} are allowed")
        return original_config(file.read(file.size, 0), str(path))


def _tokenizer(
    asked: Asked, at: Callable[[], TokenizerAt], pad: int | None = None
) -> Callable[[TextConfig], Tokenizer]:
    """at: where the files are. pad: as `TokenizerAt` has it, for a tokenizer of transformers."""
    value = asked.tokenizer
    if isinstance(value, Tokenizer):
        return lambda config: value
    if callable(getattr(value, "save_pretrained", None)):
        return lambda config: _converted(value, config, pad)
    return at().made


def file_part(checkpoint: Checkpoint, folder: ModelFolder | None, component: str) -> Part:
    """A component of a single file, with the configuration that `folder` has of it if there is a folder."""
    if component not in checkpoint.found.sections:
        reason = f"has no {component.replace('_', ' ')}: pass {component}= with a folder, a file or a module"
        raise FileError(f"{checkpoint.where}: {reason}", field=component)
    if folder is None:
        return checkpoint.part(component)
    name = f"{component}/config.json"
    return checkpoint.part(component, folder.read_json(name), name)


def file_scheduler(checkpoint: Checkpoint, folder: ModelFolder | None, asked: Asked) -> tuple[dict[str, Any], str]:
    """The hub's configuration of a single file's scheduler, and where it is from."""
    if folder is None or not folder.has(SCHEDULER):
        return checkpoint.json("scheduler"), checkpoint.where
    data = folder.read_json(SCHEDULER)
    return data | ({"prediction_type": asked.prediction_type} if asked.prediction_type else {}), SCHEDULER


def folder_tokenizer(asked: Asked, folder: ModelFolder, encoder: str) -> TokenizerAt:
    """The tokenizer of a text encoder in a model's folder, or the one that is given."""
    return TokenizerAt(folder, tokenizer_of(encoder)) if asked.tokenizer is None else _given_tokenizer(asked)


def file_tokenizer(asked: Asked, folder: ModelFolder | None, checkpoint: Checkpoint, encoder: str) -> TokenizerAt:
    """The tokenizer of a text encoder in a single file: given, in `folder`, or in the hub's cache."""
    component = tokenizer_of(encoder)
    if asked.tokenizer is None and folder is not None and has_tokenizer(folder, component):
        return TokenizerAt(folder, component)
    found = _cached_clip(asked, checkpoint.where) if asked.tokenizer is None else _given_tokenizer(asked)
    return replace(found, pad=_pad(checkpoint, encoder))


def _pad(checkpoint: Checkpoint, encoder: str) -> int | None:
    return OPEN_CLIP_PAD if checkpoint.family.texts[encoder].layout == "open_clip" else None


def _cached_clip(asked: Asked, where: str) -> TokenizerAt:
    with suppress(Error):
        folder = asked.folder(CLIP_ID, "tokenizer")
        if has_tokenizer(folder, ""):
            return TokenizerAt(folder, "")
    advice = (
        f"pass tokenizer= with a folder that holds tokenizer.json, or vocab.json and merges.txt (that of any Stable "
        f"Diffusion in diffusers' layout, or of {CLIP_ID}), or fetch the latter into the hub's cache once with "
        f"`hf download {CLIP_ID} tokenizer.json tokenizer_config.json`"
    )
    raise FileError(f"{where}: a single file has no tokenizer: {advice}", field="tokenizer")


# -------------------------------------------------------------------------------------------- what the caller hands in


def given(name: str, asked: Asked, files: ExitStack, family: Family = SD1) -> Part | nn.Module:
    """The component that the caller hands in: a module of ours as it is, all else as a part.

    family: whose scale of the latents an autoencoder in a single file has.
    """
    value = getattr(asked, name)
    if isinstance(value, nn.Module):
        return value if type(value).__module__.startswith("fastldm.") else _module_part(name, value)
    if not isinstance(value, str | os.PathLike):
        reason = f"must be a path, a module of diffusers or transformers, or of fastldm, not {type(value).__name__}"
        raise ArgumentError(f"{name}: {reason}", field=name)
    path = Path(os.path.expanduser(value))
    if os.path.isfile(path) or (path.name.lower().endswith(FILE_SUFFIXES) and not os.path.isdir(path)):
        tensors = files.enter_context(open_file(path))
        return lone_vae(tensors, family) if name == "vae" else lone_text_encoder(tensors)
    folder = asked.folder(value, name)
    return folder_part(folder, name, files, name if folder.has(name) else "")


def _module_part(name: str, module: Any) -> Part:
    config: Any = getattr(module, "config", None)
    data = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{name}: a {type(module).__name__} has no configuration", field=name)
    kind = type(module).__name__
    said = {"_class_name": kind, **data} if name == "vae" else {**data, "architectures": [kind]}
    return Part(said, f"{name} ({kind})", lambda config, names: StateDict(name, module.state_dict()))


# ---------------------------------------------------------------------------------------------------- the tokenizer


@dataclass(frozen=True)
class TokenizerAt:
    """A tokenizer's files: those of `component` in a model's folder, "" for the folder itself.

    pad: the id that fills the window, in place of the one that they say.
    """

    folder: ModelFolder
    component: str
    pad: int | None = None

    def made(self, config: TextConfig) -> Tokenizer:
        """For a text encoder of that configuration."""
        positions, vocab_size = config.positions, config.vocab_size
        found = Tokenizer.from_folder(self.folder, self.component, positions=positions, vocab_size=vocab_size)
        return found if self.pad is None else found.padded_with(self.pad)

    def token(self, number: int) -> str:
        """The token with an id, whatever the text encoder."""
        found = Tokenizer.from_folder(self.folder, self.component, positions=MAX_POSITIONS, vocab_size=MAX_TOKENS)
        text = found.bpe.id_to_token(number)
        if text is None:
            raise FileError(f"{self.folder.root}: the tokenizer has no token with the id {number}", field="tokenizer")
        return str(text)


def tokenizer_of(encoder: str) -> str:
    """The name of the component that belongs to a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def has_tokenizer(folder: ModelFolder, component: str) -> bool:
    """Whether there is a vocabulary."""
    return any(folder.has(inside(component, name)) for name in TOKENIZER_FILES)


def _given_tokenizer(asked: Asked) -> TokenizerAt:
    if not isinstance(asked.tokenizer, str | os.PathLike):
        reason = f"must be a folder or a tokenizer of transformers, not {type(asked.tokenizer).__name__}"
        raise ArgumentError(f"tokenizer: {reason}", field="tokenizer")
    folder = asked.folder(asked.tokenizer, "tokenizer")
    component = next((name for name in ("", "tokenizer") if has_tokenizer(folder, name)), None)
    if component is None:
        reason = "has neither tokenizer.json nor vocab.json, and no folder tokenizer with one"
        raise FileError(f"{folder.root} {reason}", field="tokenizer")
    return TokenizerAt(folder, component)


def _converted(tokenizer: Any, config: TextConfig, pad: int | None) -> Tokenizer:
    """A tokenizer of transformers, by the files that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return TokenizerAt(ModelFolder(folder), "", pad).made(config)
