"""Models between their two layouts: a folder as diffusers has it, and a single file as the originals are."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.asked import FILE_SUFFIXES, Asked
from fastldm.assemble import (
    SCHEDULER,
    file_part,
    file_scheduler,
    file_tokenizer,
    folder_part,
    folder_tokenizer,
    given,
    open_folder,
    open_single,
    told,
)
from fastldm.errors import ArgumentError, Error, FileError, brief
from fastldm.prompt import MAX_VOCABULARY, tokenizer_json
from fastldm.runtime.build import RUN, XL_PIPELINES, check_index, check_together, opened, planned
from fastldm.sampling import scheduler_config
from fastldm.tokenizer_files import TOKENIZER_FILES, TokenizerAt, tokenizer_of
from fastldm.weights import ldm
from fastldm.weights.families import REFINER, SD1, SD2, SDXL, Family
from fastldm.weights.files import MAX_JSON, STEMS, inside
from fastldm.weights.header import TensorInfo
from fastldm.weights.keymap import present_name
from fastldm.weights.load import FLOATS, Tensors, check_finite
from fastldm.weights.single import Checkpoint
from fastldm.weights.write import partial_name, sync_folder, whole, write_safetensors

log = logging.getLogger("fastldm")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FILE_SUFFIX = FILE_SUFFIXES[0]
TRAINED = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
    "prediction_type",
)
SETTINGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")  # of SDXL's pipelines, in their index
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    SDXL.name: {"force_zeros_for_empty_prompt": True},
    REFINER.name: {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}
ABSENT = (None, [None, None])
Progress = Callable[[int, int], object]
"""progress(bytes written, bytes in all)"""


@dataclass(frozen=True)
class Network:
    """A network's configuration, and its tensors by the hub's present names. `names` are those that `tensors` has."""

    component: str
    json: Mapping[str, Any]
    config: Any
    tensors: Tensors
    names: Mapping[str, str]

    def info(self, name: str, dtype: torch.dtype | None) -> TensorInfo:
        found = self.tensors.infos[self.names[name]]
        wanted = dtype if dtype is not None and found.dtype in FLOATS else found.dtype
        return TensorInfo(name, wanted, self._shape(name))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Raises `WeightsError` for NaN, infinity, and what is too large for `dtype`."""
        source = self.tensors.read(self.names[name])
        tensor = source.to(dtype)
        check_finite(tensor, source, self.tensors.infos[self.names[name]].name, self.tensors.where)
        return tensor.view(self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        """An autoencoder's attention is of linear layers now; older files have 1×1 convolutions."""
        shape = tuple(self.tensors.infos[self.names[name]].shape)
        return shape[:2] if self.component == "vae" and ".attentions." in name else shape


@dataclass(frozen=True)
class Model:
    """A whole model that is not read yet. pipeline: the name of diffusers' class for it, settings: its own of XL's.

    tokenizers: by text encoder, from its configuration to {file name: content}.
    """

    pipeline: str
    settings: Mapping[str, Any]
    networks: Mapping[str, Network]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, Callable[[Any], Mapping[str, bytes]]]


def convert(asked: Asked, out: str | os.PathLike[str], *, dtype: str | None = None, progress: Progress) -> Path:
    """Writes the model to `out`: a single file if it ends in ".safetensors", else a new folder. Returns its path.

    dtype: "fp32", "fp16" or "bf16" for all weights; each as it is where None. The whole is there in the end, or
    nothing. Raises `ArgumentError` naming "out" if it exists, and what reading the model raises.
    """
    path = Path(os.path.expanduser(out))
    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"dtype = {brief(dtype)}: must be one of {', '.join(DTYPES)}", field="dtype")
    if path.name.lower().endswith(FILE_SUFFIXES[1:]):
        raise ArgumentError(f"{path}: pickles are not written: end it in {FILE_SUFFIX}, or name a folder", field="out")
    if os.path.lexists(path):
        raise ArgumentError(f"{path} exists: move it away, or choose another name", field="out")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {path.absolute().parent}", field="out")
    write = _write_file if path.name.lower().endswith(FILE_SUFFIX) else write_folder
    with ExitStack() as files:
        write(read_model(asked, files), path.absolute(), DTYPES.get(dtype or ""), progress)
    return path


