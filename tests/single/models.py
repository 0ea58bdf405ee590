"""Tiny pipelines of diffusers, in both layouts.

Every parameter is random, biases and norms too: two tensors that change places would show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastldm
from fastldm.assemble import Asked
from fastldm.convert import convert
from fastldm.weights.keymap import addresses, present_name
from tests import oracle

CAT = "the red cat"


@dataclass(frozen=True)
class Kind:
    """What tells the models apart; kind: diffusers' class."""

    unet: Mapping[str, Any]
    text: str = "clip"
    prediction_type: str = "epsilon"
    channels: int = 4
    kind: type = diffusers.StableDiffusionPipeline
    seed: int = 7


SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
# The first level without attention, several transformers in a row, a single group.
DEEP = {
    "block_out_channels": (8, 24, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 3, 2),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 3),
    "norm_num_groups": 1,
    "use_linear_projection": True,
}
KINDS = {
    "sd1": Kind(SMALL),
    "sd1 levels": Kind(oracle.SD1),
    "sd1 v": Kind(SMALL, prediction_type="v_prediction"),
    "sd2": Kind(oracle.SD2, "open_clip", "v_prediction"),
    "sd2 epsilon": Kind(oracle.SD2, "open_clip"),
    "deep": Kind(DEEP, "open_clip"),
    "inpainting": Kind(SMALL, channels=9, kind=diffusers.StableDiffusionInpaintPipeline),
    "sd2 inpainting": Kind(oracle.SD2, "open_clip", channels=9, kind=diffusers.StableDiffusionInpaintPipeline),
    "instruct": Kind(SMALL, channels=8, kind=diffusers.StableDiffusionInstructPix2PixPipeline),
}
ANOTHER = Kind(SMALL, seed=8)
NETWORKS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True, eq=False)
class Sample:
    """A model in three places: diffusers' pipeline, the folder that it wrote, and the file that we made of this."""

    ref: Any
    folder: Path
    file: Path

    def fast(self, **options: Any) -> fastldm.Pipeline:
        return fastldm.Pipeline(self.file, config=self.folder, **options)


def sample(kind: Kind, folder: Path) -> Sample:
    ref = randomised(pipeline(kind), kind.seed)
    oracle.saved(ref, folder / "model")
    return Sample(ref, folder / "model", converted(folder / "model", folder / "model.safetensors"))


def pipeline(kind: Kind) -> Any:
    parts = dict(oracle.stable_diffusion(prediction_type=kind.prediction_type).components)
    parts["unet"] = diffusers.UNet2DConditionModel(
        in_channels=kind.channels, out_channels=4, cross_attention_dim=24, sample_size=16, **kind.unet
    )
    if kind.text == "open_clip":
        parts["text_encoder"].config.hidden_act = "gelu"
        parts["text_encoder"] = transformers.CLIPTextModel(parts["text_encoder"].config)
    if kind.kind is not diffusers.StableDiffusionPipeline:
        parts.pop("image_encoder")
    return kind.kind(**parts, requires_safety_checker=False)


def randomised(ref: Any, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for module in ref.components.values():
        if isinstance(module, nn.Module):
            for parameter in module.eval().requires_grad_(False).parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ref.set_progress_bar_config(disable=True)
    return ref


def converted(source: Path, out: Path, *, dtype: str | None = None, **asked: Any) -> Path:
    return convert(Asked(source, **asked), out, dtype=dtype, progress=lambda done, total: None)


def as_ckpt(file: Path, out: Path) -> Path:
    """The same tensors as training saves them."""
    torch.save({"state_dict": load_file(file), "global_step": 470000}, out)
    return out


def rewritten(file: Path, out: Path, change: Any) -> Path:
    """The file with its tensors, a dictionary, changed in place by `change`."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, out, metadata={"format": "pt"})
    return out


@cache
def theirs(file: Path, config: Path, kind: type = diffusers.StableDiffusionPipeline) -> Any:
    """diffusers' own reading of the file, once; it is not to be changed."""
    pipe = kind.from_single_file(  # type: ignore[attr-defined]
        str(file), config=str(config), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: Any) -> dict[str, Tensor]:
    """{component and the hub's name: weight}, of diffusers' pipeline or of ours."""
    return {f"{name} {hub}": weight for name in NETWORKS for hub, weight in _weights(pipe, name)}


def _weights(pipe: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(pipe, fastldm.Pipeline):
        network = getattr(pipe._engine, name)
        for hub, address in addresses(network).items():
            yield hub, network.get_parameter(address.parameter)[address.start : address.stop]
        return
    for key, weight in getattr(pipe, name).state_dict().items():
        if (hub := present_name(key)) is not None:
            yield hub, weight


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and bits; a 1×1 convolution may be a linear layer."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name].reshape(weight.shape), weight), name


def image(pipe: Any, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    size = {} if "image" in call else {"height": 32, "width": 32}
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 4.0, **size, **call}
    return torch.as_tensor(pipe(CAT, generator=generator, **options).images)


@cache
def painted(made: Sample) -> Tensor:
    """What the folder paints."""
    return image(fastldm.Pipeline(made.folder))
