"""Prompts to what the U-Net's branches read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.prompt import Tokenizer
from fastldm.request import Words
from fastldm.runtime.engine import Engine


def embeddings(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    clip_skip: int = 0,
    length: int | None = None,
) -> Tensor:
    """(prompts, length, width). Equal prompts are encoded once. length: the tokenizer's window where None."""
    distinct = list(dict.fromkeys(prompts))
    found = engine.encode_text(tokenizer(distinct, length=length), clip_skip=clip_skip)
    return found[[distinct.index(prompt) for prompt in prompts]]


def encoded(engine: Engine, tokenizer: Tokenizer, words: Words, *, guided: bool) -> tuple[Tensor, Tensor | None]:
    """(batch, tokens, width) of what is to be painted, and likewise of what is not where `guided`."""
    positive, negative = words.embeds, words.negative_embeds
    if positive is None:
        positive = embeddings(engine, tokenizer, words.prompts, clip_skip=words.clip_skip)
    if guided and negative is None:
        negative = embeddings(engine, tokenizer, words.negative_prompts, length=positive.shape[1])
    images = words.images_per_prompt

    def spread(embeds: Tensor) -> Tensor:
        return embeds.to(engine.device, engine.dtype).repeat_interleave(images, dim=0)

    return spread(positive), spread(negative) if guided and negative is not None else None


def states(engine: Engine, tokenizer: Tokenizer, words: Words, branches: int) -> Tensor:
    """(branches · batch, tokens, width), branch by branch, the conditional one last."""
    positive, negative = encoded(engine, tokenizer, words, guided=branches > 1)
    return torch.cat([*([negative] * (branches - 1) if negative is not None else []), positive])
