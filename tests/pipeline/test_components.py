"""model_index.json names only what we have, each component by a class that we have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fastldm


@pytest.mark.parametrize(
    ("component", "classes"),
    [
        ("unet", ["diffusers", "UNet3DConditionModel"]),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"]),
        ("text_encoder", ["subprocess", "Popen"]),
        ("tokenizer", ["transformers", "T5Tokenizer"]),
        ("scheduler", ["diffusers", "CosineDPMSolverMultistepScheduler"]),
        ("unet", []),
        ("unet", [["x"]]),
    ],
)
def test_another_class_is_refused_by_name(folder: Path, tmp_path: Path, component: str, classes: list[object]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, component: classes}))
    with pytest.raises(fastldm.Error) as error:
        fastldm.Pipeline(copy)
    assert error.value.field == component
