"""What a model's file or folder is, without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from fastldm.assemble import Asked, file_part, folder_part, open_checkpoint, open_folder
from fastldm.errors import Error, FileError
from fastldm.runtime.build import NETWORKS, check_index, opened, planned
from fastldm.weights.files import open_file
from fastldm.weights.load import Tensors
from fastldm.weights.single import Part

DIMENSIONS = {
    "unet": ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "sample_size"),
    "vae": ("latent_channels", "block_out_channels", "scaling_factor"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
    "text_encoder_2": ("hidden_size", "num_hidden_layers", "vocab_size"),
}


def info(asked: Asked) -> dict[str, Any]:
    """Family, task, dimensions, dtypes, parameters, prediction type, and what is missing; plain values, fit for JSON.

    A readable file that is no Stable Diffusion is described by its "kind"; what is wrong with a model stands under
    "problems". Raises `FileError` for what is damaged, or no file of tensors at all.
    """
    with ExitStack() as files:
        return _of_file(asked, files) if asked.is_file else _of_folder(asked, files)


def _of_file(asked: Asked, files: ExitStack) -> dict[str, Any]:
    tensors = files.enter_context(open_file(asked.file()))
    said = {"path": tensors.where, "layout": "original", "kind": None, **_counted(tensors)}
    folder = None if asked.config is None else asked.folder(asked.config)
    try:
        checkpoint = open_checkpoint(asked, files, folder)
    except FileError as error:
        if error.field != "model":
            raise
        return said | {"layout": None, "kind": str(error).removeprefix(f"{tensors.where}: ").removeprefix("is ")}
    wanted = ("unet", "vae", *checkpoint.family.texts)
    parts = {name: file_part(checkpoint, folder, name) for name in wanted if name in checkpoint.found.sections}
    return said | {
        "family": checkpoint.family.name,
        "task": checkpoint.found.task,
        "pipeline": checkpoint.family.classes.get(checkpoint.found.task),
        "runs": checkpoint.family.runs,
        "prediction_type": checkpoint.prediction_type,
        "averaged_weights": checkpoint.has_ema,
        "missing": [*(name for name in wanted if name not in parts), "tokenizer"],
        **_described(parts),
    }


def _of_folder(asked: Asked, files: ExitStack) -> dict[str, Any]:
    folder = open_folder(asked)
    pipeline = check_index(folder, xl=True)
    xl = "XL" in pipeline
    wanted = tuple(NETWORKS) if xl else ("unet", "vae", "text_encoder")
    parts = {name: folder_part(folder, name, files) for name in wanted if folder.has(f"{name}/config.json")}
    others = ("tokenizer", "scheduler")
    scheduler = "scheduler/scheduler_config.json"
    said = {
        "path": str(folder.root),
        "layout": "diffusers",
        "kind": None,
        "pipeline": pipeline,
        "runs": not xl,
        "prediction_type": folder.read_json(scheduler).get("prediction_type") if folder.has(scheduler) else None,
        "missing": [
            *(name for name in wanted if name not in parts),
            *(name for name in others if not folder.has(name)),
        ],
    }
    return said | _described(parts)


def _described(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Of each component: its dimensions and parameters, and the error that reading it would raise."""
    components: dict[str, Any] = {}
    problems: list[str] = []
    for name, part in parts.items():
        said = {key: part.json[key] for key in DIMENSIONS[name] if part.json.get(key) is not None}
        try:
            network = planned(name, part)
            said["parameters"] = sum(parameter.numel() for parameter in network.parameters())
            tensors = opened(network, part)
            said["dtypes"] = _dtypes(tensors) if tensors is not None else {}
        except Error as error:
            problems.append(str(error))
        components[name] = said
    return {"components": components, "problems": problems}


def _counted(tensors: Tensors) -> dict[str, Any]:
    infos = tensors.infos.values()
    return {
        "tensors": len(tensors.infos),
        "parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": _dtypes(tensors),
    }


def _dtypes(tensors: Tensors) -> dict[str, int]:
    """{dtype: how many tensors}, the most frequent first."""
    return dict(Counter(str(info.dtype).removeprefix("torch.") for info in tensors.infos.values()).most_common())
