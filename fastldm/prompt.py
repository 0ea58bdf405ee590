"""Prompts to token ids, by the model's own tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import FileError, brief

log = logging.getLogger("fastldm")


class Tokenizer:
    """CLIP's byte-level BPE. Safe to call from many threads: truncation and padding are done here, not by settings.

    tokenizer: of transformers, fast. length: the window in tokens; shorter prompts are padded to it.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.bpe = tokenizer.backend_tokenizer
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.length = min(int(tokenizer.model_max_length), length)
        self.eos, self.pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)

    @classmethod
    def from_folder(cls, folder: Path, length: int) -> Tokenizer:
        """From `vocab.json` + `merges.txt` or `tokenizer.json`. Raises `FileError` where there is no CLIP tokenizer."""
        import transformers  # slow to import, and only loading needs it

        fast = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
        try:
            return cls(fast.from_pretrained(str(folder), local_files_only=True), length)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{folder}: no CLIP tokenizer: {error}", field="tokenizer") from error

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """-> (B, length) int64. What does not fit is left out, with one warning that says what."""
        return torch.tensor([self._window(prompt) for prompt in prompts], dtype=torch.int64)

    def _window(self, prompt: str) -> list[int]:
        ids: list[int] = self.bpe.encode(prompt).ids
        if len(ids) > self.length:
            lost = self.bpe.decode(ids[self.length - 1 : -1])
            log.warning("the prompt is longer than %d tokens; left out: %s", self.length, brief(lost))
            ids = [*ids[: self.length - 1], self.eos]
        return ids + [self.pad] * (self.length - len(ids))
