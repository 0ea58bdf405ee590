"""What a model's file or folder is, from its names, shapes and configurations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from fastldm.asked import Asked
from fastldm.assemble import SCHEDULER, file_part, folder_part, open_folder, open_single, told
from fastldm.errors import Error
from fastldm.runtime.build import NETWORKS, check_index, opened, planned
from fastldm.tokenizer_files import has_tokenizer
from fastldm.weights.detect import OtherKind
from fastldm.weights.families import FAMILIES, TASKS
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
    tensors = open_single(asked, files)
    said: dict[str, Any] = {"path": tensors.where, "layout": "original", "kind": None, **_counted(tensors)}
    folder = None if asked.config is None else asked.folder(asked.config, "config")
    try:
        checkpoint = told(asked, tensors, folder)
    except OtherKind as error:
        return said | {"layout": None, "kind": error.kind.removeprefix("is ")}
    except Error as error:
        return said | {"problems": [str(error)]}
    wanted = ("unet", "vae", *checkpoint.family.texts)
    found = [name for name in wanted if name in checkpoint.found.sections]
    return said | {
        "family": checkpoint.family.name,
        "task": checkpoint.found.task,
        "pipeline": checkpoint.family.classes.get(checkpoint.found.task),
        "runs": checkpoint.family.runs,
        "prediction_type": checkpoint.prediction_type,
        "averaged_weights": checkpoint.has_ema,
        "missing": [*(name for name in wanted if name not in found), "tokenizer"],
        **_described(found, lambda name: file_part(checkpoint, folder, name)),
    }


def _of_folder(asked: Asked, files: ExitStack) -> dict[str, Any]:
    folder = open_folder(asked)
    pipeline = check_index(folder, xl=True)
    xl = "XL" in pipeline
    wanted = tuple(NETWORKS) if xl else ("unet", "vae", "text_encoder")
    found = [name for name in wanted if folder.has(f"{name}/config.json")]
    others = {"tokenizer": has_tokenizer(folder, "tokenizer"), "scheduler": folder.has(SCHEDULER)}
    described = _described(found, lambda name: folder_part(folder, name, files))
    unet = described["components"].get("unet", {})
    family = next((f for f in FAMILIES if f.context_dim == unet.get("cross_attention_dim")), None)
    said = {
        "path": str(folder.root),
        "layout": "diffusers",
        "kind": None,
        "pipeline": pipeline,
        "runs": not xl,
        "family": family.name if family else None,
        "task": TASKS.get(unet.get("in_channels", 0) - 4),
        "prediction_type": folder.read_json(SCHEDULER).get("prediction_type", "epsilon")
        if others["scheduler"]
        else None,
        "missing": [
            *(name for name in wanted if name not in found),
            *(name for name, there in others.items() if not there),
        ],
    }
    return said | described


def _described(names: Iterable[str], part_of: Callable[[str], Part]) -> dict[str, Any]:
    """Of each component: its dimensions and parameters, and the error that reading it would raise."""
    components: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        said: dict[str, Any] = {}
        try:
            part = part_of(name)
            said |= {key: part.json[key] for key in DIMENSIONS[name] if part.json.get(key) is not None}
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
