"""Full-size checkpoints by their names and shapes: told what they are without a configuration, and read strictly."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastldm import config as presets
from fastldm.config import AddedConfig, Level, UNetConfig, mirrored
from fastldm.errors import FileError, WeightsError
from fastldm.sampling import scheduler_config
from fastldm.weights.detect import IGNORED
from fastldm.weights.families import REFINER, SD1, SD2, SDXL, Family
from fastldm.weights.original import Original
from fastldm.weights.single import V_SPREAD, Checkpoint, lone_vae
from tests.weights import originals
from tests.weights.named import (
    NETWORKS,
    TEXT,
    UNET,
    V_BIAS,
    VAE,
    Named,
    checkpoint,
    hub_names,
    network,
    opened,
    parsed,
    placed,
    read_all,
    refused,
    under,
    without,
)
from tests.weights.originals import CHECKPOINTS

SHARP = 0.2  # the spread of values with which SD 2 is a v-model; that of `checkpoint` is below the threshold

# stabilityai/stable-diffusion-xl-refiner-1.0: unet/config.json
_REFINER_DOWN = (Level(384, 2, 0, 6), Level(768, 2, 4, 12), Level(1536, 2, 4, 24), Level(1536, 2, 0, 24))
REFINER_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    down=_REFINER_DOWN,
    up=mirrored(_REFINER_DOWN),
    mid_depth=4,
    context_dim=1280,
    groups=32,
    eps=1e-5,
    flip_sin_to_cos=True,
    freq_shift=0.0,
    sample_size=128,
    added=AddedConfig(number_dim=256, total_dim=2560),
)
SD21_BASE_UNET = replace(presets.SD21_UNET, sample_size=64)


@dataclass(frozen=True)
class Published:
    family: Family
    unet: UNetConfig
    parameters: dict[str, int]  # counted in the hub's files
    task: str = "text-to-image"
    clip: str = "text_model."


_SD1 = Published(SD1, presets.SD15_UNET, {"unet": 859520964, "vae": 83653863, "text_encoder": 123060480})
_SD2 = Published(SD2, SD21_BASE_UNET, {"unet": 865910724, "vae": 83653863, "text_encoder": 340387840})
_SDXL = Published(
    SDXL,
    presets.SDXL_UNET,
    {"unet": 2567463684, "vae": 83653863, "text_encoder": 123060480, "text_encoder_2": 694659840},
)


def for_task(model: Published, task: str, channels: int) -> Published:
    more = 320 * (channels - 4) * 9
    parameters = {**model.parameters, "unet": model.parameters["unet"] + more}
    return replace(model, unet=replace(model.unet, in_channels=channels), parameters=parameters, task=task)


PUBLISHED = {
    "SD 1.5": _SD1,
    "SD 1.5 with averages": _SD1,
    "SD 1.5 inpainting": for_task(_SD1, "inpainting", 9),
    "instruct-pix2pix": for_task(_SD1, "instruct-pix2pix", 8),
    "SD 1.5 without text_model": replace(_SD1, clip=""),
    "SD 1.5 pruned": _SD1,
    "SD 2.1": _SD2,
    "SD 2.1 base": _SD2,
    "SD 2.1 with a pruned text encoder": _SD2,
    "SD 2 inpainting": for_task(_SD2, "inpainting", 9),
    "SDXL base": _SDXL,
    "SDXL merged": _SDXL,
    "SDXL base as trained": _SDXL,
    "SDXL v-prediction": _SDXL,
    "SDXL refiner": Published(
        REFINER, REFINER_UNET, {"unet": 2259526660, "vae": 83653863, "text_encoder_2": 694659840}
    ),
    "SDXL inpainting": for_task(_SDXL, "inpainting", 9),
}


def vae_of(family: Family) -> Any:
    return presets.SDXL_VAE if family in (SDXL, REFINER) else presets.SD_VAE


def text_of(family: Family, component: str) -> Any:
    if component == "text_encoder_2":
        return presets.OPENCLIP_BIGG
    return presets.OPENCLIP_H if family is SD2 else presets.CLIP_L


def prefixes(model: Published) -> dict[str, str]:
    texts = {
        name: text.prefix + (model.clip if text.layout == "clip" else "") for name, text in model.family.texts.items()
    }
    return {"unet": UNET, "vae": VAE, **texts}


def test_no_checkpoint_is_left_out() -> None:
    assert PUBLISHED.keys() == CHECKPOINTS.keys()


# ------------------------------------------------------------------------------------------------- what a file is


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_needs_no_configuration(name: str) -> None:
    model = PUBLISHED[name]
    found = checkpoint(CHECKPOINTS[name])
    assert found.family is model.family
    assert found.found.task == model.task
    assert found.found.sections == prefixes(model)
    assert parsed(found, "unet") == model.unet
    assert parsed(found, "vae") == vae_of(model.family)
    for component in model.family.texts:
        assert parsed(found, component) == text_of(model.family, component)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loads_strictly(name: str) -> None:
    models = read_all(CHECKPOINTS[name])
    counts = {component: sum(p.numel() for p in model.parameters()) for component, model in models.items()}
    assert counts == PUBLISHED[name].parameters


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL base", "SDXL refiner"])
def test_reads_every_tensor_under_the_hubs_shape(name: str) -> None:
    """All but what no model needs is read by some component, none by two."""
    found = checkpoint(CHECKPOINTS[name])
    used: list[str] = []
    for component in found.found.sections:
        tensors = opened(found, component)
        used += sorted({info.name for info in tensors.infos.values()})
    assert len(set(used)) == len(used)
    rest = CHECKPOINTS[name].keys() - set(used)
    assert [n for n in rest if not IGNORED.fullmatch(n) and f"{TEXT}model.transformer.resblocks.23." not in n] == []


def test_a_text_projection_is_transposed_and_thirds_are_apart() -> None:
    found = checkpoint(CHECKPOINTS["SDXL base"])
    tensors = opened(found, "text_encoder_2")
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(tensors.read("text_projection.weight"), found.tensors.read(f"{prefix}text_projection").T)
    joined = [tensors.read(f"encoder.layers.3.self_attn.{x}_proj.bias") for x in "qkv"]
    assert torch.equal(torch.cat(joined), found.tensors.read(f"{prefix}transformer.resblocks.3.attn.in_proj_bias"))


def test_reads_nothing_but_the_bias_that_tells() -> None:
    """Configurations and names are checked before a gigabyte is read."""
    for name in ("SD 1.5", "SDXL base", "SD 2.1"):
        tensors = Named(CHECKPOINTS[name])
        found = Checkpoint(tensors)
        for component in found.found.sections:
            opened(found, component)
        assert tensors.read_names == ([V_BIAS] if found.family is SD2 else [])


# ----------------------------------------------------------------------------------------------- faults of a file


def component_of(found: Checkpoint, name: str) -> str:
    sections = found.found.sections
    return max((c for c in sections if name.startswith(sections[c])), key=lambda c: len(sections[c]))


def needed(found: Checkpoint) -> list[str]:
    """The names of all tensors that the model has."""
    infos = (opened(found, component).infos.values() for component in found.found.sections)
    return sorted({info.name for group in infos for info in group})


TELLING = {  # from which the dimensions are read, so that detection has to do without them
    "SD 1.5": [
        f"{UNET}input_blocks.0.0.weight",
        f"{UNET}input_blocks.3.0.op.weight",
        f"{UNET}input_blocks.4.0.in_layers.2.weight",
        f"{UNET}input_blocks.1.1.transformer_blocks.0.norm1.weight",
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        f"{UNET}middle_block.0.in_layers.2.weight",
        f"{UNET}middle_block.1.proj_in.weight",
        f"{UNET}out.2.weight",
        f"{VAE}encoder.conv_in.weight",
        f"{VAE}encoder.down.0.block.1.conv1.weight",
        f"{VAE}encoder.down.2.block.0.conv1.weight",
        f"{VAE}encoder.mid.attn_1.q.weight",
        f"{VAE}decoder.conv_in.weight",
        f"{VAE}quant_conv.weight",
        f"{VAE}post_quant_conv.weight",
        f"{TEXT}transformer.text_model.embeddings.token_embedding.weight",
        f"{TEXT}transformer.text_model.embeddings.position_embedding.weight",
        f"{TEXT}transformer.text_model.encoder.layers.7.mlp.fc1.weight",
    ],
    "SD 2.1": [
        f"{TEXT}model.token_embedding.weight",
        f"{TEXT}model.positional_embedding",
        f"{TEXT}model.transformer.resblocks.7.mlp.c_fc.weight",
    ],
    "SDXL base": [
        f"{UNET}label_emb.0.0.weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    ],
    "SDXL refiner": ["conditioner.embedders.0.model.text_projection"],
}


@pytest.mark.parametrize("name", TELLING)
def test_f21_a_missing_tensor_is_named_as_the_file_names_it(name: str) -> None:
    tensors = CHECKPOINTS[name]
    found = checkpoint(tensors)
    dropped = random.Random(name).sample(needed(found), 40 if len(tensors) < 1500 else 12)
    for tensor in (*TELLING[name], *dropped):
        with pytest.raises(WeightsError, match="missing") as caught:
            opened(checkpoint(without(tensors, tensor)), component_of(found, tensor))
        assert tensor in str(caught.value)


def test_f21_a_v_model_cannot_be_told_without_its_bias() -> None:
    tensors = without(CHECKPOINTS["SD 2.1"], V_BIAS)
    with pytest.raises(FileError, match="pass prediction_type=") as caught:
        checkpoint(tensors)
    assert caught.value.field == "prediction_type"
    assert V_BIAS in str(refused(tensors, prediction_type="epsilon"))


def test_f21_what_no_model_needs_may_be_missing() -> None:
    for name in ("SD 1.5", "SD 2.1", "SDXL base"):
        tensors = CHECKPOINTS[name]
        needless = [n for n in tensors if IGNORED.fullmatch(n) and not n.endswith("1.model.text_projection")]
        assert len(needless) > 1
        read_all(without(tensors, *needless))


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL base", "SDXL refiner"])
def test_f22_a_tensor_too_many_is_named(name: str) -> None:
    found = checkpoint(CHECKPOINTS[name])
    for component, prefix in found.found.sections.items():
        extra = f"{prefix}extra.weight"
        error = refused({**CHECKPOINTS[name], extra: ((1,), "F32")}, component)
        assert extra in str(error)
        assert "do not belong" in str(error)
    for extra in ("extra.weight", "model.extra.weight", "cond_stage.weight", "conditioner.embedders.5.weight"):
        with pytest.raises(WeightsError, match="do not belong") as caught:
            checkpoint({**CHECKPOINTS[name], extra: ((1,), "F32")})
        assert extra in str(caught.value)


@pytest.mark.parametrize(
    ("component", "prefix", "block", "beyond"),
    [
        ("unet", UNET, "input_blocks.11.0.", "input_blocks.12.0."),
        ("unet", UNET, "output_blocks.11.0.", "output_blocks.12.0."),
        ("vae", VAE, "encoder.down.3.block.1.", "encoder.down.3.block.2."),
        ("vae", VAE, "encoder.down.3.", "encoder.down.4."),
        ("vae", VAE, "decoder.up.3.block.2.", "decoder.up.3.block.3."),
    ],
)
def test_f22_a_block_beyond_the_last_is_refused(component: str, prefix: str, block: str, beyond: str) -> None:
    tensors = CHECKPOINTS["SD 1.5"]
    more = {n.replace(prefix + block, prefix + beyond): t for n, t in under(tensors, prefix + block).items()}
    assert len(more) >= 8
    refused({**tensors, **more}, component)


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL base"])
def test_f23_a_wrong_shape_is_named_with_both(name: str) -> None:
    found = checkpoint(CHECKPOINTS[name])
    sample = [n for n in needed(found) if n.endswith((".bias", "to_q.weight")) and "in_proj" not in n]
    for tensor in random.Random(name).sample(sample, 8):
        shape, dtype = CHECKPOINTS[name][tensor]
        wrong = (shape[0] + 1, *shape[1:])
        error = refused({**CHECKPOINTS[name], tensor: (wrong, dtype)}, component_of(found, tensor))
        assert isinstance(error, WeightsError)
        assert error.field == tensor
        assert str(wrong) in str(error)
        assert str(shape) in str(error)


@pytest.mark.parametrize("shape", [(), (320,), (321, 4, 3, 3), (1 << 31, 1, 1, 1)])
@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1", "SDXL base"])
def test_f23_a_wrong_shape_of_what_tells_is_refused(name: str, shape: tuple[int, ...]) -> None:
    found = checkpoint(CHECKPOINTS[name])
    for tensor in TELLING[name]:
        if CHECKPOINTS[name][tensor][0] != shape:
            refused({**CHECKPOINTS[name], tensor: (shape, "F32")}, component_of(found, tensor))


def test_thirds_that_are_none() -> None:
    name = f"{TEXT}model.transformer.resblocks.4.attn.in_proj_weight"
    error = refused({**CHECKPOINTS["SD 2.1"], name: ((3073, 1024), "F32")}, "text_encoder")
    assert error.field == name
    assert "(3073, 1024)" in str(error)


@pytest.mark.parametrize("layer", [23, 24])
def test_the_layer_that_sd2_does_not_read(layer: int) -> None:
    """OpenCLIP ViT-H has 24, and the last but one is read: what stands in the last is all the same."""
    block = f"{TEXT}model.transformer.resblocks."
    tensors = {n: t for n, t in CHECKPOINTS["SD 2.1"].items() if not n.startswith(f"{block}23.")}
    odd = {f"{block}{layer}.ln_1.weight": ((7,), "F32")}
    if layer == 23:
        assert parsed(checkpoint(tensors | odd), "text_encoder") == presets.OPENCLIP_H
        placed(checkpoint(tensors | odd), "text_encoder")
    else:
        full = CHECKPOINTS["SD 2.1"] | odd
        assert f"{block}24.ln_1.weight" in str(refused(full, "text_encoder"))


def test_f24_integers_are_no_weights() -> None:
    name = f"{UNET}out.2.bias"
    assert name in str(refused({**CHECKPOINTS["SD 1.5"], name: ((4,), "I32")}))


# ------------------------------------------------------------------------------------------------------- averages


def test_averages_are_taken_where_asked() -> None:
    tensors = CHECKPOINTS["SD 1.5 with averages"]
    taken, usual = (opened(checkpoint(tensors, ema=ema), "unet") for ema in (True, False))
    assert {info.name for info in taken.infos.values()} == originals.ema(originals.SD15_UNET).keys()
    for hub, original in (
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("up_blocks.3.attentions.2.norm.bias", "output_blocks.11.1.norm.bias"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
    ):
        source = Named(tensors)
        average = source.read(f"model_ema.diffusion_model{original.replace('.', '')}")
        assert torch.equal(taken.read(hub), average)
        assert torch.equal(usual.read(hub), source.read(UNET + original))
        assert not torch.equal(taken.read(hub), usual.read(hub))


def test_averages_are_of_the_unet_alone() -> None:
    found = checkpoint(CHECKPOINTS["SD 1.5 with averages"], ema=True)
    for component in ("vae", "text_encoder"):
        assert not any("ema" in info.name for info in opened(found, component).infos.values())


@pytest.mark.parametrize("left", [0, 99])
def test_averages_that_are_not_there(left: int) -> None:
    averages = list(originals.ema(originals.SD15_UNET))
    tensors = without(CHECKPOINTS["SD 1.5 with averages"], *averages[left:])
    assert not checkpoint(tensors).has_ema
    with pytest.raises(WeightsError, match="no averaged weights") as caught:
        checkpoint(tensors, ema=True)
    assert caught.value.field == "extract_ema"


def test_an_average_that_is_missing_is_named() -> None:
    gone = "model_ema.diffusion_modeltime_embed0bias"
    error = refused(without(CHECKPOINTS["SD 1.5 with averages"], gone), ema=True)
    assert gone in str(error)


# --------------------------------------------------------------------------------------- other spellings of a file


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("name", ["SD 1.5 pruned", "SD 2.1", "SDXL base", "SDXL refiner"])
def test_a_unet_without_its_prefix(name: str, prefix: str) -> None:
    """Alone, and with the other parts beside it."""
    bare = {n.replace(UNET, prefix, 1): t for n, t in CHECKPOINTS[name].items() if n.startswith(UNET)}
    rest = {n: t for n, t in CHECKPOINTS[name].items() if not n.startswith(UNET)}
    alone, together = checkpoint(bare), checkpoint(bare | rest)
    assert alone.found.sections == {"unet": prefix}
    assert together.found.sections == {**prefixes(PUBLISHED[name]), "unet": prefix}
    for found in (alone, together):
        assert found.family is PUBLISHED[name].family
        assert parsed(found, "unet") == PUBLISHED[name].unet
        placed(found, "unet")
    assert f"{prefix}extra" in str(refused({**bare, f"{prefix}extra": ((1,), "F32")}))


@pytest.mark.parametrize("word", ["state_dict.", "module.", "state_dict.module.", "module.state_dict."])
def test_a_file_all_of_whose_names_are_wrapped(word: str) -> None:
    tensors = {word + n: t for n, t in CHECKPOINTS["SD 2.1"].items()}
    found = checkpoint(tensors, spread=SHARP)
    assert found.found == checkpoint(CHECKPOINTS["SD 2.1"]).found
    assert found.prediction_type == "v_prediction", "a value was read"
    read_all(tensors)
    name = f"{word}{UNET}out.2.bias"
    error = refused({**tensors, name: ((5,), "F32")})
    assert name in str(error), "as the file names it"


def test_a_file_some_of_whose_names_are_wrapped_is_refused() -> None:
    tensors = {"module." + n if n.startswith(VAE) else n: t for n, t in CHECKPOINTS["SD 1.5"].items()}
    with pytest.raises(WeightsError, match="do not belong to this model: module"):
        checkpoint(tensors)


def test_a_lone_autoencoder_may_be_wrapped() -> None:
    bare = {n.removeprefix(VAE): t for n, t in under(CHECKPOINTS["SD 1.5"], VAE).items()}
    for word in ("", VAE, "state_dict.", f"module.{VAE}"):
        part = lone_vae(Named({word + n: t for n, t in bare.items()}), SD1)
        config = NETWORKS["vae"][0](part.json, part.where)
        assert config == presets.SD_VAE
        assert len(part.open(config, hub_names("vae", config)).infos) == 248
    training = {"loss.logvar": ((), "F32"), "loss.discriminator.main.0.weight": ((64, 3, 4, 4), "F32")}
    assert lone_vae(Named(bare | training), SD1).json["latent_channels"] == 4
    part = lone_vae(Named({**bare, "decoder.extra": ((1,), "F32")}), SD1)
    with pytest.raises(WeightsError, match=r"do not belong to this model: decoder\.extra"):
        part.open(presets.SD_VAE, hub_names("vae", presets.SD_VAE))


def test_no_lone_autoencoder_in_other_files() -> None:
    for tensors in (under(CHECKPOINTS["SD 1.5"], UNET), under(CHECKPOINTS["SD 1.5"], TEXT), {}):
        with pytest.raises(FileError, match="no autoencoder") as caught:
            lone_vae(Named(tensors), SD1)
        assert caught.value.field == "vae"


@pytest.mark.parametrize(
    ("kept", "sections"),
    [
        ([UNET], ["unet"]),
        ([UNET, VAE], ["unet", "vae"]),
        ([UNET, TEXT], ["unet", "text_encoder"]),
        (["model_ema.", "betas", UNET, VAE], ["unet", "vae"]),
    ],
)
def test_parts_that_are_not_in_the_file(kept: list[str], sections: list[str]) -> None:
    tensors = {n: t for n, t in CHECKPOINTS["SD 1.5"].items() if n.startswith(tuple(kept))}
    found = checkpoint(tensors)
    assert list(found.found.sections) == sections
    assert found.family is SD1
    read_all(tensors)


def test_remains_of_a_text_encoder_are_none() -> None:
    """The buffer of positions, or the scale, which pruning leaves behind."""
    for name, rest in (("SD 1.5", "embeddings.position_ids"), ("SD 2.1", ".logit_scale")):
        tensors = {n: t for n, t in CHECKPOINTS[name].items() if not n.startswith(TEXT) or n.endswith(rest)}
        assert any(n.startswith(TEXT) for n in tensors)
        assert list(checkpoint(tensors).found.sections) == ["unet", "vae"]


def test_half_a_component_names_what_is_missing() -> None:
    tensors = {n: t for n, t in CHECKPOINTS["SD 1.5"].items() if not n.startswith(f"{VAE}encoder")}
    error = refused(tensors, "vae")
    assert error.field == f"{VAE}encoder.conv_in.weight"
    assert "decoder alone" in str(error)


# ---------------------------------------------------------------------------------------- noise or v, and the schedule


@pytest.mark.parametrize(("spread", "says", "side"), [(0.07, "epsilon", 64), (0.11, "v_prediction", 96)])
def test_sd2_shows_what_it_predicts(spread: float, says: str, side: int) -> None:
    tensors = Named(CHECKPOINTS["SD 2.1"], spread)
    assert (tensors.read(V_BIAS).std() > V_SPREAD) == (says == "v_prediction")
    found = Checkpoint(tensors)
    assert found.prediction_type == says
    assert found.json("scheduler")["prediction_type"] == says
    assert parsed(found, "unet") == replace(presets.SD21_UNET, sample_size=side)
    assert parsed(found, "vae").sample_size == 8 * side


def test_what_the_caller_says_overrides() -> None:
    for spread, word, side in ((SHARP, "epsilon", 64), (0.01, "v_prediction", 96)):
        found = checkpoint(CHECKPOINTS["SD 2.1"], spread=spread, prediction_type=word)
        assert found.prediction_type == found.json("scheduler")["prediction_type"] == word
        assert parsed(found, "unet").sample_size == side
    marked = checkpoint(CHECKPOINTS["SDXL v-prediction"], prediction_type="epsilon")
    assert marked.prediction_type == "epsilon"


def test_what_the_yaml_says_overrides_but_not_the_caller() -> None:
    said = Original("model.yaml", family=SD2, scheduler={"prediction_type": "epsilon"})
    assert checkpoint(CHECKPOINTS["SD 2.1"], spread=SHARP, original=said).prediction_type == "epsilon"
    both = checkpoint(CHECKPOINTS["SD 2.1"], original=said, prediction_type="v_prediction")
    assert both.prediction_type == "v_prediction"


def test_markers_of_training() -> None:
    marker = ((0,), "F32")
    for name in ("SD 1.5", "SD 2.1", "SDXL base"):
        plain = checkpoint(CHECKPOINTS[name])
        assert plain.prediction_type == "epsilon"
        assert not scheduler_config(plain.json("scheduler")).rescale_betas_zero_snr
        v = checkpoint({**CHECKPOINTS[name], "v_pred": marker})
        assert v.prediction_type == scheduler_config(v.json("scheduler")).prediction_type == "v_prediction"
        both = scheduler_config(checkpoint({**CHECKPOINTS[name], "v_pred": marker, "ztsnr": marker}).json("scheduler"))
        assert both.rescale_betas_zero_snr, "no scheduler may drop it in silence"
        assert both.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("name", "kind"), [("SD 1.5", "pndm"), ("SD 2.1", "ddim"), ("SDXL base", "euler"), ("SDXL refiner", "euler")]
)
def test_the_schedule_of_the_published_folder(name: str, kind: str) -> None:
    found = scheduler_config(checkpoint(CHECKPOINTS[name]).json("scheduler"))
    assert found.kind == kind
    assert (found.beta_start, found.beta_end, found.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (found.num_train_timesteps, found.steps_offset, found.timestep_spacing) == (1000, 1, "leading")
    assert not found.clip_sample


# --------------------------------------------------------------------------------------------- a configuration given


def test_unusual_dimensions_need_a_configuration() -> None:
    """A U-Net that reads text of another width is of no known family."""
    odd = originals.latent_diffusion(replace(originals.SD15_UNET, context=512), {})
    with pytest.raises(FileError, match=r"512 wide.*768 .*1024 .*pass config=") as caught:
        checkpoint(odd)
    assert caught.value.field == "config"
    found = checkpoint(odd, configured=True)
    assert parsed(found, "unet") == replace(presets.SD15_UNET, context_dim=512)


def test_a_configuration_given_is_the_one_that_counts() -> None:
    found = checkpoint(CHECKPOINTS["SD 1.5"], configured=True)
    given = {**found.json("unet"), "attention_head_dim": 16}
    part = found.part("unet", given, "folder/unet/config.json")
    assert (part.json, part.where) == (given, "folder/unet/config.json")
    fewer = presets.SD15_UNET.down[:-1]
    smaller = replace(presets.SD15_UNET, down=fewer, up=mirrored(fewer))
    with pytest.raises(WeightsError, match=r"are missing: model\.diffusion_model\.output_blocks\.0\.1\.norm\.bias"):
        part.open(smaller, hub_names("unet", smaller))


def test_uneven_levels_are_refused() -> None:
    block = f"{UNET}input_blocks.2.1."
    error = refused({n: t for n, t in CHECKPOINTS["SD 1.5"].items() if not n.startswith(block)})
    assert "depths [[1, 0], [1, 1], [1, 1], [0, 0]]" in str(error)


def test_networks_are_shared_and_not_filled() -> None:
    assert all(p.is_meta for p in network("unet", presets.SD15_UNET).parameters())
