"""Where each of the hub's tensors lies in the original layout, with diffusers' converters as a second opinion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from fastldm import config as presets
from fastldm.config import Level, UNetConfig, VAEConfig, mirrored
from fastldm.weights import ldm
from fastldm.weights.keymap import present_name
from fastldm.weights.ldm import Place, Places
from fastldm.weights.load import StateDict
from fastldm.weights.single import Renamed
from tests.model import full_size
from tests.model.test_full_size import hub_text
from tests.weights import originals
from tests.weights.named import TEXT, UNET, VAE, hub_names
from tests.weights.originals import Named, Shape
from tests.weights.test_originals import REFINER_UNET

# ------------------------------------------------------------------------------------------------- one tensor's form


@pytest.mark.parametrize(
    ("place", "shape"),
    [
        (Place("a"), (3, 4)),
        (Place("a"), (3, 4, 3, 3)),
        (Place("a"), (5,)),
        (Place("a", transposed=True), (3, 4)),
        (Place("a", conv=True), (3, 4)),
    ],
)
def test_there_and_here_again(place: Place, shape: Shape) -> None:
    tensor = torch.randn(shape)
    there = place.there(tensor)
    assert torch.equal(place.here(there), tensor)
    assert place.shape_here(tuple(there.shape)) == shape


def test_the_forms_in_the_file() -> None:
    tensor = torch.randn(3, 4)
    assert torch.equal(Place("a", transposed=True).there(tensor), tensor.T)
    assert Place("a", conv=True).there(tensor).shape == (3, 4, 1, 1)
    linear = Place("a", conv=True)  # some tools write a linear layer, as the hub has it
    assert torch.equal(linear.here(tensor), tensor)
    assert linear.shape_here((3, 4)) == (3, 4)


@pytest.mark.parametrize("shape", [(6, 4), (6,), (9, 3)])
def test_thirds(shape: Shape) -> None:
    tensor = torch.randn(shape)
    places = [Place("a", part=i) for i in range(3)]
    thirds = [place.here(tensor) for place in places]
    assert {place.shape_here(shape) for place in places} == {tuple(third.shape) for third in thirds}
    assert torch.equal(torch.cat([p.there(t) for p, t in zip(places, thirds, strict=True)]), tensor)


# ------------------------------------------------------------------------------------------- all tensors of a model

_UNEVEN_DOWN = (Level(8, 1, 0, 1), Level(24, 3, 2, 3), Level(16, 2, 1, 2), Level(16, 1, 0, 2), Level(8, 2, 3, 1))
UNEVEN = replace(presets.SD15_UNET, down=_UNEVEN_DOWN, up=mirrored(_UNEVEN_DOWN), mid_depth=3, groups=1)
ONE_LEVEL = replace(UNEVEN, down=_UNEVEN_DOWN[1:2], up=mirrored(_UNEVEN_DOWN[1:2]), mid_depth=2)
VAE_UNEVEN = replace(presets.SD_VAE, channels=(4, 12, 8), layers=3, groups=1, latent_channels=6)
VAE_ONE_LEVEL = replace(presets.SD_VAE, channels=(4,), layers=1, groups=1)
_REFINER_DOWN = (Level(384, 2, 0, 6), Level(768, 2, 4, 12), Level(1536, 2, 4, 24), Level(1536, 2, 0, 24))
REFINER = replace(presets.SDXL_UNET, down=_REFINER_DOWN, up=mirrored(_REFINER_DOWN), mid_depth=4, context_dim=1280)

MODELS: dict[str, tuple[str, Any, Places, Named | None]] = {
    "SD 1.5 U-Net": (
        "unet",
        presets.SD15_UNET,
        ldm.unet_places(presets.SD15_UNET),
        originals.unet(originals.SD15_UNET),
    ),
    "SDXL U-Net": (
        "unet",
        presets.SDXL_UNET,
        ldm.unet_places(presets.SDXL_UNET),
        originals.unet(originals.SDXL_UNET),
    ),
    "refiner U-Net": ("unet", REFINER, ldm.unet_places(REFINER), originals.unet(originals.REFINER_UNET)),
    "uneven U-Net": ("unet", UNEVEN, ldm.unet_places(UNEVEN), None),
    "U-Net of one level": ("unet", ONE_LEVEL, ldm.unet_places(ONE_LEVEL), None),
    "autoencoder": ("vae", presets.SD_VAE, ldm.vae_places(presets.SD_VAE), originals.vae()),
    "uneven autoencoder": (
        "vae",
        VAE_UNEVEN,
        ldm.vae_places(VAE_UNEVEN),
        originals.vae(4, (1, 3, 2), res_blocks=3, latent=6),
    ),
    "autoencoder of one level": (
        "vae",
        VAE_ONE_LEVEL,
        ldm.vae_places(VAE_ONE_LEVEL),
        originals.vae(4, (1,), res_blocks=1),
    ),
    "CLIP ViT-L": ("text_encoder", presets.CLIP_L, ldm.clip_places(presets.CLIP_L), None),
    "OpenCLIP ViT-H": ("text_encoder", presets.OPENCLIP_H, ldm.open_clip_places(presets.OPENCLIP_H), None),
    "OpenCLIP ViT-bigG": (
        "text_encoder_2",
        presets.OPENCLIP_BIGG,
        ldm.open_clip_places(presets.OPENCLIP_BIGG),
        originals.vit_bigg(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_a_place_of_its_own(name: str) -> None:
    """Three thirds share one; the places are exactly the original's tensors where these are known."""
    component, config, places, original = MODELS[name]
    found = [places(hub) for hub in hub_names(component, config)]
    assert len(set(found)) == len(found)
    by_name: dict[str, list[int | None]] = {}
    for place in found:
        by_name.setdefault(place.name, []).append(place.part)
    assert all(parts == [None] or sorted(p or 0 for p in parts) == [0, 1, 2] for parts in by_name.values())
    if original is not None:
        assert by_name.keys() == dict(original).keys() - {"logit_scale"}
    if component == "unet":
        assert len({ldm.ema_name(place.name) for place in found}) == len(found)
        assert not any(part in place.name for place in found for part in ("resnets", "attentions", "conv_", "samplers"))


