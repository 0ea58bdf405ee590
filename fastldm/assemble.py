"""What a pipeline is made of, from wherever it is: a folder, a single file, or what the caller hands in.

All of it becomes `Part`s, a scheduler and a tokenizer; the files stay open until the parts are read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastldm.asked import FILE_SUFFIXES, HUB_FILE, NEEDED
from fastldm.asked import Asked as Asked
from fastldm.components import TokenizerView, View, unwrapped
from fastldm.config import TextConfig
from fastldm.errors import ArgumentError, FileError, brief
from fastldm.prompt import Tokenizer
from fastldm.runtime.build import RUN, check_index
from fastldm.runtime.place import DTYPES
from fastldm.sampling import SchedulerConfig, scheduler_config
from fastldm.sampling.choice import chosen
from fastldm.tokenizer_files import (
    TokenizerAt,
    cached_clip,
    converted,
    given_tokenizer,
    has_tokenizer,
    shared,
    tokenizer_of,
)
from fastldm.weights.families import SD1, Family
from fastldm.weights.files import (
    PICKLE,
    STEMS,
    File,
    ModelFolder,
    TensorFiles,
    inside,
    kind_of,
    open_file,
    open_model,
    open_regular,
)
from fastldm.weights.load import StateDict, Tensors
from fastldm.weights.original import MAX_YAML, Original, original_config
from fastldm.weights.single import Checkpoint, Part, lone_text_encoder, lone_vae

SCHEDULER = "scheduler/scheduler_config.json"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
OPEN_CLIP_PAD = 0  # OpenCLIP fills the window with zeros, whatever the tokenizer's files say
FILE_ONLY = ("config", "original_config", "prediction_type", "extract_ema")
FOLDER_ONLY = ("variant", "revision")
PATH_ONLY = ("cache_dir", "local_files_only", "use_safetensors")


@dataclass
class Assembly:
    """parts: by component; a module in place of a part is shared as it is. Use it in a `with` block.

    dtype, device: where it runs if nobody says otherwise.
    """

    parts: dict[str, Part | nn.Module]
    scheduler: SchedulerConfig
    tokenizer: Callable[[TextConfig], Tokenizer]
    files: ExitStack = field(default_factory=ExitStack)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def assemble(asked: Asked) -> Assembly:
    """Raises `ArgumentError` naming an argument, `FileError` or `ConfigError` naming a file."""
    files = ExitStack()
    try:
        if asked.model is None:
            return _from_components(asked, files)
        made = _from_file(asked, files) if asked.is_file else _from_folder(asked, files)
        made.parts |= {name: given(name, asked, files) for name in RUN if getattr(asked, name) is not None}
        if asked.scheduler is not None:
            made.scheduler = chosen(asked.scheduler, made.scheduler)
    except BaseException:
        files.close()
        raise
    return made


def _from_components(asked: Asked, files: ExitStack) -> Assembly:
    for name, kinds in NEEDED.items():
        if getattr(asked, name) is None:
            raise ArgumentError(f"{name}: is missing, as there is no model: pass {kinds}", field=name)
    for name in (*FILE_ONLY, *FOLDER_ONLY, "token"):
        if getattr(asked, name) not in (None, False):
            raise ArgumentError(f"{name}: is for a model, and none is given", field=name)
    paths = any(isinstance(getattr(asked, name), str | os.PathLike) for name in (*RUN, "tokenizer"))
    for name in PATH_ONLY:
        if not paths and getattr(asked, name) not in (None, False):
            raise ArgumentError(f"{name}: is for paths, and no component is one", field=name)
    if isinstance(asked.scheduler, str):
        reason = "a name keeps what a model was trained on, and there is no model"
        raise ArgumentError(f"scheduler = {brief(asked.scheduler)}: {reason}", field="scheduler")
    return Assembly(
        parts={name: given(name, asked, files) for name in RUN},
        scheduler=chosen(asked.scheduler, SchedulerConfig("ddim")),
        tokenizer=_tokenizer(asked, lambda: given_tokenizer(asked.tokenizer, asked.folder)),
        files=files,
        **_place_of(unwrapped(asked.unet)),
    )


def _place_of(unet: object) -> dict[str, Any]:
    """The dtype and device of a U-Net in memory, where a pipeline can run."""
    weight = next(iter(unet.parameters()), None) if isinstance(unet, nn.Module | View) else None
    if weight is None or weight.is_meta:
        return {}
    return {"device": weight.device} | ({"dtype": weight.dtype} if weight.dtype in DTYPES else {})


# ----------------------------------------------------------------------------------------------------- a folder


def _from_folder(asked: Asked, files: ExitStack) -> Assembly:
    folder = open_folder(asked)
    check_index(folder)
    safe = asked.use_safetensors is True
    parts = {name: folder_part(folder, name, files, safe=safe) for name in RUN if getattr(asked, name) is None}
    scheduler = scheduler_config(folder.read_json(SCHEDULER))
    tokenizer = _tokenizer(asked, lambda: folder_tokenizer(asked, folder, "text_encoder"))
    return Assembly(dict(parts), scheduler, tokenizer, files)


def open_folder(asked: Asked) -> ModelFolder:
    """The model's folder, fetched if need be."""
    for name in FILE_ONLY:
        if getattr(asked, name) not in (None, False):
            raise ArgumentError(f"{name}: is for a single file, and the model is a folder", field=name)
    assert asked.model is not None
    return open_model(
        asked.model,
        revision=asked.revision,
        variant=asked.variant,
        cache_dir=asked.cache_dir,
        local_files_only=asked.local_files_only,
        token=asked.token,
    )


