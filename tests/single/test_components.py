"""Half of the model is missing in the file, or given from elsewhere: as a path, a module of diffusers, one of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastldm
from tests import oracle
from tests.single.models import Sample, as_ckpt, assert_same, converted, image, painted, rewritten, weights
from tests.tasks.conftest import noise_picture

PREFIXES = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model.", "unet": "model.diffusion_model."}


def without(component: str, made: Sample, out: Path) -> Path:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(PREFIXES[component])]:
            del tensors[name]

    return rewritten(made.file, out, drop)


def only(prefix: str, made: Sample, out: Path, *, keep: bool) -> Path:
    """One section of the file; keep: its prefix."""
    tensors = {k: v for k, v in load_file(made.file).items() if k.startswith(prefix)}
    save_file({k if keep else k.removeprefix(prefix): v for k, v in tensors.items()}, out)
    return out


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
class TestMissing:
    def test_what_is_missing_is_named_with_what_to_pass(
        self, sample: Callable[..., Sample], tmp_path: Path, component: str
    ) -> None:
        file = without(component, sample(), tmp_path / "half.safetensors")
        with pytest.raises(fastldm.Error, match=f"pass {component}= with a folder") as caught:
            fastldm.Pipeline(file, config=sample().folder)
        assert caught.value.field == component
        assert "half.safetensors" in str(caught.value)

    @pytest.mark.parametrize("way", ["its folder", "the model's folder, as a string", "a module", "ours"])
    def test_it_is_taken_from_elsewhere(
        self, sample: Callable[..., Sample], tmp_path: Path, component: str, way: str
    ) -> None:
        made = sample()
        file = without(component, made, tmp_path / "half.safetensors")
        value = {
            "its folder": made.folder / component,
            "the model's folder, as a string": str(made.folder),
            "a module": getattr(made.ref, component),
            "ours": getattr(made.fast(), component),
        }[way]
        pipe = fastldm.Pipeline(file, config=made.folder, **{component: value})
        assert_same(weights(pipe), weights(made.ref))
        assert torch.equal(image(pipe), painted(made))

    def test_it_replaces_what_a_folder_and_a_file_have(self, sample: Callable[..., Sample], component: str) -> None:
        made, other = sample(), sample("another")
        value = getattr(other.ref, component)
        found = [made.fast(**{component: value}), fastldm.Pipeline(made.folder, **{component: value})]
        for pipe in found:
            mine = {k: v for k, v in weights(pipe).items() if k.startswith(component)}
            assert_same(mine, {k: v for k, v in weights(other.ref).items() if k.startswith(component)})
        assert torch.equal(image(found[0]), image(found[1]))
        assert not torch.equal(image(found[0]), painted(made))


def test_our_module_is_shared_and_not_copied(sample: Callable[..., Sample]) -> None:
    made = sample()
    first = made.fast()
    second = made.fast(vae=first.vae, text_encoder=first.text_encoder, unet=first.unet, tokenizer=first.tokenizer)
    for component in ("vae", "text_encoder", "unet"):
        assert getattr(second, component).network is getattr(first, component).network
    assert second.tokenizer.tokenizer.bpe is first.tokenizer.tokenizer.bpe
    assert torch.equal(image(second), image(first))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_shared_module_of_another_dtype_is_refused(sample: Callable[..., Sample], component: str) -> None:
    made = sample()
    shared = getattr(made.fast(), component)
    with pytest.raises(fastldm.Error, match="bfloat16 on cpu is needed") as caught:
        made.fast(torch_dtype=torch.bfloat16, **{component: shared})
    assert caught.value.field == "torch_dtype"


def test_a_module_of_another_library_is_copied_and_cast(sample: Callable[..., Sample]) -> None:
    made = sample()
    pipe = made.fast(torch_dtype=torch.bfloat16, vae=made.ref.vae)
    assert next(pipe._engine.vae.parameters()).dtype == torch.bfloat16
    assert next(made.ref.vae.parameters()).dtype == torch.float32


@pytest.mark.parametrize("said", [None, ["CLIPModel"]])
def test_a_text_encoder_is_what_its_class_says(sample: Callable[..., Sample], said: Any) -> None:
    """Loaded from openai/clip-vit-large-patch14, a CLIPTextModel's configuration names no class, or CLIPModel."""
    made = sample()
    module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**made.ref.text_encoder.config.to_dict()))
    module.load_state_dict(made.ref.text_encoder.state_dict())
    module.config.architectures = said
    assert torch.equal(image(made.fast(text_encoder=module)), painted(made))


