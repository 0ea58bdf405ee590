"""A file alone: the family says what its shapes do not show, and a yaml beside it overrides the family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fastldm
from fastldm.surface import geometry
from tests.single.models import Sample, image, painted, rewritten, weights
from tests.single.narrow import UNET, WIDTH
from tests.single.narrow import narrow as make
from tests.single.test_tokenizer_sources import REVISION, cached

FOUR_HEADS: dict[str, Any] = {"params": {"num_heads": 4}}


def original(params: Mapping[str, Any] = {}, **unet: Any) -> str:
    """`v1-inference.yaml`, as far as it matters."""
    said = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.012,
                "timesteps": 1000,
                "scale_factor": 0.18215,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {"in_channels": 4, "context_dim": WIDTH, "num_heads": 8, **unet},
                },
                "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
                **params,
            },
        }
    }
    return yaml.safe_dump(said)


def alone(made: Sample, folder: Path, said: str | None = None) -> Path:
    """The file in a folder of its own, with a yaml beside it."""
    file = Path(shutil.copy(made.file, folder))
    if said is not None:
        file.with_suffix(".yaml").write_text(said)
    return file


def edited(made: Sample, out: Path, name: str, **changes: Any) -> Path:
    """The model's folder with other values in one of its JSON files."""
    shutil.copytree(made.folder, out)
    (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **changes}))
    return out


def test_a_file_of_a_known_family_needs_no_configuration(narrow: Sample, tmp_path: Path) -> None:
    pipe = fastldm.Pipeline(alone(narrow, tmp_path), tokenizer=narrow.folder)
    folder = fastldm.Pipeline(narrow.folder)
    assert weights(pipe).keys() == weights(narrow.ref).keys()
    assert pipe.scheduler.config["_class_name"] == "PNDMScheduler"
    assert torch.equal(image(pipe), image(folder))
    assert geometry(pipe._engine, pipe._tokenizer) == geometry(folder._engine, folder._tokenizer)


def test_heads_in_a_yaml_beside_the_file(narrow: Sample, tmp_path: Path) -> None:
    """No shape shows them: eight heads and four paint different images with the same weights."""
    file = alone(narrow, tmp_path, original(num_heads=4))
    found = image(fastldm.Pipeline(file, tokenizer=narrow.folder))
    four = edited(narrow, tmp_path / "four", "unet/config.json", attention_head_dim=4)
    assert torch.equal(found, image(fastldm.Pipeline(four)))
    assert not torch.allclose(found, painted(narrow))


def test_channels_of_a_head(narrow: Sample, tmp_path: Path) -> None:
    file = alone(narrow, tmp_path, original(num_heads=-1, num_head_channels=16))
    two = edited(narrow, tmp_path / "two", "unet/config.json", attention_head_dim=[2, 4])
    assert torch.equal(image(fastldm.Pipeline(file, tokenizer=narrow.folder)), image(fastldm.Pipeline(two)))


def test_original_config_is_one_from_elsewhere(narrow: Sample, tmp_path: Path) -> None:
    """It counts before the one beside the file."""
    file = alone(narrow, tmp_path, original(num_heads=2))
    (tmp_path / "other.yaml").write_text(original(num_heads=4))
    pipe = fastldm.Pipeline(file, tokenizer=narrow.folder, original_config=tmp_path / "other.yaml")
    four = edited(narrow, tmp_path / "four", "unet/config.json", attention_head_dim=4)
    assert torch.equal(image(pipe), image(fastldm.Pipeline(four)))


def test_the_scale_of_the_latents(narrow: Sample, tmp_path: Path) -> None:
    file = alone(narrow, tmp_path, original({"scale_factor": 0.13025}))
    other = edited(narrow, tmp_path / "other", "vae/config.json", scaling_factor=0.13025)
    assert torch.equal(image(fastldm.Pipeline(file, tokenizer=narrow.folder)), image(fastldm.Pipeline(other)))


SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v": ({"parameterization": "v"}, {"prediction_type": "v_prediction"}),
    "betas": ({"linear_end": 0.02}, {"beta_end": 0.02}),
}