def read_model(asked: Asked, files: ExitStack) -> Model:
    """Every name and shape is checked; no tensor is read. The files stay open until `files` is closed."""
    return _from_file(asked, files) if asked.is_file else _from_folder(asked, files)


def _from_file(asked: Asked, files: ExitStack) -> Model:
    folder = None if asked.config is None else asked.folder(asked.config, "config")
    checkpoint = told(asked, open_single(asked, files), folder)
    family = checkpoint.family
    parts = {
        name: file_part(checkpoint, folder, name)
        if getattr(asked, name, None) is None
        else given(name, asked, files, family)
        for name in ("unet", "vae", *family.texts)
    }
    scheduler, where = file_scheduler(checkpoint, folder, asked)
    scheduler_config(scheduler, where)
    return Model(
        pipeline=_pipeline_class(checkpoint),
        settings=_SETTINGS.get(family.name, {}),
        networks=_networks(parts),
        scheduler=scheduler,
        tokenizers={
            name: partial(_tokenizer_files, partial(file_tokenizer, asked, folder, checkpoint, name))
            for name in family.texts
        },
    )


def _pipeline_class(checkpoint: Checkpoint) -> str:
    task = checkpoint.found.task
    if task not in checkpoint.family.classes:
        reason = f"is {checkpoint.family.name} for {task}, for which diffusers has no pipeline"
        raise FileError(f"{checkpoint.where}: {reason}", field="model")
    return checkpoint.family.classes[task]


def _from_folder(asked: Asked, files: ExitStack) -> Model:
    folder = open_folder(asked)
    pipeline = check_index(folder, xl=True)
    index = folder.read_json("model_index.json")
    xl = pipeline in XL_PIPELINES
    first = ("text_encoder",) if not xl or index.get("text_encoder") not in ABSENT else ()
    texts = (*first, "text_encoder_2") if xl else first
    parts = {
        name: folder_part(folder, name, files)
        if getattr(asked, name, None) is None
        else given(name, asked, files, SDXL if xl else SD1)
        for name in ("unet", "vae", *texts)
    }
    scheduler = folder.read_json(SCHEDULER)
    scheduler_config(scheduler, SCHEDULER)
    return Model(
        pipeline=pipeline,
        settings={name: index[name] for name in SETTINGS if name in index},
        networks=_networks(parts),
        scheduler=scheduler,
        tokenizers={name: partial(_tokenizer_files, partial(folder_tokenizer, asked, folder, name)) for name in texts},
    )


def _networks(parts: Mapping[str, Any]) -> dict[str, Network]:
    found = {}
    for component, part in parts.items():
        model: nn.Module = planned(component, part)
        tensors = opened(model, part)
        if tensors is None:
            raise ArgumentError(f"{component}: a module has no files to convert", field=component)
        names = {present_name(name): name for name in tensors.infos}
        known = {hub: name for hub, name in names.items() if hub is not None}
        found[component] = Network(component, part.json, model.config, tensors, known)
    if set(found) == set(RUN):
        unet, vae, text = (found[name].config for name in RUN)
        check_together(unet, vae, text, [parts[name].where for name in RUN])
    return found


# ---------------------------------------------------------------------------------------------------- to a folder


