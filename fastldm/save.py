"""A pipeline in memory as a folder in diffusers' layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastldm.asked import is_path
from fastldm.convert import Model, Network, write_folder
from fastldm.errors import ArgumentError, FileError, brief
from fastldm.prompt import Tokenizer
from fastldm.runtime.build import RUN, Held, hub_json
from fastldm.runtime.engine import Engine
from fastldm.sampling import SchedulerConfig
from fastldm.tokenizer_files import written
from fastldm.weights.families import SD1, TASKS

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(rf"(\d{{1,12}}(?:\.\d{{1,9}})?)\s?({'|'.join(_UNITS)})", re.IGNORECASE | re.ASCII)
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_CONVOLVED = re.compile(r".*\.attentions\.\d+\.proj_(in|out)\.weight")


def save(
    engine: Engine,
    tokenizer: Tokenizer,
    scheduler: SchedulerConfig,
    save_directory: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: bool = False,
) -> Path:
    """Writes what runs: each network in its dtype, the scheduler as it is set. Returns the folder.

    save_directory: a new or an empty folder, there in the end as a whole or not at all. variant: "fp16" writes
    `*.fp16.safetensors`. max_shard_size: "10GB" or bytes; refused where a network is larger, as each is one file.
    Raises `ArgumentError` naming the argument, `FileError` for a disk that is full or cannot be written to.
    """
    for name, value, usual in (
        ("safe_serialization", safe_serialization, True),
        ("push_to_hub", push_to_hub, False),
    ):
        if value is not usual:
            reason = "no pickles are written" if usual else "save, then upload the folder with huggingface_hub"
            raise ArgumentError(f"{name} = {brief(value)}: {reason}", field=name)
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise ArgumentError(f"variant = {brief(variant)}: must be a plain word such as 'fp16'", field="variant")
    out = _new_folder(save_directory)
    engine.check_process()
    model = _model(engine, tokenizer, scheduler)
    _check_shards(model, max_shard_size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(model, out, None, lambda done, total: None, variant=variant)
    except FileError as error:
        raise FileError(str(error), field="save_directory") from error
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}", field="save_directory") from error
    return out


def _new_folder(path: object) -> Path:
    if not is_path(path) or not os.fspath(path) or "\0" in os.fspath(path):
        raise ArgumentError(f"save_directory = {brief(path)}: must be the path of a folder", field="save_directory")
    out = Path(os.path.expanduser(path)).absolute()
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        reason = "exists, and is no empty folder: move it away, or choose another name"
        raise ArgumentError(f"save_directory: {out} {reason}", field="save_directory")
    return out


def _model(engine: Engine, tokenizer: Tokenizer, scheduler: SchedulerConfig) -> Model:
    unet = engine.unet.config
    task = TASKS[{0: 0, unet.out_channels: 4}.get(unet.in_channels - unet.out_channels, 5)]
    return Model(
        pipeline=SD1.classes[task],
        settings={},
        networks={name: _network(name, getattr(engine, name)) for name in RUN},
        scheduler=scheduler.config,
        tokenizers={"text_encoder": lambda config: written(tokenizer)},
    )


def _network(component: str, network: Any) -> Network:
    held, json = Held(component, network), dict(hub_json(network))
    if component == "unet" and json.get("use_linear_projection") is not True:
        shapes = {name: (*info.shape, 1, 1) for name, info in held.infos.items() if _CONVOLVED.fullmatch(name)}
        held.infos |= {name: replace(held.infos[name], shape=shape) for name, shape in shapes.items()}
    word = str(next(network.parameters()).dtype).removeprefix("torch.")
    json |= {key: word for key in ("dtype", "torch_dtype") if key in json}  # transformers would load in that one
    return Network(component, json, network.config, held, {name: name for name in held.infos})


def _check_shards(model: Model, limit: object) -> None:
    if limit is None:
        return
    largest = max(_bytes(network) for network in model.networks.values())
    found = _SIZE.fullmatch(limit) if isinstance(limit, str) else None
    size = float(found[1]) * _UNITS[found[2].upper()] if found else limit
    if isinstance(size, bool) or not isinstance(size, int | float) or not size > 0:  # NaN is not
        reason = "must be a number of bytes, or a text such as '10GB'"
        raise ArgumentError(f"max_shard_size = {brief(limit)}: {reason}", field="max_shard_size")
    if size < largest:
        reason = f"each network is written as one file, and the largest has {largest} bytes"
        raise ArgumentError(f"max_shard_size = {brief(limit)}: {reason}", field="max_shard_size")


def _bytes(network: Network) -> int:
    infos: Mapping[str, Any] = network.tensors.infos
    return sum(info.nbytes for info in infos.values())