def folder_part(
    folder: ModelFolder, name: str, files: ExitStack, component: str | None = None, *, safe: bool = False
) -> Part:
    """The component `name` of a model's folder; its tensors stay open until `files` is closed.

    component: the folder it lies in, where the folder is not the model's; "" for the folder itself.
    safe: refuse pickles.
    """
    place = name if component is None else component
    relative = inside(place, "config.json")
    where = relative if component is None else str(folder.root / relative)

    def opened(config: Any, names: Collection[str]) -> Tensors:
        tensors = files.enter_context(folder.tensors(place, STEMS[name]))
        if safe:
            _refuse_pickles(folder, place, Path(tensors.where).name)
        return tensors

    return Part(folder.read_json(relative), where, opened)


def _refuse_pickles(folder: ModelFolder, place: str, name: str) -> None:
    """name: of a file of weights, or of an index of such files."""
    names = {name}
    if name.endswith(".json"):
        names = set(folder.read_json(inside(place, name))["weight_map"].values())
    for found in sorted(names):
        with folder.open(inside(place, found)) as file:
            _refuse_pickle(file)


def _refuse_pickle(file: File) -> None:
    if kind_of(file.read(512, 0)) == PICKLE:
        reason = "is a pickle, and use_safetensors=True refuses these: `fastldm convert` makes safetensors of it"
        raise FileError(f"{file.where}: {reason}", field="use_safetensors")


# ------------------------------------------------------------------------------------------------- a single file


def _from_file(asked: Asked, files: ExitStack) -> Assembly:
    folder = None if asked.config is None else asked.folder(asked.config, "config")
    checkpoint = told(asked, open_single(asked, files), folder)
    if not checkpoint.family.runs:
        what = f"is {checkpoint.family.name}, which can be converted and is not painted yet"
        raise FileError(f"{checkpoint.where}: {what}", field="model")
    parts = {name: file_part(checkpoint, folder, name) for name in RUN if getattr(asked, name) is None}
    pad = _pad(checkpoint, "text_encoder")
    tokenizer = _tokenizer(asked, lambda: file_tokenizer(asked, folder, checkpoint, "text_encoder"), pad)
    scheduler = scheduler_config(*file_scheduler(checkpoint, folder, asked))
    return Assembly(dict(parts), scheduler, tokenizer, files)


