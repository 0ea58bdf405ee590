"""Models' folders to read, and what reading them must give."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastldm.errors import FileError
from fastldm.weights.files import TensorFiles, open_model

STEM = "diffusion_pytorch_model"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv_in.weight": torch.randn(4, 2, 3, 3, generator=generator),
        "conv_in.bias": torch.randn(4, generator=generator).half(),
        "mid.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "mid.flag": torch.tensor([True, False]),
        "scale": torch.tensor(2.5),
    }


def shard(folder: Path, names: list[str], index: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes `tensors` over the files `names` with an index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if place[key] == name}, folder / name)
    content = {"metadata": {"total_size": 1}, "weight_map": place}
    (folder / index).write_text(json.dumps(content))
    return content


def write_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{STEM}.safetensors.index.json").write_text(text)


def refused(root: Path, match: str, field: str | None = None) -> None:
    """Opening the U-Net's weights fails with the file or folder named."""
    with pytest.raises(FileError, match=match) as caught, open_model(root).tensors("unet"):
        pass
    assert str(root.resolve()) in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.field == field


def equal(tensors: TensorFiles, expected: dict[str, torch.Tensor]) -> None:
    assert tensors.infos.keys() == expected.keys()
    for name, value in expected.items():
        found = tensors.read(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert (found.dtype, found.shape) == (tensors.infos[name].dtype, tensors.infos[name].shape)
        assert torch.equal(found, value)


def link(at: Path, target: Path | str) -> None:
    if at.is_symlink() or at.exists():
        at.unlink()
    at.symlink_to(target)


class Gadget:
    """Unpickling makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)