def test_the_scheduler_is_a_name_or_one_of_diffusers(sample: Callable[..., Sample]) -> None:
    made = sample()
    theirs = diffusers.EulerDiscreteScheduler.from_config(made.ref.scheduler.config)
    for value in ("euler", theirs):
        expected = made.fast()
        expected.scheduler = value
        assert torch.equal(image(made.fast(scheduler=value)), image(expected))
        assert torch.equal(image(fastldm.Pipeline(made.folder, scheduler=value)), image(expected))
        assert not torch.equal(image(expected), painted(made))


# ------------------------------------------------------------------------------- an autoencoder in the original layout


@pytest.mark.parametrize("keep", [False, True], ids=["bare", "with its prefix"])
def test_the_autoencoder_of_a_file(narrow: Sample, tmp_path: Path, keep: bool) -> None:
    vae = only(PREFIXES["vae"], narrow, tmp_path / "vae.safetensors", keep=keep)
    file = without("vae", narrow, tmp_path / "half.safetensors")
    pipe = fastldm.Pipeline(file, tokenizer=narrow.folder, vae=vae)
    assert torch.equal(image(pipe), painted(narrow))


def test_the_autoencoder_of_a_whole_checkpoint(narrow: Sample, tmp_path: Path) -> None:
    file = without("vae", narrow, tmp_path / "half.safetensors")
    pipe = fastldm.Pipeline(file, tokenizer=narrow.folder, vae=str(narrow.file))
    assert torch.equal(image(pipe), painted(narrow))


def test_it_serves_a_folder_too(narrow: Sample) -> None:
    pipe = fastldm.Pipeline(narrow.folder, vae=narrow.file)
    assert torch.equal(image(pipe), painted(narrow))


# ---------------------------------------------------------------------------------- a U-Net in place of the model's own


@pytest.mark.parametrize("way", ["its folder", "the model's folder", "a module", "a compiled module", "ours"])
def test_a_unet_replaces_what_a_folder_and_a_file_have(sample: Callable[..., Sample], way: str) -> None:
    made, other = sample(), sample("another")
    value = {
        "its folder": other.folder / "unet",
        "the model's folder": str(other.folder),
        "a module": other.ref.unet,
        "a compiled module": torch.compile(other.ref.unet),
        "ours": other.fast().unet,
    }[way]
    found = [made.fast(unet=value), fastldm.Pipeline(made.folder, unet=value)]
    expected = {k: v for k, v in weights(other.ref).items() if k.startswith("unet")}
    for pipe in found:
        assert_same({k: v for k, v in weights(pipe).items() if k.startswith("unet")}, expected)
    assert torch.equal(image(found[0]), image(found[1]))
    assert not torch.equal(image(found[0]), painted(made))


@pytest.mark.parametrize("kind", ["bare", "with its prefix", "a whole checkpoint"])
def test_the_unet_of_a_file(narrow: Sample, tmp_path: Path, kind: str) -> None:
    unet = narrow.file
    if kind != "a whole checkpoint":
        unet = only(PREFIXES["unet"], narrow, tmp_path / "unet.safetensors", keep=kind != "bare")
    changed = Path(shutil.copytree(narrow.folder, tmp_path / "model"))
    path = changed / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(path).items()}, path)
    assert not torch.equal(image(fastldm.Pipeline(changed)), painted(narrow))
    assert torch.equal(image(fastldm.Pipeline(changed, unet=unet)), painted(narrow))


