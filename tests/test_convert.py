"""Between folder and single file: every bit kept, diffusers reads the result, the whole is there or nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastldm
from fastldm.assemble import Asked
from fastldm.convert import convert
from fastldm.weights import write
from tests import oracle
from tests.single import disk, models
from tests.single.models import (
    ANOTHER,
    CAT,
    DEEP,
    KINDS,
    Kind,
    Sample,
    as_ckpt,
    assert_same,
    converted,
    image,
    painted,
    randomised,
    rewritten,
    theirs,
    weights,
)
from tests.single.test_tokenizer_sources import bare, old_layout

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return models.sample(KINDS["sd1"], tmp_path_factory.mktemp("convert"))


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return models.sample(KINDS["sd2"], tmp_path_factory.mktemp("convert"))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by component and by the name that transformers 5 gives them."""
    found = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name} {name.removeprefix('text_model.')}"] = tensor
    return found


def states(folder: Path) -> dict[str, str]:
    """The checksum of each file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", ["sd1", "sd2", "uneven", "inpainting"])
def test_folder_file_folder(tmp_path: Path, kind: str) -> None:
    kinds = {**KINDS, "uneven": Kind(oracle.UNEVEN, "open_clip")}
    made = models.sample(kinds[kind], tmp_path)
    back = converted(made.file, tmp_path / "back", config=made.folder)
    assert_same(tensors(back), tensors(made.folder))
    for name in ("unet", "vae", "text_encoder"):
        assert json.loads((back / name / "config.json").read_text()) == json.loads(
            (made.folder / name / "config.json").read_text()
        )
    scheduler = "scheduler/scheduler_config.json"
    assert json.loads((back / scheduler).read_text()) == json.loads((made.folder / scheduler).read_text())
    index, before = (json.loads((f / "model_index.json").read_text()) for f in (back, made.folder))
    assert {key: index[key] for key in index if key != "_diffusers_version"}.items() <= before.items()
    if kind != "inpainting":
        assert torch.equal(image(fastldm.Pipeline(back)), painted(made))


def test_file_folder_file(made: Sample, tmp_path: Path) -> None:
    folder = converted(made.file, tmp_path / "folder", config=made.folder)
    again = converted(folder, tmp_path / "again.safetensors")
    assert again.read_bytes() == made.file.read_bytes()


def test_ckpt_to_safetensors(made: Sample, tmp_path: Path) -> None:
    """The most wanted one: a pickle into a file that is safe, of the same bytes as any other way there."""
    out = converted(as_ckpt(made.file, tmp_path / "model.ckpt"), tmp_path / "safe.safetensors", config=made.folder)
    assert out.read_bytes() == made.file.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", ["folder", "model.safetensors"])
def test_every_dtype(made: Sample, tmp_path: Path, dtype: str, out: str) -> None:
    path = converted(made.folder, tmp_path / out, dtype=dtype)
    found, before = (load_file(path), load_file(made.file)) if path.is_file() else (tensors(path), tensors(made.folder))
    assert_same(found, {name: tensor.to(DTYPES[dtype]) for name, tensor in before.items()})


def test_wider_again_is_exact(made: Sample, tmp_path: Path) -> None:
    half = converted(made.folder, tmp_path / "half", dtype="bf16")
    wide = converted(half, tmp_path / "wide", dtype="fp32")
    assert_same(tensors(wide), {name: tensor.bfloat16().float() for name, tensor in tensors(made.folder).items()})


def test_mixed_dtypes_stay_as_they_are(made: Sample, tmp_path: Path) -> None:
    """Halves where the file has halves, and thirds of one tensor in the wider of their dtypes."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    found = load_file(converted(folder, tmp_path / "mixed.safetensors"))
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float16 if name.startswith("first_stage_model.") else torch.float32), name


def test_thirds_of_different_dtypes_lose_nothing(open_clip: Sample, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(open_clip.folder, tmp_path / "model"))
    path = folder / "text_encoder/model.safetensors"
    text = load_file(path)
    query = next(name for name in text if name.endswith("layers.0.self_attn.q_proj.weight"))
    text[query] = text[query].half()
    save_file(text, path)
    back = converted(converted(folder, tmp_path / "a.safetensors"), tmp_path / "back", config=folder)
    found = tensors(back)
    for name, tensor in tensors(folder).items():
        assert torch.equal(found[name].double(), tensor.double()), name