def write_folder(
    model: Model, out: Path, dtype: torch.dtype | None, progress: Progress, *, variant: str | None = None
) -> None:
    """out: does not exist, or is an empty folder. variant: a word in the names of the weights' files."""
    ending = FILE_SUFFIX if variant is None else f".{variant}{FILE_SUFFIX}"
    # What is wrong with a tokenizer is noticed first.
    tokenizers = {name: files(model.networks[name].config) for name, files in model.tokenizers.items()}
    contents = {name: _hub_tensors(network, dtype) for name, network in model.networks.items()}
    total = sum(info.nbytes for infos in contents.values() for info in infos.values())
    _check_room(out, total)
    part = partial_name(out)
    step = _steps(total, progress)
    try:
        part.mkdir()
        for name, infos in contents.items():
            (part / name).mkdir()
            _write_json(part / name / "config.json", model.networks[name].json)
            read = partial(_read_hub, model.networks[name], infos)
            write_safetensors(part / name / f"{STEMS[name]}{ending}", infos, read, progress=step)
        for name, files in tokenizers.items():
            (part / tokenizer_of(name)).mkdir()
            for file, content in files.items():
                _write(part / tokenizer_of(name) / file, content)
        (part / "scheduler").mkdir()
        _write_json(part / SCHEDULER, model.scheduler)
        _write_json(part / "model_index.json", _index(model))
        os.rename(part, out)
        sync_folder(out.parent)
    except FileError as error:
        raise FileError(str(error).replace(str(part), str(out)), field=error.field) from None
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}", field="out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _hub_tensors(network: Network, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    return {_written_name(network.component, name): network.info(name, dtype) for name in network.names}


def _read_hub(network: Network, infos: Mapping[str, TensorInfo], name: str) -> Tensor:
    return network.read(infos[name].name, infos[name].dtype)


def _written_name(component: str, name: str) -> str:
    """Text encoders have the prefix that all versions of transformers read."""
    prefixed = component.startswith("text_encoder") and not name.startswith("text_projection.")
    return f"text_model.{name}" if prefixed else name


def _index(model: Model) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": "0.30.0"}
    xl = model.pipeline in XL_PIPELINES
    for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
        network = model.networks.get(name)
        found = network is not None
        index[name] = ["transformers", _text_class(network)] if network else [None, None]
        index[tokenizer_of(name)] = ["transformers", "CLIPTokenizer"] if found else [None, None]
    index |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", model.scheduler["_class_name"]],
    }
    if xl:
        return index | dict(model.settings)
    return index | {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def _text_class(network: Network) -> str:
    """The class in transformers, which older configurations do not name."""
    usual = "CLIPTextModel" if network.config.projection_dim is None else "CLIPTextModelWithProjection"
    return str(network.json.get("architectures", [usual])[0])


def _tokenizer_files(place: Callable[[], TokenizerAt], config: Any) -> dict[str, bytes]:
    """The files as they are, but the token that fills the window, where it is another."""
    at = place()
    at.made(config)
    files: dict[str, bytes] = {}
    settings = ("tokenizer_config.json", "special_tokens_map.json")
    for name in (*TOKENIZER_FILES, "merges.txt", "added_tokens.json", *settings):
        if not at.folder.has(inside(at.component, name)):
            continue
        files[name] = at.folder.read_bytes(inside(at.component, name), MAX_VOCABULARY)
        if at.pad is not None and name in settings:
            data = tokenizer_json(at.folder, inside(at.component, name), MAX_JSON)[1]
            files[name] = _json({**data, "pad_token": at.token(at.pad)})
    if settings[0] not in files:
        pad = {} if at.pad is None else {"pad_token": at.token(at.pad)}
        files[settings[0]] = _json({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **pad})
    return files


# ------------------------------------------------------------------------------------------------ to a single file


@dataclass(frozen=True)
class _Gathered:
    """A tensor of a single file: of one tensor of the hub, or of query, key and value in this order."""

    network: Network
    names: Sequence[str]
    place: ldm.Place

    def info(self, dtype: torch.dtype | None) -> TensorInfo:
        found = [self.network.info(name, dtype) for name in self.names]
        shape = tuple(self.place.there(torch.empty(found[0].shape, device="meta")).shape)
        exact = reduce(torch.promote_types, (info.dtype for info in found))
        return TensorInfo(self.place.name, exact, (shape[0] * len(found), *shape[1:]))

    def read(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.place.there(self.network.read(name, dtype)) for name in self.names])