@pytest.mark.parametrize(("said", "expected"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_schedule(narrow: Sample, tmp_path: Path, said: dict[str, Any], expected: dict[str, Any]) -> None:
    file = alone(narrow, tmp_path, original(said))
    other = edited(narrow, tmp_path / "other", "scheduler/scheduler_config.json", **expected)
    found = image(fastldm.Pipeline(file, tokenizer=narrow.folder))
    assert torch.equal(found, image(fastldm.Pipeline(other)))
    assert not torch.equal(found, painted(narrow))


def test_what_is_asked_for_comes_before_the_yaml(narrow: Sample, tmp_path: Path) -> None:
    file = alone(narrow, tmp_path, original({"parameterization": "v"}))
    pipe = fastldm.Pipeline(file, tokenizer=narrow.folder, prediction_type="epsilon")
    assert torch.equal(image(pipe), painted(narrow))


def test_a_yaml_that_contradicts_the_tensors_is_refused(narrow: Sample, tmp_path: Path) -> None:
    file = alone(narrow, tmp_path, original(in_channels=9))
    with pytest.raises(fastldm.Error, match=r"model\.yaml: in_channels = 9: the tensors say 4"):
        fastldm.Pipeline(file, tokenizer=narrow.folder)


@pytest.mark.parametrize(
    "said", ["", "[1, 2]", "model: {params: !!python/object/apply:os.getcwd []}", "a: &x 1\nb: *x"]
)
def test_a_yaml_that_is_none_is_refused(narrow: Sample, tmp_path: Path, said: str) -> None:
    with pytest.raises(fastldm.Error, match=r"model\.yaml"):
        fastldm.Pipeline(alone(narrow, tmp_path, said), tokenizer=narrow.folder)


def test_a_yaml_that_is_missing_is_named(narrow: Sample, tmp_path: Path) -> None:
    with pytest.raises(fastldm.Error, match=r"none\.yaml is missing"):
        fastldm.Pipeline(narrow.file, tokenizer=narrow.folder, original_config=tmp_path / "none.yaml")


def test_config_and_original_config_exclude_each_other(narrow: Sample, tmp_path: Path) -> None:
    with pytest.raises(fastldm.Error, match="pass one of them") as caught:
        fastldm.Pipeline(narrow.file, config=narrow.folder, original_config=tmp_path / "a.yaml")
    assert caught.value.field == "original_config"


def test_an_empty_tensor_says_v(narrow: Sample, tmp_path: Path) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        tensors["v_pred"] = torch.empty(0)

    file = rewritten(narrow.file, tmp_path / "v.safetensors", mark)
    pipe = fastldm.Pipeline(file, tokenizer=narrow.folder)
    v = edited(narrow, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert torch.equal(image(pipe), image(fastldm.Pipeline(v)))


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_every_tensor_has_its_place(narrow: Sample, tmp_path: Path, change: str) -> None:
    name = "model.diffusion_model.out.2.bias"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        value = tensors.pop(name) if change == "missing" else tensors[name].clone()
        if change == "left over":
            tensors[f"{name}.more"] = value

    file = rewritten(narrow.file, tmp_path / "damaged.safetensors", damage)
    with pytest.raises(fastldm.Error, match=r"damaged\.safetensors: .*out\.2\.bias"):
        fastldm.Pipeline(file, tokenizer=narrow.folder)


def test_a_width_of_no_known_family_asks_for_config(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match=r"pass config= with a folder in diffusers' layout") as caught:
        fastldm.Pipeline(sample().file)
    assert caught.value.field == "config"


def test_converting_a_model_with_other_heads_says_that_the_file_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, **{**UNET, "attention_head_dim": 4})
    assert ["pass config=" in record.getMessage() for record in caplog.records] == [True]


def test_converting_one_of_a_known_family_says_nothing(tmp_path: Path, no_warnings: None) -> None:
    make(tmp_path)


@pytest.mark.parametrize("form", ["blob/main", f"resolve/{REVISION}"])
def test_a_file_by_its_address_on_the_hub(narrow: Sample, tmp_path: Path, form: str) -> None:
    """Out of the hub's cache, as everything of the hub."""
    (tmp_path / "files").mkdir()
    shutil.copy(narrow.file, tmp_path / "files")
    hub = cached(tmp_path / "files", tmp_path / "hub", "models--some-one--some.model")
    options = {"cache_dir": hub, "local_files_only": True, "tokenizer": narrow.folder}
    address = f"https://huggingface.co/some-one/some.model/{form}/model.safetensors"
    assert torch.equal(image(fastldm.Pipeline(address, **options)), painted(narrow))
    assert fastldm.Pipeline.from_single_file(address, **options)
    with pytest.raises(fastldm.Error, match=r"other\.safetensors is not in the hub's cache.*download it, and"):
        fastldm.Pipeline(address.replace("model.safe", "other.safe"), **options)


def test_a_text_encoder_out_of_a_file(narrow: Sample, tmp_path: Path) -> None:
    """Of a whole checkpoint, and of files that hold it alone, under each of the names that it has."""
    tensors = load_file(narrow.file)
    prefix = "cond_stage_model.transformer."
    bare = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    other = {k.removeprefix("text_model."): v for k, v in bare.items()}
    expected = painted(narrow)
    without = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    save_file(without, tmp_path / "without.safetensors")
    for i, content in enumerate((tensors, bare, other, {"transformer." + k: v for k, v in bare.items()})):
        save_file(content, tmp_path / f"{i}.safetensors")
        pipe = fastldm.Pipeline(
            tmp_path / "without.safetensors",
            text_encoder=tmp_path / f"{i}.safetensors",
            tokenizer=narrow.folder,
        )
        assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize(("word", "expected"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("other", "epsilon")])
def test_the_metadata_says_what_is_predicted(narrow: Sample, tmp_path: Path, word: str, expected: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file(load_file(narrow.file), file, metadata={"modelspec.prediction_type": word})
    assert fastldm.Pipeline(file, tokenizer=narrow.folder).scheduler.prediction_type == expected


def test_config_needs_no_yaml(narrow: Sample, tmp_path: Path) -> None:
    file = alone(narrow, tmp_path, "what: else")
    assert torch.equal(image(fastldm.Pipeline(file, config=narrow.folder)), painted(narrow))
    with pytest.raises(fastldm.Error, match=r"model\.yaml"):
        fastldm.Pipeline(file, tokenizer=narrow.folder)
