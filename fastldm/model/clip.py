"""CLIP's text transformer: ViT-L/14 (Stable Diffusion 1.x), OpenCLIP ViT-H/14 (2.x) and ViT-bigG/14 (SDXL).

Radford et al., arXiv 2103.00020.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastldm.config import TextConfig
from fastldm.model.layers import LayerNorm, Linear, SelfAttention, empty

LEGACY_EOS = 2  # many hub configs say eos_token_id = 2; there the end of the text is where the largest id stands


class TextStates(NamedTuple):
    """states: (B, L, width). pooled: (B, width), or (B, projection_dim) where the model has a projection."""

    states: Tensor
    pooled: Tensor


class Table(nn.Module):
    """weight (rows, width)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = empty(rows, width)


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = Table(config.vocab_size, config.width)
        self.position_embedding = Table(config.positions, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding.weight[ids] + self.position_embedding.weight[: ids.shape[-1]]


class Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.act = config.act
        self.layer_norm1 = LayerNorm(config.width, config.eps)
        self.self_attn = SelfAttention(config.width, config.heads, bias=True, names=("q_proj", "k_proj", "v_proj"))
        self.layer_norm2 = LayerNorm(config.width, config.eps)
        self.fc1, self.fc2 = Linear(config.width, config.mlp_width), Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.self_attn(self.layer_norm1(x), residual=x, mask=mask)
        return self.fc2(self.fc1(self.layer_norm2(x), act=self.act), residual=x)


class TextEncoder(nn.Module):
    hub_names = (
        (".to_out.", ".out_proj."),
        (".fc1.", ".mlp.fc1."),
        (".fc2.", ".mlp.fc2."),
        ("layers.", "encoder.layers."),
    )

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_layer_norm = LayerNorm(config.width, config.eps)
        self.text_projection = (
            Linear(config.width, config.projection_dim, bias=False) if config.projection_dim else None
        )

    def forward(self, ids: Tensor, *, skip: int = 0, final_norm: bool = True) -> TextStates:
        """ids: (B, L) int64, L at most `config.positions`.

        skip: how many of the last layers the states leave out (`clip_skip`; 1 with `final_norm=False` is SDXL's
        penultimate layer). The pooled output always comes from the last layer.
        """
        x = self.embeddings(ids)
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        hidden = [x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], mask))
        states = hidden[-1 - skip]
        return TextStates(
            self.final_layer_norm(states) if final_norm else states,
            self._pooled(self.final_layer_norm(hidden[-1]), ids),
        )

    def _pooled(self, last: Tensor, ids: Tensor) -> Tensor:
        eos = self.config.eos_token_id
        end = ids.argmax(dim=-1) if eos == LEGACY_EOS else (ids == eos).int().argmax(dim=-1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return pooled if self.text_projection is None else self.text_projection(pooled)