def _write_file(model: Model, out: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    gathered = _original_tensors(model)
    infos = {name: tensor.info(dtype) for name, tensor in gathered.items()} | _markers(model)
    total = sum(info.nbytes for info in infos.values())
    _check_room(out, total)

    def read(name: str) -> Tensor:
        info = infos[name]
        return gathered[name].read(info.dtype) if name in gathered else torch.empty(info.shape)

    if not _says_all(_Written(str(out), infos, read), model):
        log.warning("%s: cannot say all of the model's configuration: pass config= with its folder to load it", out)
    write_safetensors(out, infos, read, progress=_steps(total, progress))


@dataclass(frozen=True)
class _Written:
    """The tensors of a file that is about to be written."""

    where: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]


def _says_all(written: Tensors, model: Model) -> bool:
    """Whether the file alone is read as the same networks, trained on the same noise to predict the same."""
    try:
        checkpoint = Checkpoint(written)
        found = {name: planned(name, checkpoint.part(name)).config for name in model.networks}
    except Error:
        return False
    same = all(_essence(found[name]) == _essence(network.config) for name, network in model.networks.items())
    trained = (scheduler_config(data, SCHEDULER) for data in (checkpoint.json("scheduler"), model.scheduler))
    schedules = [tuple(getattr(config, key) for key in TRAINED) for config in trained]
    return same and schedules[0] == schedules[1]


def _essence(config: Any) -> Any:
    """A configuration without what changes no weight's use: default sizes, the dtype of the decoder, a token's id."""
    unread = {"sample_size": 0, "force_upcast": False, "eos_token_id": 0}
    return replace(config, **{field.name: unread[field.name] for field in fields(config) if field.name in unread})


def _original_tensors(model: Model) -> dict[str, _Gathered]:
    family = _family(model)
    sections: dict[str, tuple[str, ldm.Places]] = {
        "unet": ("model.diffusion_model.", ldm.unet_places(model.networks["unet"].config)),
        "vae": ("first_stage_model.", ldm.vae_places(model.networks["vae"].config)),
    }
    for name, text in family.texts.items():
        clip = text.layout == "clip"
        layout = ldm.clip_places if clip else ldm.open_clip_places
        sections[name] = text.prefix + ("text_model." if clip else ""), layout(model.networks[name].config)
    thirds: dict[str, dict[int, tuple[Network, str, ldm.Place]]] = {}
    for component, (prefix, places) in sections.items():
        network = model.networks[component]
        for name in network.names:
            place = places(name)
            thirds.setdefault(prefix + place.name, {})[place.part or 0] = network, name, place
    gathered = {}
    for name, parts in thirds.items():
        ordered = [parts[i] for i in sorted(parts)]
        gathered[name] = _Gathered(ordered[0][0], [hub for _, hub, _ in ordered], ordered[0][2])
    return gathered


def _family(model: Model) -> Family:
    if "text_encoder_2" in model.networks:
        return SDXL if "text_encoder" in model.networks else REFINER
    return SD1 if model.networks["text_encoder"].config.act == "quick_gelu" else SD2


def _markers(model: Model) -> dict[str, TensorInfo]:
    """Empty tensors that say what a single file has no other place for. Raises `ArgumentError` for what none says."""
    if model.scheduler.get("prediction_type") == "sample":
        reason = "a single file cannot say prediction_type = 'sample': convert to a folder"
        raise ArgumentError(reason, field="out")
    said = {
        "v_pred": model.scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": bool(model.scheduler.get("rescale_betas_zero_snr")),
    }
    return {name: TensorInfo(name, torch.float32, (0,)) for name, holds in said.items() if holds}


# --------------------------------------------------------------------------------------------------------- both


def _check_room(out: Path, total: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise FileError(f"{out}: {total} bytes are needed, {free} are free in {out.parent}", field="out")


def _steps(total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return step


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write(path, _json(data))


def _write(path: Path, content: bytes) -> None:
    with whole(path) as file:
        file.write(content)