def open_single(asked: Asked, files: ExitStack) -> TensorFiles:
    """The tensors of the single file, open until `files` is closed."""
    _check_for_file(asked)
    return _file(asked, asked.file(), files)


def _file(asked: Asked, path: Path, files: ExitStack) -> TensorFiles:
    if asked.use_safetensors:
        with open_regular(path) as file:
            _refuse_pickle(file)
    return files.enter_context(open_file(path))


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
        if getattr(asked, name) is not None and not HUB_FILE.fullmatch(asked.path):
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
    if isinstance(value, TokenizerView):
        return lambda config: shared(value.tokenizer, config)
    if callable(getattr(value, "save_pretrained", None)):
        return lambda config: converted(value, config, pad)
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
    if asked.tokenizer is not None:
        return given_tokenizer(asked.tokenizer, asked.folder)
    return TokenizerAt(folder, tokenizer_of(encoder))


def file_tokenizer(asked: Asked, folder: ModelFolder | None, checkpoint: Checkpoint, encoder: str) -> TokenizerAt:
    """The tokenizer of a text encoder in a single file: given, in `folder`, or in the hub's cache."""
    component = tokenizer_of(encoder)
    if asked.tokenizer is None and folder is not None and has_tokenizer(folder, component):
        return TokenizerAt(folder, component)
    if asked.tokenizer is None:
        found = cached_clip(checkpoint.where, asked.folder)
    else:
        found = given_tokenizer(asked.tokenizer, asked.folder)
    return replace(found, pad=_pad(checkpoint, encoder))


def _pad(checkpoint: Checkpoint, encoder: str) -> int | None:
    return OPEN_CLIP_PAD if checkpoint.family.texts[encoder].layout == "open_clip" else None


# -------------------------------------------------------------------------------------------- what the caller hands in


def given(name: str, asked: Asked, files: ExitStack, family: Family = SD1) -> Part | nn.Module:
    """The component that the caller hands in: a module of ours as it is, all else as a part.

    family: whose scale of the latents an autoencoder in a single file has.
    """
    value = unwrapped(getattr(asked, name))
    if isinstance(value, View):
        return value.network
    if isinstance(value, nn.Module):
        return value if type(value).__module__.startswith("fastldm.") else _module_part(name, value)
    if not isinstance(value, str | os.PathLike):
        kinds = "must be a path, a module of diffusers or transformers, or that of another Pipeline"
        reason = f"{kinds}, not {type(value).__name__}"
        raise ArgumentError(f"{name}: {reason}", field=name)
    path = Path(os.path.expanduser(value))
    if os.path.isfile(path) or (path.name.lower().endswith(FILE_SUFFIXES) and not os.path.isdir(path)):
        tensors = _file(asked, path, files)
        if name == "unet":
            return _lone_unet(asked, tensors)
        return lone_vae(tensors, family) if name == "vae" else lone_text_encoder(tensors)
    folder = asked.folder(value, name)
    safe = asked.use_safetensors is True
    return folder_part(folder, name, files, name if folder.has(name) else "", safe=safe)


def _lone_unet(asked: Asked, tensors: TensorFiles) -> Part:
    """The U-Net of a file that may hold nothing else, with the configuration in `asked.config` if that is given."""
    folder = None if asked.config is None else asked.folder(asked.config, "config")
    checkpoint = Checkpoint(tensors, configured=folder is not None, prediction_type=asked.prediction_type)
    return file_part(checkpoint, folder, "unet")


def _module_part(name: str, module: Any) -> Part:
    config: Any = getattr(module, "config", None)
    data = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{name}: {type(module).__name__!r} has no configuration", field=name)
    kind = type(module).__name__
    said = {**data, "architectures": [kind]} if name == "text_encoder" else {"_class_name": kind, **data}
    return Part(said, f"{name} ({kind})", lambda config, names: StateDict(name, module.state_dict()))