def test_a_sharded_folder(made: Sample, tmp_path: Path) -> None:
    made.ref.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert (tmp_path / "model/unet/diffusion_pytorch_model.safetensors.index.json").exists()
    out = converted(tmp_path / "model", tmp_path / "out.safetensors")
    assert out.read_bytes() == made.file.read_bytes()


def test_a_variant(made: Sample, tmp_path: Path) -> None:
    made.ref.save_pretrained(tmp_path / "model", variant="fp16")
    out = converted(tmp_path / "model", tmp_path / "out.safetensors", variant="fp16")
    assert out.read_bytes() == made.file.read_bytes()


def test_pickled_weights_in_a_folder(made: Sample, tmp_path: Path) -> None:
    made.ref.save_pretrained(tmp_path / "model", safe_serialization=False)
    for name, stem in STEMS.items():  # transformers 5 writes no pickles
        for path in (tmp_path / "model" / name).glob("*.safetensors"):
            torch.save(load_file(path), path.with_name(f"{stem.replace('model', 'pytorch_model')}.bin"))
            path.unlink()
    assert list((tmp_path / "model").rglob("*.bin"))
    out = converted(tmp_path / "model", tmp_path / "out.safetensors")
    assert out.read_bytes() == made.file.read_bytes()


@pytest.mark.parametrize("spelling", ["text_model.", ""])
def test_both_spellings_of_transformers_are_read_and_the_old_one_written(
    made: Sample, tmp_path: Path, spelling: str
) -> None:
    """transformers before 5.6 looks for names with "text_model."; later ones read these, too."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "text_encoder/model.safetensors"
    text = {spelling + name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file(text, path, metadata={"format": "pt"})
    written = load_file(converted(folder, tmp_path / "out") / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in written)
    assert_same(tensors(tmp_path / "out"), tensors(made.folder))


def test_old_names_of_the_autoencoder(made: Sample, tmp_path: Path) -> None:
    """diffusers before 0.17: query, key, value and proj_attn."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = {}
    for name, tensor in load_file(path).items():
        for new, other in old.items():
            name = name.replace(new, other)
        vae[name] = tensor
    save_file(vae, path)
    assert converted(folder, tmp_path / "out.safetensors").read_bytes() == made.file.read_bytes()
    assert_same(tensors(converted(folder, tmp_path / "out")), tensors(made.folder))


