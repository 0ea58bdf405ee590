"""Dimensions from the names and shapes of original checkpoints, as the hub's configuration keys.

What a configuration could say wrongly, the tensors say truly. Only what no shape shows comes from the `Family`.
`shapes` are those of one part of a file, {name without the part's prefix: shape}; `prefix` is that, for messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from fastldm.errors import WeightsError
from fastldm.weights.families import TEXT_HEAD_DIM, Family, Text

Shapes = Mapping[str, tuple[int, ...]]
MODULE_DEPTH = 5  # input_blocks.1.1.transformer_blocks.0
NUMBER_DIM = 256  # of each of SDXL's sizes, as a sinusoid
EOS = 49407


def unet_json(shapes: Shapes, family: Family, where: str, prefix: str = "") -> dict[str, Any]:
    """The hub's `unet/config.json` for a `UNetModel`. Raises `WeightsError` naming a tensor that has no such shape."""
    see = _Sight(shapes, where, prefix)
    levels: list[list[int]] = [[]]  # of the way down: the depth of each residual block's transformer
    channels = [see.size("input_blocks.0.0.weight", 0)]
    for i in itertools.count(1):
        if see.has(f"input_blocks.{i}.0.op"):
            levels.append([])
            channels.append(channels[-1])
        elif see.has(f"input_blocks.{i}.0"):
            levels[-1].append(see.depth(f"input_blocks.{i}.1"))
            channels[-1] = see.size(f"input_blocks.{i}.0.in_layers.2.weight", 0)
        else:
            break
    for level in levels:
        if len(set(level)) != 1:
            raise see.fail("input_blocks.1.0.in_layers.2.weight", f"levels of the U-Net have the depths {levels}")
    depths = [level[0] for level in levels]
    middle = see.depth("middle_block.1")
    added = see.has("label_emb.0.0")
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": see.size("input_blocks.0.0.weight", 1),
        "out_channels": see.size("out.2.weight", 0),
        "sample_size": family.pixels // 8,
        "block_out_channels": channels,
        "layers_per_block": [len(level) for level in levels],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if see.has("middle_block.0") else None,
        "transformer_layers_per_block": [*(max(depth, 1) for depth in depths[:-1]), middle or max(depths[-1], 1)],
        "attention_head_dim": family.unet_heads(channels),
        "cross_attention_dim": context_dim(shapes),
        "use_linear_projection": any(name.endswith(".proj_in.weight") and len(s) == 2 for name, s in shapes.items()),
        "addition_embed_type": "text_time" if added else None,
        "addition_time_embed_dim": NUMBER_DIM if added else None,
        "projection_class_embeddings_input_dim": see.size("label_emb.0.0.weight", 1) if added else None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def context_dim(shapes: Shapes) -> int | None:
    """Channels of the text that a U-Net reads; None without cross-attention."""
    wide = (s for name, s in shapes.items() if name.endswith(".transformer_blocks.0.attn2.to_k.weight") and len(s) == 2)
    return next((shape[1] for shape in wide), None)


def vae_json(shapes: Shapes, family: Family, where: str, prefix: str = "") -> dict[str, Any]:
    """The hub's `vae/config.json` for an `AutoencoderKL`. Raises `WeightsError` naming a tensor."""
    see = _Sight(shapes, where, prefix)
    if not see.has("encoder"):
        raise see.fail("encoder.conv_in.weight", "is missing: a decoder alone is not supported")
    levels = see.count(lambda i: f"encoder.down.{i}")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": see.size("encoder.conv_in.weight", 1),
        "out_channels": see.size("decoder.conv_out.weight", 0),
        "latent_channels": see.size("decoder.conv_in.weight", 1),
        "block_out_channels": [see.size(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": see.count(lambda j: f"encoder.down.0.block.{j}"),
        "mid_block_add_attention": see.has("encoder.mid.attn_1"),
        "use_quant_conv": see.has("quant_conv"),
        "use_post_quant_conv": see.has("post_quant_conv"),
        "scaling_factor": family.scaling_factor,
        "sample_size": family.pixels,
        "norm_num_groups": 32,
        "act_fn": "silu",
    }


def text_json(shapes: Shapes, text: Text, where: str, prefix: str = "") -> dict[str, Any]:
    """The hub's `config.json` of a text encoder, for CLIP's text model or OpenCLIP's."""
    see = _Sight(shapes, where, prefix)
    read = _clip if text.layout == "clip" else _open_clip
    found: dict[str, Any] = read(see, text)
    width = found["hidden_size"]
    return {
        "architectures": ["CLIPTextModelWithProjection" if text.projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **found,
        "num_attention_heads": max(width // TEXT_HEAD_DIM, 1),
        "layer_norm_eps": 1e-5,
        "bos_token_id": EOS - 1,
        "eos_token_id": EOS,
    }


def _clip(see: _Sight, text: Text) -> dict[str, Any]:
    width = see.size("embeddings.token_embedding.weight", 1)
    return {
        "vocab_size": see.size("embeddings.token_embedding.weight", 0),
        "hidden_size": width,
        "intermediate_size": see.size("encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": see.count(lambda i: f"encoder.layers.{i}"),
        "max_position_embeddings": see.size("embeddings.position_embedding.weight", 0),
        "hidden_act": "quick_gelu",
        "projection_dim": width,
    }


def _open_clip(see: _Sight, text: Text) -> dict[str, Any]:
    width = see.size("token_embedding.weight", 1)
    layers = see.count(lambda i: f"transformer.resblocks.{i}")
    return {
        "vocab_size": see.size("token_embedding.weight", 0),
        "hidden_size": width,
        "intermediate_size": see.size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        "num_hidden_layers": min(layers, text.read or layers),
        "max_position_embeddings": see.size("positional_embedding", 0),
        "hidden_act": "gelu",
        "projection_dim": see.size("text_projection", 1) if text.projected else width,
    }


class _Sight:
    """Looks at shapes by name."""

    def __init__(self, shapes: Shapes, where: str, prefix: str) -> None:
        self.shapes, self.where, self.prefix = shapes, where, prefix
        parts = (name.split(".", MODULE_DEPTH)[:MODULE_DEPTH] for name in shapes)
        self.modules = {".".join(split[:i]) for split in parts for i in range(1, len(split) + 1)}

    def has(self, module: str) -> bool:
        """Whether there is a tensor in that module, so that a tensor that lacks is named and hides no other."""
        return module in self.modules

    def size(self, name: str, dim: int) -> int:
        shape = self.shapes.get(name)
        if shape is None or len(shape) <= dim:
            raise self.fail(name, "is missing" if shape is None else f"has the shape {shape}")
        return shape[dim]

    def count(self, module: Callable[[int], str]) -> int:
        """How many of the numbered modules there are, from 0 on."""
        return next(i for i in itertools.count() if not self.has(module(i)))

    def depth(self, transformer: str) -> int:
        return self.count(lambda k: f"{transformer}.transformer_blocks.{k}")

    def fail(self, name: str, reason: str) -> WeightsError:
        return WeightsError(f"{self.where}: {self.prefix}{name}: {reason}", field=self.prefix + name)