# ---------------------------------------------------------------------------------------- against diffusers' converters


def randoms(named: Named, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in named}


def renamed(component: str, config: Any, places: Places, tensors: dict[str, Tensor], prefix: str) -> Renamed:
    found = {hub: places(hub) for hub in hub_names(component, config)}
    return Renamed(StateDict("f", tensors), {hub: replace(p, name=prefix + p.name) for hub, p in found.items()}, [])


def assert_same(ours: Renamed, theirs: dict[str, Tensor]) -> None:
    expected = {present_name(name): tensor for name, tensor in theirs.items()}
    assert ours.infos.keys() == expected.keys() - {None}
    for name in ours.infos:
        assert torch.equal(ours.read(name), expected[name]), name
        assert ours.infos[name].shape == tuple(expected[name].shape)


def narrow(model: originals.UNet, channels: int = 2) -> originals.UNet:
    """The same blocks with few channels."""
    return replace(model, model_channels=channels, context=6, vector=None if model.vector is None else 10)


def narrowed(config: UNetConfig, channels: int = 2) -> UNetConfig:
    scale = config.down[0].channels // channels
    down = tuple(replace(level, channels=level.channels // scale, heads=1) for level in config.down)
    added = None if config.added is None else replace(config.added, number_dim=2, total_dim=10)
    return replace(config, down=down, up=mirrored(down), groups=1, context_dim=6, added=added)


@pytest.mark.parametrize(
    ("config", "model", "hub"),
    [
        (presets.SD15_UNET, originals.SD15_UNET, full_size.SD15_UNET),
        (presets.SD21_UNET, originals.SD21_UNET, full_size.SD21_UNET),
        (presets.SDXL_UNET, originals.SDXL_UNET, full_size.SDXL_UNET),
        (REFINER, originals.REFINER_UNET, REFINER_UNET),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL", "refiner"],
)
def test_unet_as_diffusers_converts_it(config: UNetConfig, model: originals.UNet, hub: dict[str, Any]) -> None:
    """All blocks, few channels: its converter looks at names alone."""
    small = narrowed(config)
    tensors = randoms(originals.unet(narrow(model)), UNET)
    ours = renamed("unet", small, ldm.unet_places(small), tensors, UNET)
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), hub)
    convs = {name: t for name, t in theirs.items() if name.endswith(("proj_in.weight", "proj_out.weight"))}
    assert {t.ndim for t in convs.values()} == ({2} if model.linear else {4})
    assert_same(ours, theirs)


def test_averages_as_diffusers_extracts_them() -> None:
    small = narrowed(presets.SD15_UNET)
    trained = randoms(originals.unet(narrow(originals.SD15_UNET)), UNET)
    averages = {ldm.ema_name(name.removeprefix(UNET)): tensor + 1 for name, tensor in trained.items()}
    places = ldm.unet_places(small)
    found = {hub: Place(ldm.ema_name(places(hub).name)) for hub in hub_names("unet", small)}
    ours = Renamed(StateDict("f", averages), found, [])
    both = {**averages, **trained}
    assert_same(ours, single_file_utils.convert_ldm_unet_checkpoint(both, full_size.SD15_UNET, extract_ema=True))


@pytest.mark.parametrize(
    ("config", "original"),
    [
        (replace(presets.SD_VAE, channels=(4, 8, 16, 16), groups=1), originals.vae(4)),
        (VAE_UNEVEN, originals.vae(4, (1, 3, 2), res_blocks=3, latent=6)),
        (VAE_ONE_LEVEL, originals.vae(4, (1,), res_blocks=1)),
    ],
    ids=["published", "uneven", "one level"],
)
def test_autoencoder_as_diffusers_converts_it(config: VAEConfig, original: Named) -> None:
    tensors = randoms(original, VAE)
    ours = renamed("vae", config, ldm.vae_places(config), tensors, VAE)
    n = len(config.channels)
    hub = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    hub |= {"layers_per_block": config.layers}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), hub)
    assert_same(ours, theirs)