def test_the_unet_of_a_file_of_no_known_size(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """With the configuration of the folder that serves the model."""
    made, other = sample(), sample("another")
    unet = only(PREFIXES["unet"], other, tmp_path / "unet.safetensors", keep=False)
    assert torch.equal(image(made.fast(unet=unet)), image(made.fast(unet=other.ref.unet)))


def test_a_unet_that_does_not_fit_is_refused(sample: Callable[..., Sample]) -> None:
    unet = diffusers.UNet2DConditionModel(**{**sample().ref.unet.config, "cross_attention_dim": 32})
    with pytest.raises(fastldm.Error, match="cross_attention_dim = 32 must be 24"):
        sample().fast(unet=unet)


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(sample: Callable[..., Sample]) -> None:
    tokenizer = oracle.tokenizer()
    tokenizer.add_tokens(["<frog>"])
    config = sample().ref.text_encoder.config
    larger = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**config.to_dict(), "vocab_size": 521}))
    other = sample().fast(tokenizer=tokenizer, text_encoder=larger)
    with pytest.raises(fastldm.Error, match="has 521 tokens, and the text encoder 520") as caught:
        sample().fast(tokenizer=other.tokenizer)
    assert caught.value.field == "tokenizer"


# ------------------------------------------------------------------------------------------------------- no pickles


def pickled(made: Sample, out: Path, name: str) -> Path:
    """The model's folder with the U-Net as a pickle of that name."""
    folder = Path(shutil.copytree(made.folder, out))
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, folder / "unet" / name)
    return folder


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickles_in_a_folder_are_refused_where_that_is_asked_for(
    sample: Callable[..., Sample], tmp_path: Path, name: str
) -> None:
    made = sample()
    folder = pickled(made, tmp_path / "model", name)
    for pipe in (lambda **o: fastldm.Pipeline(folder, **o), lambda **o: made.fast(unet=folder, **o)):
        for value in (None, False):
            assert_same(weights(pipe(use_safetensors=value)), weights(made.ref))
        with pytest.raises(fastldm.Error, match=rf"unet/{name}: is a pickle") as caught:
            pipe(use_safetensors=True)
        assert caught.value.field == "use_safetensors"
    assert_same(weights(fastldm.Pipeline(made.folder, use_safetensors=True)), weights(made.ref))


