"""The original layout of Stable Diffusion's files: where each tensor of the hub's layout lies in it.

The definitions whose names these are: `ldm/modules/diffusionmodules/{openaimodel,model}.py` of
https://github.com/CompVis/stable-diffusion, and `open_clip/transformer.py` of https://github.com/mlfoundations/open_clip.
One direction serves both: reading looks up what the model needs, writing gathers what goes into each name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fastldm.config import TextConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the original layout: its name there, and in which form.

    part: which third of the rows, where query, key and value are one tensor. transposed: (in, out) in the file.
    conv: a 1×1 convolution in the file, a linear layer on the hub.
    """

    name: str
    part: int | None = None
    transposed: bool = False
    conv: bool = False

    def shape_here(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The hub's shape of a tensor with `shape` in the file."""
        if self.part is not None and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        if self.conv and shape[2:] == (1, 1):
            return shape[:2]
        return shape[::-1] if self.transposed else shape

    def here(self, tensor: Tensor) -> Tensor:
        """A tensor of the file in the hub's form."""
        if self.part is not None:
            return tensor.chunk(3)[self.part]
        if self.transposed:
            return tensor.T.contiguous()
        return tensor[:, :, 0, 0] if self.conv and tensor.ndim == 4 else tensor

    def there(self, tensor: Tensor) -> Tensor:
        """A tensor of the hub in the file's form; the thirds are joined by the caller."""
        if self.transposed:
            return tensor.T.contiguous()
        return tensor[:, :, None, None] if self.conv and tensor.ndim == 2 else tensor


Places = Callable[[str], Place]
"""The hub's name of a tensor, as `keymap.present_name` spells it -> its place."""


def unet_places(config: UNetConfig) -> Places:
    """In `UNetModel`: the blocks of all levels are numbered through, and so are their changes of size."""
    modules = dict(_UNET)
    index = 1  # input_blocks.0 is the first convolution
    for i, level in enumerate(config.down):
        for j in range(level.layers):
            modules[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{index}.0"
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{index}.1"
            index += 1
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
        index += 1
    index = 0
    for i, level in enumerate(config.up):
        for j in range(level.layers):
            modules[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{index}.0"
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{index}.1"
            index += 1
        behind = 2 if level.depth else 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{behind}.conv"
    return lambda name: Place(_renamed(name, modules, _UNET_BLOCK))


def vae_places(config: VAEConfig) -> Places:
    """In `AutoencoderKL`: levels count from the finest resolution in the decoder, too; attention is of convolutions."""
    modules = dict(_VAE)
    last = len(config.channels) - 1
    for i in range(last + 1):
        for j in range(config.layers):
            modules[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(config.layers + 1):
            modules[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{last - i}.block.{j}"
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{last - i}.upsample.conv"

    def place(name: str) -> Place:
        weight = ".attentions." in name and name.endswith(".weight") and ".group_norm." not in name
        return Place(_renamed(name, modules, _VAE_BLOCK), conv=weight)

    return place


def clip_places(config: TextConfig) -> Places:
    """In `FrozenCLIPEmbedder`, which holds the hub's own text model."""
    return Place


def open_clip_places(config: TextConfig) -> Places:
    """In the text tower of `open_clip.CLIP`, whose attention is torch's `MultiheadAttention`."""
    modules = dict(_OPEN_CLIP)
    for i in range(config.layers):
        modules[f"encoder.layers.{i}"] = f"transformer.resblocks.{i}"

    def place(name: str) -> Place:
        if name in _OPEN_CLIP_PARAMETERS:
            return Place(_OPEN_CLIP_PARAMETERS[name], transposed=name == "text_projection.weight")
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        if projection in _QKV:
            attention = _renamed(parent, modules, _OPEN_CLIP_BLOCK)
            return Place(f"{attention}.in_proj_{kind}", part=_QKV.index(projection))
        return Place(_renamed(name, modules, _OPEN_CLIP_BLOCK))

    return place


def ema_name(name: str) -> str:
    """How `LitEma` names its copy of a tensor of the U-Net, "input_blocks.0.0.weight": a buffer's name has no dots."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    f"{side}.{hub}": f"{side}.{original}"
    for side in ("encoder", "decoder")
    for hub, original in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.attentions.0": "mid.attn_1",
        "mid_block.resnets.1": "mid.block_2",
        "conv_norm_out": "norm_out",
    }.items()
}
_VAE_BLOCK = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
_OPEN_CLIP_PARAMETERS = {  # that belong to no module there, so that their names have no ".weight"
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def _renamed(name: str, modules: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """`name` with its longest known module renamed, and what is in that module by `inner`."""
    for module, rest in _splits(name):
        if module in modules:
            inside = next(((inner[head], tail) for head, tail in _splits(rest) if head in inner), ("", rest))
            return ".".join(filter(None, (modules[module], *inside)))
    return name


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """("a.b.c", ""), ("a.b", "c"), ("a", "b.c")"""
    parts = name.split(".")
    return ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts), 0, -1))