@pytest.mark.parametrize("projected", [False, True])
def test_open_clip_as_diffusers_converts_it(projected: bool) -> None:
    """Three layers; the projection is not square, so that its transposition shows in the shape, too."""
    prefix = "conditioner.embedders.1.model." if projected else f"{TEXT}model."
    config = replace(
        presets.OPENCLIP_BIGG if projected else presets.OPENCLIP_H, width=4, mlp_width=16, layers=3, heads=1
    )
    hub = {**full_size.OPENCLIP_BIGG, "hidden_size": 4, "intermediate_size": 16, "num_hidden_layers": 3}
    tensors = randoms(originals.open_clip(4, 3), prefix)
    if projected:
        config = replace(config, projection_dim=6)
        tensors[f"{prefix}text_projection"] = torch.randn(4, 6)
    ours = renamed("text_encoder", config, ldm.open_clip_places(config), tensors, prefix)
    expected = {**hub, "num_attention_heads": 1, "projection_dim": 6}
    theirs = single_file_utils.convert_open_clip_checkpoint(Expected(expected), dict(tensors), prefix)
    theirs = {name: t for name, t in theirs.items() if projected or not name.startswith("text_projection")}
    assert_same(ours, theirs)


class Expected:
    """What the converter asks of the model that it converts for: its width and its names."""

    def __init__(self, hub: dict[str, Any]) -> None:
        names = hub_text(hub)
        self.config = type("Config", (), {"hidden_size": hub["hidden_size"], "projection_dim": hub["projection_dim"]})
        self.names = {f"text_model.{n}" if not n.startswith(("text_model.", "text_pro")) else n for n in names}

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self.names)


def test_clip_as_diffusers_converts_it() -> None:
    prefix = f"{TEXT}transformer."
    config = replace(presets.CLIP_L, width=4, mlp_width=8, layers=2, heads=1, vocab_size=9, positions=5)
    tensors = {f"{prefix}text_model.{hub}": torch.randn(3, len(hub)) for hub in hub_names("text_encoder", config)}
    ours = renamed("text_encoder", config, ldm.clip_places(config), tensors, f"{prefix}text_model.")
    assert_same(ours, single_file_utils.convert_ldm_clip_checkpoint(dict(tensors)))
