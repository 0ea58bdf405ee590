"""Prompts to token ids, by the model's own tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.errors import FileError

log = logging.getLogger("fastldm")


class Tokenizer:
    """CLIP's byte-level BPE, from a folder with `vocab.json` + `merges.txt` or with `tokenizer.json`.

    length: the window in tokens; shorter prompts are padded to it.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = min(int(tokenizer.model_max_length), length)

    @classmethod
    def from_folder(cls, folder: Path, length: int) -> Tokenizer:
        """Raises `FileError` where the folder holds no CLIP tokenizer."""
        import transformers  # slow to import, and only loading needs it

        fast = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
        try:
            tokenizer = fast.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileError(f"{folder}: no CLIP tokenizer: {error}", field="tokenizer") from error
        return cls(tokenizer, length)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """-> (B, length) int64. What does not fit is left out, with one warning that says what."""
        ids = self._ids(prompts, truncation=True, max_length=self.length, padding="max_length")
        for prompt, uncut in zip(prompts, self._ids(prompts, truncation=False, padding=False), strict=True):
            if len(uncut) > self.length:
                lost = self.tokenizer.decode(uncut[self.length - 1 : -1])
                log.warning("the prompt is longer than %d tokens; left out: %r", self.length, lost)
                log.debug("the whole prompt: %r", prompt)
        return torch.tensor(ids, dtype=torch.int64)

    def _ids(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        import transformers

        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it would warn of long prompts in its own words
        try:
            ids: list[list[int]] = self.tokenizer(list(prompts), **options).input_ids
        finally:
            transformers.logging.set_verbosity(level)
        return ids