# ------------------------------------------------------------------------------------------------ what diffusers makes


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_paints_the_same_from_the_folder(made: Sample, open_clip: Sample, tmp_path: Path, kind: str) -> None:
    source = {"sd1": made, "sd2": open_clip}[kind]
    out = converted(source.file, tmp_path / "out", config=source.folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert_same(weights(pipe), weights(source.ref))
    assert torch.equal(image(pipe), image(source.ref))


@pytest.mark.parametrize("way", ["a folder in the old layout", "a folder in the new layout", "endless"])
def test_diffusers_reads_the_tokenizer_that_we_wrote(open_clip: Sample, tmp_path: Path, way: str) -> None:
    """With the zeros of OpenCLIP, which CLIP's own files do not say."""
    tokenizer = Path(shutil.copytree(open_clip.folder / "tokenizer", tmp_path / "tokenizer"))
    if way == "a folder in the old layout":
        tokenizer = old_layout(tokenizer, tmp_path / "old")
    if way == "endless":  # as transformers writes where there is no length
        settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": int(1e30)}))
    asked = {"config": bare(open_clip, tmp_path), "tokenizer": tokenizer}
    out = converted(open_clip.file, tmp_path / "out", **asked)
    found = transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")
    ids = found([CAT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids[0, -1] == 0
    assert torch.equal(ids, fastldm.Pipeline(out)._tokenizer([CAT]))
    assert torch.equal(ids, fastldm.Pipeline(open_clip.file, **asked)._tokenizer([CAT]))


def test_a_tokenizer_without_settings_gets_some(made: Sample, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    (folder / "tokenizer/tokenizer_config.json").unlink()
    out = converted(folder, tmp_path / "out")
    found = transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")
    ids = found([CAT], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, fastldm.Pipeline(folder)._tokenizer([CAT]))


def test_a_text_encoder_that_does_not_name_its_class(made: Sample, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    out = converted(folder, tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["text_encoder"] == ["transformers", "CLIPTextModel"]


# --------------------------------------------------------------------------------------------------------------- SDXL


def xl(folder: Path) -> Any:
    """A tiny SDXL: two text encoders, the sizes as numbers, transformers of several blocks."""
    torch.manual_seed(3)
    width, projection, size = 24, 20, len(oracle.tokenizer())
    second = transformers.CLIPTextConfig(
        **{
            **oracle.text_encoder(32).config.to_dict(),
            "hidden_act": "gelu",
            "projection_dim": projection,
            "eos_token_id": size - 1,
        }
    )
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=width + 32,
        sample_size=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + projection,
        **DEEP,
    )
    ref = diffusers.StableDiffusionXLPipeline(
        vae=oracle.autoencoder(),
        text_encoder=oracle.text_encoder(width),
        text_encoder_2=transformers.CLIPTextModelWithProjection(second),
        tokenizer=oracle.tokenizer(),
        tokenizer_2=oracle.tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**oracle.SD_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    oracle.saved(randomised(ref), folder)
    return ref


def xl_weights(pipe: Any) -> dict[str, Tensor]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {f"{name} {key}": tensor for name in names for key, tensor in getattr(pipe, name).state_dict().items()}


def test_sdxl_folder_file_folder(tmp_path: Path) -> None:
    """diffusers reads the file and the folder to the weights that it had."""
    ref = xl(tmp_path / "model")
    file = converted(tmp_path / "model", tmp_path / "xl.safetensors")
    read = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(tmp_path / "model"), local_files_only=True, torch_dtype=torch.float32
    )
    assert_same(xl_weights(read), xl_weights(ref))
    back = converted(file, tmp_path / "back", config=tmp_path / "model")
    assert_same(tensors(back), tensors(tmp_path / "model"))
    assert_same(xl_weights(diffusers.StableDiffusionXLPipeline.from_pretrained(back)), xl_weights(ref))
    again = converted(tmp_path / "model", tmp_path / "again")
    assert json.loads((again / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False
    assert converted(again, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_the_refiner_has_one_text_encoder(tmp_path: Path) -> None:
    xl(tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    said = json.loads(index.read_text())
    said |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    said |= {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
    index.write_text(json.dumps(said))
    unet = tmp_path / "model/unet/config.json"
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "model" / name)
    assert json.loads(unet.read_text())["cross_attention_dim"] == 56
    file = converted(tmp_path / "model", tmp_path / "refiner.safetensors")
    with safe_open(file, "pt") as read:
        prefixes = {name.split(".")[0] for name in read.keys()}  # noqa: SIM118  it is no dictionary
        assert prefixes == {"conditioner", "first_stage_model", "model"}
        assert not any(name.startswith("conditioner.embedders.1.") for name in read.keys())  # noqa: SIM118
    back = converted(file, tmp_path / "back", config=tmp_path / "model")
    assert_same(tensors(back), tensors(tmp_path / "model"))
    written = json.loads((back / "model_index.json").read_text())
    assert written["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert written["requires_aesthetics_score"] is True
    assert written["force_zeros_for_empty_prompt"] is False
    assert written["text_encoder"] == [None, None]


# ------------------------------------------------------------------------------------- prediction types, other parts


@pytest.mark.parametrize("kind", ["sd1 v", "sd2", "sd2 epsilon"])
def test_the_prediction_type_is_kept(tmp_path: Path, kind: str) -> None:
    made = models.sample(KINDS[kind], tmp_path)
    assert ("v_pred" in load_file(made.file)) == (KINDS[kind].prediction_type == "v_prediction")


def test_a_prediction_type_that_a_file_cannot_say_is_refused(made: Sample, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(fastldm.Error, match="cannot say prediction_type = 'sample'"):
        converted(folder, tmp_path / "out.safetensors")
    assert_same(tensors(converted(folder, tmp_path / "out")), tensors(made.folder))


def test_the_prediction_type_that_is_asked_for(made: Sample, tmp_path: Path) -> None:
    out = converted(made.file, tmp_path / "out", prediction_type="v_prediction", config=made.folder)
    said = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert said["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("source", ["folder", "file"])
def test_parts_from_elsewhere(made: Sample, tmp_path: Path, source: str) -> None:
    other = models.sample(ANOTHER, tmp_path)
    asked = {"vae": other.folder / "vae", "text_encoder": other.folder}
    if source == "file":
        out = converted(made.file, tmp_path / "out", config=made.folder, **asked)
    else:
        out = converted(made.folder, tmp_path / "out", **asked)
    found, mine, theirs = tensors(out), tensors(made.folder), tensors(other.folder)
    assert_same(found, {name: (mine if name.startswith("unet") else theirs)[name] for name in mine})


def test_a_tokenizer_from_elsewhere(made: Sample, tmp_path: Path) -> None:
    old = old_layout(made.folder / "tokenizer", tmp_path / "old")
    out = converted(made.folder, tmp_path / "out", tokenizer=old)
    assert sorted(os.listdir(out / "tokenizer")) == ["merges.txt", "tokenizer_config.json", "vocab.json"]


# --------------------------------------------------------------------------------------------------- what is refused


def with_value(folder: Path, out: Path, value: float) -> Path:
    shutil.copytree(folder, out)
    path = out / "unet/diffusion_pytorch_model.safetensors"
    found = load_file(path)
    found["conv_out.bias"][1] = value
    save_file(found, path)
    return out


@pytest.mark.parametrize(
    ("value", "reason"), [(1e5, "reaches 100000, too large for torch.float16"), (float("nan"), "NaN")]
)
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_does_not_fit_is_refused_by_name(
    made: Sample, tmp_path: Path, value: float, reason: str, out: str
) -> None:
    folder = with_value(made.folder, tmp_path / "model", value)
    with pytest.raises(fastldm.Error, match=f"conv_out.bias .*{reason}") as caught:
        converted(folder, tmp_path / out, dtype="fp16")
    assert caught.value.field == "conv_out.bias"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["there", "there.safetensors"])
@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_what_exists_is_never_overwritten(made: Sample, tmp_path: Path, name: str, what: str) -> None:
    out = tmp_path / name
    {
        "file": lambda: out.write_text("mine"),
        "folder": out.mkdir,
        "dangling link": lambda: out.symlink_to(tmp_path / "nowhere"),
    }[what]()
    with pytest.raises(fastldm.Error, match=f"{name} exists: move it away") as caught:
        converted(made.folder, out)
    assert caught.value.field == "out"
    assert os.listdir(tmp_path) == [name]
    assert what != "file" or out.read_text() == "mine"


BAD_OUTS = {
    "no such folder": ("nowhere/out", "there is no folder"),
    "below a file": ("a file/out", "there is no folder"),
    "a pickle": ("out.ckpt", "pickles are not written"),
    "a pickle of the hub": ("pytorch_model.bin", "pickles are not written"),
}


@pytest.mark.parametrize(("out", "match"), BAD_OUTS.values(), ids=BAD_OUTS.keys())
def test_a_place_that_is_none(made: Sample, tmp_path: Path, out: str, match: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(fastldm.Error, match=match) as caught:
        converted(made.folder, tmp_path / out)
    assert caught.value.field == "out"
    assert os.listdir(tmp_path) == ["a file"]


@pytest.mark.parametrize("asked", [{"config": "x"}, {"original_config": "x"}, {"prediction_type": "epsilon"}])
def test_what_is_for_a_file_is_refused_for_a_folder(made: Sample, tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(fastldm.Error, match="is for a single file"):
        converted(made.folder, tmp_path / "out", **asked)


@pytest.mark.parametrize("asked", [{"variant": "fp16"}, {"prediction_type": "v"}])
def test_what_is_for_a_folder_is_refused_for_a_file(made: Sample, tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(fastldm.Error) as caught:
        converted(made.file, tmp_path / "out", config=made.folder, **asked)
    assert caught.value.field in asked
    assert not os.listdir(tmp_path)


def test_a_dtype_that_is_none(made: Sample, tmp_path: Path) -> None:
    with pytest.raises(fastldm.Error, match="dtype = 'int8': must be one of fp32, fp16, bf16"):
        converted(made.folder, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer", "model_index.json"])
def test_half_a_folder_is_not_converted(made: Sample, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(fastldm.Error, match=part.partition(".")[0]):
        converted(folder, tmp_path / "out")
    if part != "tokenizer":  # which a single file has no place for
        with pytest.raises(fastldm.Error, match=part.partition(".")[0]):
            converted(folder, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["model"]


def test_our_module_cannot_be_converted(made: Sample, tmp_path: Path) -> None:
    with pytest.raises(fastldm.Error, match="has no files to convert"):
        converted(made.folder, tmp_path / "out", vae=made.fast()._engine.vae)


# ------------------------------------------------------------------------------------------- all of it, or nothing


OUTS = ["out", "out.safetensors"]


@pytest.mark.parametrize("out", OUTS)
def test_progress_reaches_the_total(made: Sample, tmp_path: Path, out: str) -> None:
    seen: list[tuple[int, int]] = []
    path = convert(Asked(made.folder), tmp_path / out, progress=lambda done, total: seen.append((done, total)))
    dones = [done for done, _ in seen]
    assert dones == sorted(dones)
    assert len(seen) > 100
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors(made.folder).values())
    assert path == tmp_path / out


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_an_interrupt_leaves_nothing(made: Sample, tmp_path: Path, out: str, share: float) -> None:
    before = states(made.folder)

    def interrupt(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Asked(made.folder), tmp_path / out, progress=interrupt)
    assert not os.listdir(tmp_path)
    assert states(made.folder) == before


@pytest.mark.parametrize("out", OUTS)
def test_a_full_disk_leaves_nothing(made: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Whichever write it is that fails: the header, a tensor, the last JSON file."""
    with monkeypatch.context() as patch:
        counter = disk.with_room(patch, 1 << 30)
        converted(made.folder, tmp_path / out)
        writes = (1 << 30) - counter.room
    complete = tmp_path / out
    shutil.rmtree(complete) if complete.is_dir() else complete.unlink()
    assert writes > 100
    for nth in (*range(0, writes, max(writes // 8, 1)), *range(writes - 4, writes)):
        with monkeypatch.context() as patch:
            disk.with_room(patch, nth)
            with pytest.raises(fastldm.Error, match=f"{out}.*cannot be written: No space left") as caught:
                converted(made.folder, tmp_path / out)
        assert caught.value.field == "out"
        assert not os.listdir(tmp_path), nth


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_a_failing_system_call_leaves_nothing(
    made: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(fastldm.Error, match="cannot be written: Input/output error"):
        converted(made.folder, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_too_little_room_is_noticed_first(made: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for out in OUTS:
        with pytest.raises(fastldm.Error, match="bytes are needed, 1000 are free"):
            converted(made.folder, tmp_path / out)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("out", OUTS)
def test_a_read_only_place(made: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(write, "open", denied, raising=False)
    with pytest.raises(fastldm.Error, match=f"{out} cannot be written: Permission denied") as caught:
        converted(made.folder, tmp_path / out)
    assert caught.value.field == "out"
    assert not os.listdir(tmp_path)


def test_a_source_that_is_damaged_leaves_nothing(made: Sample, tmp_path: Path) -> None:
    file = rewritten(
        made.file, tmp_path / "model.safetensors", lambda found: found.pop("first_stage_model.quant_conv.bias")
    )
    with pytest.raises(fastldm.Error, match=r"quant_conv\.bias"):
        converted(file, tmp_path / "out", config=made.folder)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_source_is_only_read(made: Sample, tmp_path: Path) -> None:
    before, stat = states(made.folder.parent), made.file.stat().st_mtime_ns
    converted(made.file, tmp_path / "out", config=made.folder, dtype="fp16")
    assert states(made.folder.parent) == before
    assert made.file.stat().st_mtime_ns == stat


def test_one_beside_the_source(made: Sample, tmp_path: Path) -> None:
    """Into the model's own folder: what is there stays as it is."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    before = states(folder)
    converted(folder, folder / "single.safetensors")
    assert {k: v for k, v in states(folder).items() if k != "single.safetensors"} == before


def test_the_file_is_what_diffusers_reads(made: Sample) -> None:
    """The tests above compare with this file byte by byte."""
    assert_same(weights(theirs(made.file, made.folder)), weights(made.ref))


def test_another_schedule_is_warned_of(made: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is lost in a single file."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    with caplog.at_level(logging.WARNING, "fastldm"):
        converted(folder, tmp_path / "out.safetensors")
    assert "pass config= with its folder" in caplog.text
