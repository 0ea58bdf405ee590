"""The data of `originals.py` are right: they agree with what was published about the files, and with diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from torch import nn

from tests.model import full_size
from tests.weights import originals
from tests.weights.originals import CHECKPOINTS, Shape, Shapes, Tensors
from tests.weights.other_kinds import KINDS

BYTES = {"F16": 2, "F32": 4, "I32": 4, "I64": 8}
PARTS = {
    "SD 1.5 U-Net": list(originals.unet(originals.SD15_UNET)),
    "SD 2.1 U-Net": list(originals.unet(originals.SD21_UNET)),
    "SDXL U-Net": list(originals.unet(originals.SDXL_UNET)),
    "refiner U-Net": list(originals.unet(originals.REFINER_UNET)),
    "autoencoder": list(originals.vae()),
    "CLIP ViT-L": list(originals.clip_l()),
    "OpenCLIP ViT-H": list(originals.vit_h()),
    "OpenCLIP ViT-bigG": list(originals.vit_bigg()),
}


def parameters(named: Iterable[tuple[str, Shape]]) -> int:
    return sum(math.prod(shape) for _, shape in named)


@pytest.mark.parametrize(
    ("part", "tensors", "millions", "source"),
    [
        ("SD 1.5 U-Net", 686, 859.52, "CompVis/stable-diffusion logs 'DiffusionWrapper has 859.52 M params.'"),
        ("SD 2.1 U-Net", 686, 865.91, "Stability-AI/stablediffusion logs 'DiffusionWrapper has 865.91 M params.'"),
        ("SDXL U-Net", 1680, 2567.46, "the SDXL paper, table 1: 2.6B; parameters counted in the hub's unet/"),
        ("refiner U-Net", 1220, 2259.53, "no figure published; the list below has these tensors"),
        ("autoencoder", 248, 83.65, "CompVis/latent-diffusion logs 'AutoencoderKL has 83.65 M params.'"),
        ("CLIP ViT-L", 196, 123.06, "the SDXL paper, table 1, has 817M for both text encoders"),
        ("OpenCLIP ViT-H", 294, 354.03, "mlfoundations/open_clip: docs/model_profile.csv, text_mparams"),
        ("OpenCLIP ViT-bigG", 390, 694.66, "mlfoundations/open_clip: docs/model_profile.csv, text_mparams"),
    ],
)
def test_tensors_and_parameters(part: str, tensors: int, millions: float, source: str) -> None:
    assert len(PARTS[part]) == len(dict(PARTS[part])) == tensors
    assert round(parameters(PARTS[part]) / 1e6, 2) == millions, source


def test_clip_with_its_projection_is_open_clips() -> None:
    """docs/model_profile.csv has ViT-L-14 with 123.65M: with the projection and the scale, which SD does not use."""
    assert round((parameters(PARTS["CLIP ViT-L"]) + 768 * 768 + 1) / 1e6, 2) == 123.65


@pytest.mark.parametrize(
    ("part", "characters"),
    [
        ("SD 1.5 U-Net", 36314),  # UNET-v1-SD.txt
        ("SD 2.1 U-Net", 36218),  # UNET-v2-SD.txt
        ("SDXL U-Net", 101976),  # UNET-XL-SD.txt
        ("refiner U-Net", 71062),  # UNET-XL-Refiner.txt
        ("autoencoder", 10149),  # VAE-v1-SD.txt
        ("OpenCLIP ViT-H", 14193),  # CLIP-v2-SD.txt
        ("OpenCLIP ViT-bigG", 18913),  # CLIP-XL-SD.txt
    ],
)
def test_as_long_as_the_list_of_a_published_file(part: str, characters: int) -> None:
    """arenasys/stable-diffusion-webui-model-toolkit: components/*.txt lists real files, "name [1,2]" a line."""
    assert len(listing(PARTS[part])) == characters


def test_as_long_as_the_lists_of_clip_and_of_the_averages() -> None:
    """CLIP-v1-SD.txt, which has the positions, and UNET-v1-EMA.txt. The prefixes are apart in these lists."""
    clip = [(name.removeprefix("text_model."), shape) for name, shape in PARTS["CLIP ViT-L"]]
    assert len(listing([*clip, ("embeddings.position_ids", (1, 77))])) == 8744
    averages = originals.shapes(originals.ema(originals.SD15_UNET))
    prefix = "model_ema.diffusion_model"
    assert len(listing((name.removeprefix(prefix), shape) for name, shape in averages.items())) == 32390


def test_as_long_as_the_list_of_a_controlnet() -> None:
    """ControlNet-v1-SD.txt."""
    assert len(listing(KINDS["bare ControlNet"].shapes.items())) == 16884


def listing(named: Iterable[tuple[str, Shape]]) -> str:
    return "\n".join(f"{name} [{','.join(map(str, shape))}]" for name, shape in named)


@pytest.mark.parametrize(
    ("checkpoint", "tensors", "size", "metadata"),
    [
        ("SD 1.5", 1145, 4265146304, True),  # v1-5-pruned-emaonly.safetensors, and its header has 156444 bytes
        ("SD 1.5 inpainting", 1145, 4265203873, False),  # webui/stable-diffusion-inpainting: sd-v1-5-inpainting
        ("SD 1.5 pruned", 1131, 2132625894, False),  # DreamShaper_8_pruned.safetensors
        ("SD 2.1", 1242, 5214604494, True),  # v2-1_768-ema-pruned.safetensors
        ("SDXL merged", 2515, 6938040682, False),  # bluePencilXL_v050.safetensors
    ],
)
def test_published_size_to_the_byte(checkpoint: str, tensors: int, size: int, metadata: bool) -> None:
    """The hub's sizes. A header spells every name and shape, so that a wrong one would show."""
    data = CHECKPOINTS[checkpoint]
    assert len(data) == tensors
    header = len(safetensors_header(data, metadata))
    if checkpoint == "SD 1.5 pruned":  # written by safetensors 0.3 or later, which fills the header up
        header += -header % 8
    assert 8 + header + sum(nbytes(*tensor) for tensor in data.values()) == size


def safetensors_header(tensors: Tensors, metadata: bool) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    start = 0
    for name, (shape, dtype) in sorted(tensors.items()):
        end = start + nbytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    return json.dumps(header, separators=(",", ":"))


def nbytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * BYTES[dtype]


REFINER_UNET = {
    **full_size.SDXL_UNET,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # stabilityai/stable-diffusion-xl-refiner-1.0: unet/config.json


@pytest.mark.parametrize(
    ("checkpoint", "config"),
    [
        ("SD 1.5", full_size.SD15_UNET),
        ("SD 1.5 with averages", full_size.SD15_UNET),
        ("SD 1.5 inpainting", full_size.SD15_INPAINTING_UNET),
        ("SD 2.1", full_size.SD21_UNET),
        ("SDXL base", full_size.SDXL_UNET),
        ("SDXL refiner", REFINER_UNET),
    ],
)
def test_diffusers_makes_its_unet_of_it(checkpoint: str, config: dict[str, Any]) -> None:
    converted = single_file_utils.convert_ldm_unet_checkpoint(on_meta(checkpoint), config)
    with torch.device("meta"):
        assert shapes(converted) == module_shapes(diffusers.UNet2DConditionModel.from_config(config))


def test_diffusers_finds_the_averages() -> None:
    """It looks for the name of each parameter without its dots, and would find nothing under another."""
    tensors = {
        name: tensor for name, tensor in on_meta("SD 1.5 with averages").items() if name.startswith("model_ema.diff")
    }
    trained = {name: torch.empty(()) for name in originals.SD15 if name.startswith("model.diffusion_model.")}
    converted = single_file_utils.convert_ldm_unet_checkpoint(tensors | trained, full_size.SD15_UNET, extract_ema=True)
    with torch.device("meta"):
        assert shapes(converted) == module_shapes(diffusers.UNet2DConditionModel.from_config(full_size.SD15_UNET))


@pytest.mark.parametrize("checkpoint", ["SD 1.5", "SD 2.1", "SDXL base", "SDXL refiner"])
def test_diffusers_makes_its_autoencoder_of_it(checkpoint: str) -> None:
    config = full_size.SD15_VAE
    converted = single_file_utils.convert_ldm_vae_checkpoint(on_meta(checkpoint), config)
    with torch.device("meta"):
        assert shapes(converted) == module_shapes(diffusers.AutoencoderKL.from_config(config))


@pytest.mark.parametrize("checkpoint", ["SD 1.5", "SDXL base"])
def test_diffusers_makes_clip_of_it(checkpoint: str) -> None:
    converted = single_file_utils.convert_ldm_clip_checkpoint(on_meta(checkpoint))
    positions = [name for name in converted if name.endswith("position_ids")]
    assert [tuple(converted.pop(name).shape) for name in positions] == [(1, 77)]
    assert hub_names(converted) == hub_names(text_encoder(full_size.CLIP_L).state_dict())


@pytest.mark.parametrize(
    ("checkpoint", "prefix", "config"),
    [
        ("SD 2.1", "cond_stage_model.model.", full_size.OPENCLIP_H),
        ("SD 2.1 with a pruned text encoder", "cond_stage_model.model.", full_size.OPENCLIP_H),
        ("SDXL base", "conditioner.embedders.1.model.", full_size.OPENCLIP_BIGG),
        ("SDXL refiner", "conditioner.embedders.0.model.", full_size.OPENCLIP_BIGG),
    ],
)
def test_diffusers_makes_open_clip_of_it(checkpoint: str, prefix: str, config: dict[str, Any]) -> None:
    model = text_encoder(config)
    converted = single_file_utils.convert_open_clip_checkpoint(model, on_meta(checkpoint), prefix)
    if config is full_size.OPENCLIP_H:
        converted.pop("text_projection.weight", None)
    assert hub_names(converted) == hub_names(model.state_dict())


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("SD 1.5 U-Net", ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]),
        ("SD 2.1 U-Net", ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]),
        ("SDXL U-Net", ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]),
        ("refiner U-Net", ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]),
    ],
)
def test_upsamplers_stand_behind_the_attention(part: str, names: list[str]) -> None:
    """city96/ComfyUI-GGUF: tools/convert.py tells SD 1 and SDXL apart by these. diffusers reads either name."""
    found = [name for name, _ in PARTS[part] if name.endswith(".conv.weight")]
    assert found == [f"{name}.weight" for name in names]


def test_only_the_first_layer_tells_the_tasks_apart() -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for base, other, channels in (
        (originals.SD15, originals.SD15_INPAINTING, 9),
        (originals.SD15, originals.PIX2PIX, 8),
        (originals.SD21, originals.SD20_INPAINTING, 9),
        (originals.SDXL_BASE, originals.SDXL_INPAINTING, 9),
    ):
        assert base.keys() == other.keys()
        assert [name for name in base if base[name] != other[name]] == [first]
        assert other[first][0] == (320, channels, 3, 3)


@pytest.mark.parametrize(
    ("name", "model_type"),
    {
        "SD 1.5": "v1",
        "SD 1.5 inpainting": "inpainting",
        "instruct-pix2pix": "instruct-pix2pix",
        "SD 2.1": "v2",
        "SD 2 inpainting": "inpainting_v2",
        "SDXL base": "xl_base",
        "SDXL refiner": "xl_refiner",
        "SDXL inpainting": "xl_inpaint",
        "ControlNet": "controlnet",
        "ControlNet of the hub": "controlnet",
        "ControlNet of the hub for SDXL": "controlnet_xl_large",
        "AnimateDiff": "animatediff_v1",
        "AnimateDiff 2": "animatediff_v2",
        "Playground v2.5": "playground-v2-5",
        "SD 3 transformer": "sd3",
        "SD 3 medium": "sd3",
        "SD 3.5 large": "sd35_large",
        "Flux": "flux-dev",
        "Flux with its prefix": "flux-dev",
        "Chroma": "chroma",
        "AuraFlow": "auraflow",
        "Sana": "sana",
        "Stable Cascade, stage B": "stable_cascade_stage_b",
        "Stable Cascade, stage C": "stable_cascade_stage_c",
        "Lumina 2": "lumina2",
        "Z-Image": "z-image-turbo",
        "Wan": "wan-t2v-1.3B",
        "LTX-Video": "ltx-video",
        "HunyuanVideo": "hunyuan-video",
    }.items(),
)
def test_diffusers_takes_it_for_what_it_is(name: str, model_type: str) -> None:
    assert single_file_utils.infer_diffusers_model_type(on_meta(name)) == model_type


def on_meta(name: str) -> dict[str, torch.Tensor]:
    found = originals.shapes(CHECKPOINTS[name]) if name in CHECKPOINTS else KINDS[name].shapes
    return {name: torch.empty(shape, device="meta") for name, shape in found.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def module_shapes(model: nn.Module) -> Shapes:
    return shapes(model.state_dict())


def text_encoder(config: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return model(transformers.CLIPTextConfig(**{k: v for k, v in config.items() if k != "architectures"}))


def hub_names(tensors: dict[str, torch.Tensor]) -> Shapes:
    """transformers 4 and 5 differ in whether the names begin with "text_model."."""
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in tensors.items()}
