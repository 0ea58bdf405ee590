"""The yaml beside a checkpoint: the published ones say what they should, and hostile ones nothing but an error."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import yaml

from fastldm import config as presets
from fastldm.errors import ConfigError, Error, FileError
from fastldm.weights.families import REFINER, SD1, SD2, SDXL, Family
from fastldm.weights.original import MAX_YAML, Original, original_config
from tests.weights.named import checkpoint, parsed, placed
from tests.weights.originals import CHECKPOINTS

Data = dict[str, Any]
WHERE = "model.yaml"

# What matters of the published files, with the keys and values that they have.


def ldm(unet: Data, encoder: Data | None, **params: Any) -> Data:
    """LatentDiffusion of CompVis/stable-diffusion and Stability-AI/stablediffusion."""
    return {
        "model": {
            "base_learning_rate": 1.0e-4,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": 1000,
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": 64,
                "channels": 4,
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": 0.18215,
                **params,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": 32,
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": 320,
                        "attention_resolutions": [4, 2, 1],
                        "num_res_blocks": 2,
                        "channel_mult": [1, 2, 4, 4],
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "use_checkpoint": True,
                        "legacy": False,
                        **unet,
                    },
                },
                "first_stage_config": autoencoder("ldm.models.autoencoder.AutoencoderKL"),
                **({} if encoder is None else {"cond_stage_config": encoder}),
            },
        }
    }


def sgm(unet: Data, embedders: list[Data]) -> Data:
    """DiffusionEngine of Stability-AI/generative-models."""
    denoiser = "sgm.modules.diffusionmodules.denoiser"
    return {
        "model": {
            "target": "sgm.models.diffusion.DiffusionEngine",
            "params": {
                "scale_factor": 0.13025,
                "disable_first_stage_autocast": True,
                "denoiser_config": {
                    "target": f"{denoiser}.DiscreteDenoiser",
                    "params": {
                        "num_idx": 1000,
                        "scaling_config": {"target": f"{denoiser}_scaling.EpsScaling"},
                        "discretization_config": {
                            "target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"
                        },
                    },
                },
                "network_config": {
                    "target": "sgm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "num_classes": "sequential",
                        "use_checkpoint": True,
                        "in_channels": 4,
                        "out_channels": 4,
                        "attention_resolutions": [4, 2],
                        "num_res_blocks": 2,
                        "num_head_channels": 64,
                        "use_linear_in_transformer": True,
                        "spatial_transformer_attn_type": "softmax-xformers",
                        **unet,
                    },
                },
                "conditioner_config": {
                    "target": "sgm.modules.GeneralConditioner",
                    "params": {"emb_models": embedders},
                },
                "first_stage_config": autoencoder("sgm.models.autoencoder.AutoencoderKL"),
            },
        }
    }


def autoencoder(target: str) -> Data:
    return {
        "target": target,
        "params": {
            "embed_dim": 4,
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 256,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 2, 4, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


CLIP: Data = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
OPEN_CLIP: Data = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"freeze": True, "layer": "penultimate"},
}
_SD2 = {
    "use_fp16": True,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
_ENCODERS = "sgm.modules.encoders.modules"
_CLIP_L = {"input_key": "txt", "target": f"{_ENCODERS}.FrozenCLIPEmbedder", "params": {"layer": "hidden"}}
_BIGG = {
    "is_trainable": False,
    "input_key": "txt",
    "target": f"{_ENCODERS}.FrozenOpenCLIPEmbedder2",
    "params": {"arch": "ViT-bigG-14", "freeze": True, "layer": "penultimate", "always_return_pooled": True},
}
_SIZE = {
    "input_key": "original_size_as_tuple",
    "target": f"{_ENCODERS}.ConcatTimestepEmbedderND",
    "params": {"outdim": 256},
}

V1 = ldm({"num_heads": 8, "context_dim": 768}, CLIP, use_ema=False)
V1_INPAINTING = ldm({"num_heads": 8, "context_dim": 768, "in_channels": 9}, CLIP, conditioning_key="hybrid")
PIX2PIX = ldm(
    {"num_heads": 8, "context_dim": 768, "in_channels": 8}, CLIP, conditioning_key="hybrid", image_size=16, use_ema=True
)
V2 = ldm(_SD2, OPEN_CLIP, use_ema=False)
V2_V = ldm(_SD2, OPEN_CLIP, parameterization="v", use_ema=False)
XL_BASE = sgm(
    {
        "adm_in_channels": 2816,
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "use_spatial_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "legacy": False,
    },
    [_CLIP_L, _BIGG, _SIZE],
)
XL_REFINER = sgm(
    {
        "adm_in_channels": 2560,
        "model_channels": 384,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": 4,
        "context_dim": [1280, 1280, 1280, 1280],
    },
    [_BIGG, _SIZE],
)
PUBLISHED: dict[str, tuple[Data, str, Family, str, int]] = {
    "v1-inference": (V1, "SD 1.5", SD1, "epsilon", 64),
    "v1-inpainting-inference": (V1_INPAINTING, "SD 1.5 inpainting", SD1, "epsilon", 64),
    "instruct-pix2pix": (PIX2PIX, "instruct-pix2pix", SD1, "epsilon", 64),
    "v2-inference": (V2, "SD 2.1 base", SD2, "epsilon", 64),
    "v2-inference-v": (V2_V, "SD 2.1", SD2, "v_prediction", 96),
    "sd_xl_base": (XL_BASE, "SDXL base", SDXL, "epsilon", 128),
    "sd_xl_refiner": (XL_REFINER, "SDXL refiner", REFINER, "epsilon", 128),
}


def text(data: Data) -> bytes:
    return yaml.safe_dump(data, sort_keys=False).encode()


def read(data: Data) -> Original:
    return original_config(text(data), WHERE)


def params(data: Data) -> Data:
    return data["model"]["params"]


def unet_of(data: Data) -> Data:
    inner = params(data)
    return (inner.get("unet_config") or inner["network_config"])["params"]


def changed(data: Data, change: Callable[[Data], object]) -> Data:
    data = copy.deepcopy(data)
    change(data)
    return data


# ---------------------------------------------------------------------------------------------- the published ones


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_yaml_beside_its_checkpoint(name: str) -> None:
    """It says nothing else than what the file and the family show; but for the v-model, whatever its values show."""
    data, file, family, prediction_type, side = PUBLISHED[name]
    said = read(data)
    assert said.family is family
    for spread in (0.01, 0.2):
        found = checkpoint(CHECKPOINTS[file], spread=spread, original=said)
        plain = checkpoint(CHECKPOINTS[file], prediction_type=prediction_type)
        assert found.prediction_type == prediction_type
        assert found.found == plain.found
        for component in (*found.found.sections, "scheduler"):
            assert found.json(component) == plain.json(component)
        assert parsed(found, "unet").sample_size == side, "the yaml's image_size is another"
    placed(found, "unet")


def test_what_a_published_yaml_says() -> None:
    said = read(V1)
    assert (said.heads, said.head_dim, said.scaling_factor) == (8, None, 0.18215)
    assert said.scheduler == {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    }
    assert said.shown == {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 768,
        "block_out_channels": [320, 640, 1280, 1280],
    }
    said = read(XL_REFINER)
    assert (said.heads, said.head_dim, said.scaling_factor) == (None, 64, 0.13025)
    assert said.scheduler == {"prediction_type": "epsilon"}
    assert said.shown["cross_attention_dim"] == 1280
    assert said.shown["block_out_channels"] == [384, 768, 1536, 1536]


# ------------------------------------------------------------------------------------------------ what is applied


def unet_json(data: Data, file: str = "SD 1.5") -> Data:
    return checkpoint(CHECKPOINTS[file], original=read(data), prediction_type="epsilon").json("unet")


@pytest.mark.parametrize(
    ("said", "heads"),
    [
        ({"num_heads": 4}, [4, 4, 4, 4]),
        ({"num_heads": -1, "num_head_channels": 64}, [5, 10, 20, 20]),
        ({"num_head_channels": 40, "num_heads": -1}, [8, 16, 32, 32]),
        ({"num_heads": 8, "num_head_channels": 64}, [5, 10, 20, 20]),  # as the definition has it: channels go first
        ({"num_heads": 8, "num_head_channels": -1}, [8, 8, 8, 8]),
    ],
)
def test_heads(said: Data, heads: list[int]) -> None:
    data = changed(V1, lambda d: unet_of(d).update(said))
    assert unet_json(data)["attention_head_dim"] == heads


def test_heads_that_the_yaml_does_not_say_are_the_familys() -> None:
    assert unet_json(changed(V1, lambda d: unet_of(d).pop("num_heads")))["attention_head_dim"] == [8, 8, 8, 8]
    data = changed(V2, lambda d: unet_of(d).pop("num_head_channels"))
    assert unet_json(data, "SD 2.1")["attention_head_dim"] == [5, 10, 20, 20]


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    said = read(changed(V1, lambda d: unet_of(d).update(num_heads=7)))
    with pytest.raises(ConfigError, match="7 heads do not divide 320"):
        parsed(checkpoint(CHECKPOINTS["SD 1.5"], original=said), "unet")


@pytest.mark.parametrize(("word", "says"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_parameterization(word: str, says: str) -> None:
    data = changed(V2, lambda d: params(d).update(parameterization=word))
    for spread in (0.01, 0.2):
        found = checkpoint(CHECKPOINTS["SD 2.1"], spread=spread, original=read(data))
        assert found.prediction_type == says
        assert parsed(found, "unet").sample_size == (96 if word == "v" else 64)


@pytest.mark.parametrize(("word", "says"), [("EpsScaling", "epsilon"), ("VScaling", "v_prediction")])
def test_scaling_of_the_denoiser(word: str, says: str) -> None:
    def change(data: Data) -> None:
        params(data)["denoiser_config"]["params"]["scaling_config"]["target"] = f"my.module.{word}"

    assert read(changed(XL_BASE, change)).scheduler == {"prediction_type": says}


def test_scaling_that_is_not_supported() -> None:
    def change(data: Data) -> None:
        params(data)["denoiser_config"]["params"]["scaling_config"]["target"] = "sgm.EDMScaling"

    with pytest.raises(ConfigError, match=r"scaling_config.*EDMScaling.*EpsScaling, VScaling"):
        read(changed(XL_BASE, change))


def test_schedule_and_scale() -> None:
    said = {"linear_start": 0.001, "linear_end": 0.02, "timesteps": 500, "scale_factor": 0.5}
    data = changed(V1, lambda d: params(d).update(said))
    found = checkpoint(CHECKPOINTS["SD 1.5"], original=read(data))
    scheduler = found.json("scheduler")
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]) == (0.001, 0.02, 500)
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert parsed(found, "vae").scaling_factor == 0.5
    assert parsed(found, "unet") == presets.SD15_UNET


@pytest.mark.parametrize(("theirs", "hub"), [("linear", "scaled_linear"), ("sqrt_linear", "linear")])
def test_the_names_of_schedules_mislead(theirs: str, hub: str) -> None:
    """The original's "linear" is linear in the square roots."""
    data = changed(V1, lambda d: params(d).update(beta_schedule=theirs))
    assert read(data).scheduler["beta_schedule"] == hub


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("in_channels", 9, "the tensors say 4"),
        ("out_channels", 8, "the tensors say 4"),
        ("context_dim", 1024, "the tensors say 768"),
        ("context_dim", [1024] * 4, "the tensors say 768"),
        ("model_channels", 192, r"the tensors say \[320, 640, 1280, 1280\]"),
        ("channel_mult", [1, 2, 4], r"the tensors say \[320, 640, 1280, 1280\]"),
    ],
)
def test_a_contradiction_is_refused_by_its_key(key: str, value: Any, shown: str) -> None:
    hub = {"context_dim": "cross_attention_dim", "model_channels": "block_out_channels"}
    name = {**hub, "channel_mult": "block_out_channels"}.get(key, key)
    with pytest.raises(ConfigError, match=shown) as caught:
        unet_json(changed(V1, lambda d: unet_of(d).update({key: value})))
    assert caught.value.field == f"{WHERE}: {name}"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: unet_of(d).update(num_heads="8"), "num_heads"),
        (lambda d: unet_of(d).update(num_heads=True), "num_heads"),
        (lambda d: unet_of(d).update(num_head_channels=1 << 20), "num_head_channels"),
        (lambda d: unet_of(d).update(context_dim=[768, 1024]), "context_dim"),
        (lambda d: unet_of(d).update(context_dim=[]), "context_dim"),
        (lambda d: unet_of(d).update(channel_mult=[1] * 17), "channel_mult"),
        (lambda d: unet_of(d).update(channel_mult=4), "channel_mult"),
        (lambda d: unet_of(d).update(use_scale_shift_norm=True), "use_scale_shift_norm"),
        (lambda d: unet_of(d).update(resblock_updown=True), "resblock_updown"),
        (lambda d: unet_of(d).update(dims=3), "dims"),
        (lambda d: params(d).update(parameterization="edm"), "parameterization"),
        (lambda d: params(d).update(parameterization=None), "parameterization"),
        (lambda d: params(d).update(linear_start=0), "linear_start"),
        (lambda d: params(d).update(linear_end=float("nan")), "linear_end"),
        (lambda d: params(d).update(linear_end=float("inf")), "linear_end"),
        (lambda d: params(d).update(timesteps=10**30), "timesteps"),
        (lambda d: params(d).update(scale_factor=0), "scale_factor"),
        (lambda d: params(d).update(scale_factor="${scale}"), "scale_factor"),
        (lambda d: params(d).update(scale_factor=[0.18215]), "scale_factor"),
        (lambda d: params(d).update(beta_schedule="cosine"), "beta_schedule"),
        (lambda d: params(d).update(unet_config="${base.unet}"), "unet_config"),
        (lambda d: params(d)["unet_config"].pop("params"), "params"),
        (lambda d: params(d)["unet_config"].update(params=None), "params"),
        (lambda d: params(d).pop("unet_config"), "network_config"),
        (lambda d: d["model"].pop("params"), "params"),
        (lambda d: d["model"].update(params=[1]), "params"),
        (lambda d: d.update(model="SD"), "model"),
        (lambda d: d.pop("model"), "model"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_key(change: Callable[[Data], object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(V1, change))
    assert str(caught.value).startswith(WHERE)
    assert caught.value.field is not None
    assert caught.value.field.endswith(f": {key}")


@pytest.mark.parametrize(("data", "layer"), [(V1, "hidden"), (V1, "penultimate"), (V1, "pooled"), (V2, "last")])
def test_another_layer_of_the_text_encoder_is_refused(data: Data, layer: str) -> None:
    def change(data: Data) -> None:
        params(data)["cond_stage_config"]["params"] = {"layer": layer}

    with pytest.raises(ConfigError, match=f"layer = '{layer}' is not supported") as caught:
        read(changed(data, change))
    assert caught.value.field == f"{WHERE}: model: params: cond_stage_config: params"


def test_the_text_encoder_may_be_unknown() -> None:
    """Then the tensors tell the family; v2-inference-v.yaml is around without its text encoder."""
    for encoder in (None, {"target": "my.Encoder"}, {}, "FrozenCLIPEmbedder", {"target": 3}):
        data = changed(V2_V, lambda d, encoder=encoder: params(d).update(cond_stage_config=encoder))
        assert read(data).family is None
        assert checkpoint(CHECKPOINTS["SD 2.1"], original=read(data)).family is SD2


# ------------------------------------------------------------------------------------------------------ hostile files

V1_TEXT = text(V1)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "must be a yaml mapping, not NoneType"),
        (b"- 1\n- 2\n", "must be a yaml mapping, not list"),
        (b"just words", "must be a yaml mapping, not str"),
        (b"<!DOCTYPE html>\n<html></html>", "must be a yaml mapping"),
        (b"model: {\n", "is not valid yaml"),
        (b"\x00" * 40, "is not valid yaml"),
        (V1_TEXT + b"\x00", "is not valid yaml"),
        (b"\xff\xfe\xff", "is not valid yaml"),
        (b"\x80abc: 1", "is not valid yaml"),
        (b"a: 1\n---\nb: 2\n", "is not valid yaml"),
        (b"a: 1\na: 2\n", "keys must be different words"),
        (V1_TEXT + V1_TEXT, "keys must be different words"),
        (b"1: 2\n", "keys must be different words"),
        (b"? [a, b]\n: 2\n", "keys must be different words"),
        (b"? {a: b}\n: 2\n", "keys must be different words"),
        (b"<<: {a: 1}\n", "is not valid yaml"),
        (b"=: 1\n", "is not valid yaml"),
        (b"a: &x 1\nb: *x\n", "no anchors"),
        (b"a: *x\n", "no anchors"),
        (b"a: !!python/object/apply:os.system ['true']\n", "no tags"),
        (b"!!python/object:os.path {}\n", "no tags"),
        (b"a: !!str 1\n", "no tags"),
        (b"a: !mine 1\n", "no tags"),
        (b"a: ! 1\n", "no tags"),
        (b"a: " + b"[" * 1000 + b"]" * 1000, "32 levels"),
        (b"a: " + b"{b: " * 1000 + b"}" * 1000, "32 levels"),
        (b"- " * 1000, "32 levels"),
        (b"? " * 1000, "32 levels"),
        (b"a: [" + b"1," * 6000 + b"]", "5000 values"),
        (b"a: 2024-99-99\n", "a value that cannot be read"),
        (b"a: " + b"9" * 5000, "a value that cannot be read"),
        (b"a: " + b"1:" * 400 + b"1.0", "a value that cannot be read"),
        (b"a: " + b"x" * (2 << 20), "has 2097155 bytes; at most 65536"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(FileError) as caught:
        original_config(raw, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert says in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_billion_laughs() -> None:
    lines = [
        "a: &a [lol, lol]",
        *(f"{after}: &{after} [{f'*{before}, ' * 9}]" for before, after in pairwise("abcdefg")),
    ]
    with pytest.raises(FileError, match="no anchors"):
        original_config("\n".join(lines).encode(), WHERE)


def test_no_object_is_made() -> None:
    with pytest.raises(FileError, match="no tags"):
        original_config(b"a: !!python/object/apply:tests.weights.test_original.explode []", WHERE)


def explode() -> None:
    raise AssertionError("the yaml called a function")


def test_targets_are_not_imported() -> None:
    data = changed(V1, lambda d: d["model"].update(target="tests.weights.test_original.explode"))
    assert read(data).family is SD1


def test_a_number_that_yaml_takes_for_a_word() -> None:
    """yaml 1.1 wants a dot in 1e-4. It is refused by its key where it counts, and nothing where it does not."""
    elsewhere = V1_TEXT.replace(b"base_learning_rate: 0.0001", b"base_learning_rate: 1e-4")
    assert elsewhere != V1_TEXT
    assert original_config(elsewhere, WHERE) == read(V1)
    with pytest.raises(ConfigError, match="linear_start = '1e-4': must be a finite number"):
        original_config(V1_TEXT.replace(b"linear_start: 0.00085", b"linear_start: 1e-4"), WHERE)
    dotted = original_config(V1_TEXT.replace(b"linear_start: 0.00085", b"linear_start: 1.0e-4"), WHERE)
    assert dotted.scheduler["beta_start"] == 1e-4


def test_dates_and_words_where_nobody_looks() -> None:
    data = changed(V1, lambda d: d["model"].update(born="2022-08-22", monitor="${x}", note="é☃"))
    raw = yaml.safe_dump(data, allow_unicode=True).encode().replace(b"'2022-08-22'", b"2022-08-22")
    assert b"born: 2022-08-22\n" in raw
    assert original_config(raw, WHERE) == read(V1)
    assert original_config(V1_TEXT.decode().encode("utf-16"), WHERE) == read(V1)
    date = V1_TEXT.replace(b"scale_factor: 0.18215", b"scale_factor: 2022-08-22")
    with pytest.raises(ConfigError, match="scale_factor"):
        original_config(date, WHERE)


SLOW = {
    "one word": b"a" * MAX_YAML,
    "words": b"a\n" * (MAX_YAML // 2),
    "blank lines": b"\n" * MAX_YAML,
    "a quoted string of lines": b'"' + b"\n" * (MAX_YAML - 2) + b'"',
    "a block": b"a: |\n" + b" x\n" * (MAX_YAML // 3 - 2),
    "base 60": b"a: 1" + b":1" * (MAX_YAML // 2 - 2),
    "base 2": b"a: 0b" + b"1" * (MAX_YAML - 5),
    "comments": b"a: [\n" + b"#\n" * (MAX_YAML // 2 - 3) + b"]",
    "questions": b"?\n" * (MAX_YAML // 2),
    "an anchor": b"a: &" + b"a" * (MAX_YAML - 4),
}


@pytest.mark.parametrize("raw", SLOW.values(), ids=SLOW.keys())
def test_takes_no_longer_for_a_hostile_one(raw: bytes) -> None:
    assert len(raw) <= MAX_YAML
    start = time.process_time()
    with pytest.raises(Error):
        original_config(raw, WHERE)
    assert time.process_time() - start < 2


BYTES = [b":", b"\n", b" ", b"- ", b"{", b"}", b"[", b"]", b"&a ", b"*a ", b"!", b"'", b'"', b"|", b"%", b"\t", b"#"]
BYTES += [b"\x00", b"\xff", b"\xc3\xa9", b"<<", b"~", b"1e-4", b".nan", b"0x", b"1:1", b"2001-01-01", b"\\ud800"]
VALUES: list[Any] = [None, True, -1, 0, 3, 1 << 70, 0.5, float("nan"), "", "last", "v", [], [1, 2], [[1]], {}, {"a": 1}]


def broken_texts(count: int) -> Iterator[bytes]:
    generator = random.Random(3)
    short = text({"model": {"params": {k: v for k, v in params(V1).items() if k != "first_stage_config"}}})
    for _ in range(count):
        raw = bytearray(short)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(raw))
            raw[at : at + generator.choice((0, 1, 40))] = generator.choice(BYTES)
        yield bytes(raw)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from places(data[key])


def broken_values(count: int) -> Iterator[bytes]:
    generator = random.Random(5)
    for _ in range(count):
        data = changed(generator.choice((V1, V2_V, XL_BASE, XL_REFINER)), lambda d: params(d).pop("first_stage_config"))
        for _ in range(generator.randint(1, 2)):
            container, key = generator.choice(list(places(data)))
            container[key] = copy.deepcopy(generator.choice(VALUES))
        yield text(data)


@pytest.mark.parametrize("made", [broken_texts, broken_values])
def test_a_broken_yaml_is_read_or_refused(made: Callable[[int], Iterator[bytes]]) -> None:
    shown = {"block_out_channels": [320], "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768}
    messages, read_ = [], 0
    for raw in made(150):
        try:
            said = original_config(raw, WHERE)
            read_ += 1
            said.applied("unet", shown)
        except Error as error:
            messages.append(str(error))
    assert read_ > 10
    assert len(messages) > 10
    assert [m for m in messages if not m.startswith(WHERE) or not m.isprintable() or len(m) > 1000] == []