def test_pickled_shards_are_refused_where_that_is_asked_for(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    made.ref.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert_same(weights(fastldm.Pipeline(tmp_path / "model", use_safetensors=True)), weights(made.ref))
    path = max((tmp_path / "model/unet").glob("*-of-*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, path)
    with pytest.raises(fastldm.Error, match=rf"{path.name}: is a pickle"):
        fastldm.Pipeline(tmp_path / "model", use_safetensors=True)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickled_single_file_is_refused_where_that_is_asked_for(
    sample: Callable[..., Sample], tmp_path: Path, name: str
) -> None:
    made = sample()
    file = as_ckpt(made.file, tmp_path / name)
    for pipe in (
        lambda **o: fastldm.Pipeline(file, config=made.folder, **o),
        lambda **o: made.fast(unet=file, **o),
    ):
        assert_same(weights(pipe()), weights(made.ref))
        with pytest.raises(fastldm.Error, match=rf"{name}: is a pickle") as caught:
            pipe(use_safetensors=True)
        assert caught.value.field == "use_safetensors"
    assert_same(weights(made.fast(use_safetensors=True)), weights(made.ref))


def test_a_wish_that_is_none_is_refused(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match="must be True, False or None") as caught:
        sample().fast(use_safetensors="yes")
    assert caught.value.field == "use_safetensors"


# --------------------------------------------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[str, Callable[[Sample], Any], str]] = {
    "a number": ("vae", lambda made: 3, "must be a path, a module .*, not int"),
    "a list": ("text_encoder", lambda made: [], "must be a path, a module .*, not list"),
    "no such file": ("vae", lambda made: "models/vae.safetensors", "models/vae.safetensors is missing"),
    "no such folder": ("vae", lambda made: "./models/vae", "is neither a folder nor a model id"),
    "the U-Net of diffusers": ("vae", lambda made: made.ref.unet, "UNet2DConditionModel"),
    "the tiny autoencoder": ("vae", lambda made: diffusers.AutoencoderTiny(), "_class_name = 'AutoencoderTiny'"),
    "the VAE as text encoder": ("text_encoder", lambda made: made.ref.vae, "'AutoencoderKL' is not supported"),
    "a module without configuration": ("vae", lambda made: torch.nn.Linear(2, 2), "'Linear' has no configuration"),
    "our U-Net": ("vae", lambda made: made.fast().unet, "is of class UNet, and must be"),
    "our VAE as text encoder": ("text_encoder", lambda made: made.fast().vae, "must be of TextEncoder"),
    "our VAE as U-Net": ("unet", lambda made: made.fast().vae, "is of class AutoencoderKL, and must be of UNet"),
    "our text encoder as tokenizer": ("tokenizer", lambda made: made.fast().text_encoder, "not TextEncoderView"),
    "a number as U-Net": ("unet", lambda made: 3, "must be a path, a module .*, not int"),
    "the VAE of diffusers as U-Net": ("unet", lambda made: made.ref.vae, "_class_name = 'AutoencoderKL'"),
    "the VAE's folder as U-Net": ("unet", lambda made: made.folder / "vae", "_class_name = 'AutoencoderKL'"),
    "a U-Net's file in diffusers' layout": (
        "unet",
        lambda made: made.folder / "unet/diffusion_pytorch_model.safetensors",
        "is a U-Net in diffusers' layout",
    ),
    "an autoencoder's file as U-Net": (
        "unet",
        lambda made: made.folder / "vae/diffusion_pytorch_model.safetensors",
        "is an autoencoder",
    ),
    "the text encoder's folder": ("vae", lambda made: made.folder / "text_encoder", r"text_encoder/config.json: archi"),
    "the VAE's folder": ("text_encoder", lambda made: made.folder / "vae", "hidden_size"),
    "an autoencoder's file as text encoder": (
        "text_encoder",
        lambda made: made.folder / "vae/diffusion_pytorch_model.safetensors",
        "holds no text encoder; it is an autoencoder alone",
    ),
    "a folder without the VAE": ("vae", lambda made: made.folder / "unet", "unet/config.json: "),
    "an empty folder": ("text_encoder", lambda made: made.folder / "empty", "empty/config.json is missing"),
    "a VAE in diffusers' layout as a file": (
        "vae",
        lambda made: made.folder / "vae/diffusion_pytorch_model.safetensors",
        "is an autoencoder in diffusers' layout: pass its folder",
    ),
    "a text encoder's file as VAE": (
        "vae",
        lambda made: made.folder / "text_encoder/model.safetensors",
        "holds no autoencoder; it is a text encoder alone",
    ),
}


@pytest.mark.parametrize(("component", "value", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_other_things_are_refused_by_what_they_are(
    sample: Callable[..., Sample], component: str, value: Callable[[Sample], Any], match: str
) -> None:
    made = sample()
    (made.folder / "empty").mkdir(exist_ok=True)
    for pipe in (lambda **options: made.fast(**options), lambda **options: fastldm.Pipeline(made.folder, **options)):
        with pytest.raises(fastldm.Error, match=match):
            pipe(**{component: value(made)})


def test_a_vae_that_does_not_fit_is_refused(sample: Callable[..., Sample]) -> None:
    vae = diffusers.AutoencoderKL(**{**oracle.autoencoder().config, "latent_channels": 8})
    with pytest.raises(fastldm.Error, match="latent_channels"):
        sample().fast(vae=vae)


def test_a_text_encoder_that_does_not_fit_is_refused(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match="cross_attention_dim = 24 must be 32"):
        sample().fast(text_encoder=oracle.text_encoder(32))


@pytest.mark.parametrize(
    ("option", "value"),
    [("config", "x"), ("original_config", "x.yaml"), ("prediction_type", "epsilon"), ("extract_ema", True)],
)
def test_what_is_for_a_file_is_refused_for_a_folder(sample: Callable[..., Sample], option: str, value: Any) -> None:
    with pytest.raises(fastldm.Error, match="is for a single file") as caught:
        fastldm.Pipeline(sample().folder, **{option: value})
    assert caught.value.field == option


@pytest.mark.parametrize("option", ["variant", "revision"])
def test_what_is_for_a_folder_is_refused_for_a_file(sample: Callable[..., Sample], option: str) -> None:
    with pytest.raises(fastldm.Error, match="is for a folder") as caught:
        sample().fast(**{option: "fp16"})
    assert caught.value.field == option


def test_a_prediction_type_that_is_none_is_refused(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match="must be one of epsilon, v_prediction, sample") as caught:
        sample().fast(prediction_type="v")
    assert caught.value.field == "prediction_type"


def test_the_prediction_type_overrides(sample: Callable[..., Sample]) -> None:
    made, v = sample("sd1"), sample("sd1")
    other = shutil.copytree(v.folder, v.folder.parent / "v")
    path = other / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    assert torch.equal(image(made.fast(prediction_type="v_prediction")), image(fastldm.Pipeline(other)))


@pytest.mark.parametrize("name", ["model.safetensors", "models/sd.ckpt", "/no/x.pt"])
def test_a_missing_file_is_missing_and_no_model_of_the_hub(name: str) -> None:
    with pytest.raises(fastldm.Error, match=f"{name} is missing"):
        fastldm.Pipeline(name)


def test_a_config_that_is_no_models_folder(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match=r"unet/unet/config.json is missing"):
        fastldm.Pipeline(sample().file, config=sample().folder / "unet")


def test_a_lone_unet_is_completed(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """As the U-Nets that are published alone: everything else is given."""
    made = sample()
    file = only(PREFIXES["unet"], made, tmp_path / "unet.safetensors", keep=False)
    pipe = fastldm.Pipeline(file, config=made.folder, vae=made.folder, text_encoder=made.folder)
    assert torch.equal(image(pipe), painted(made))
    assert_same(weights(pipe), weights(made.ref))


def test_averaged_weights(sample: Callable[..., Sample], tmp_path: Path) -> None:
    made = sample()
    prefix = PREFIXES["unet"]

    def average(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            key = name.removeprefix("model.").replace(".", "")
            tensors[f"model_ema.{key}"] = tensors[name].clone()
            tensors[name] = 0.9 * tensors[name]

    file = rewritten(made.file, tmp_path / "ema.safetensors", average)
    pipe = fastldm.Pipeline(file, config=made.folder, extract_ema=True)
    assert_same(weights(pipe), weights(made.ref))
    assert not torch.equal(image(fastldm.Pipeline(file, config=made.folder)), image(pipe))
    with pytest.raises(fastldm.Error, match="no averaged weights") as caught:
        made.fast(extract_ema=True)
    assert caught.value.field == "extract_ema"
    assert converted(file, tmp_path / "folder", config=made.folder, extract_ema=True).is_dir()
    assert_same(weights(fastldm.Pipeline(tmp_path / "folder")), weights(made.ref))


def test_pictures_to_start_from(sample: Callable[..., Sample]) -> None:
    """The encoder of a file's autoencoder, too."""
    made = sample()
    call = {"image": noise_picture(1), "strength": 0.5, "num_inference_steps": 4}
    assert torch.equal(image(made.fast(), **call), image(fastldm.Pipeline(made.folder), **call))
