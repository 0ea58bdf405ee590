"""A tokenizer's files: where they are, and what a tokenizer in memory is written as."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastldm.config import TextConfig
from fastldm.errors import ArgumentError, Error, FileError
from fastldm.prompt import Tokenizer
from fastldm.weights.files import ModelFolder, inside

CLIP_ID = "openai/clip-vit-large-patch14"  # whose tokenizer every Stable Diffusion uses
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
MAX_POSITIONS, MAX_TOKENS = 1 << 16, 1 << 24
OpenFolder = Callable[[Any, str], ModelFolder]
"""(a path or the id of a model on the hub, the argument's name) -> the folder, without fetching anything."""


@dataclass(frozen=True)
class TokenizerAt:
    """A tokenizer's files: those of `component` in a model's folder, "" for the folder itself.

    pad: the id that fills the window, in place of the one that they say.
    """

    folder: ModelFolder
    component: str
    pad: int | None = None

    def made(self, config: TextConfig) -> Tokenizer:
        """For a text encoder of that configuration."""
        positions, vocab_size = config.positions, config.vocab_size
        found = Tokenizer.from_folder(self.folder, self.component, positions=positions, vocab_size=vocab_size)
        return found if self.pad is None else found.padded_with(self.pad)

    def token(self, number: int) -> str:
        """The token with an id, whatever the text encoder."""
        found = Tokenizer.from_folder(self.folder, self.component, positions=MAX_POSITIONS, vocab_size=MAX_TOKENS)
        text = found.bpe.id_to_token(number)
        if text is None:
            raise FileError(f"{self.folder.root}: the tokenizer has no token with the id {number}", field="tokenizer")
        return str(text)


def tokenizer_of(encoder: str) -> str:
    """The name of the component that belongs to a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def has_tokenizer(folder: ModelFolder, component: str) -> bool:
    """Whether there is a vocabulary."""
    return any(folder.has(inside(component, name)) for name in TOKENIZER_FILES)


def given_tokenizer(value: object, open_folder: OpenFolder) -> TokenizerAt:
    """The files in a folder that the caller names: its own, or those of the model that it holds."""
    if not isinstance(value, str | os.PathLike):
        reason = f"must be a folder or a tokenizer of transformers, not {type(value).__name__}"
        raise ArgumentError(f"tokenizer: {reason}", field="tokenizer")
    folder = open_folder(value, "tokenizer")
    component = next((name for name in ("", "tokenizer") if has_tokenizer(folder, name)), None)
    if component is None:
        reason = "has neither tokenizer.json nor vocab.json, and no folder tokenizer with one"
        raise FileError(f"{folder.root} {reason}", field="tokenizer")
    return TokenizerAt(folder, component)


def cached_clip(where: str, open_folder: OpenFolder) -> TokenizerAt:
    """CLIP's own in the hub's cache, for a single file named `where`."""
    with suppress(Error):
        folder = open_folder(CLIP_ID, "tokenizer")
        if has_tokenizer(folder, ""):
            return TokenizerAt(folder, "")
    advice = (
        f"pass tokenizer= with a folder that holds tokenizer.json, or vocab.json and merges.txt (that of any Stable "
        f"Diffusion in diffusers' layout, or of {CLIP_ID}), or fetch the latter into the hub's cache once with "
        f"`hf download {CLIP_ID} tokenizer.json tokenizer_config.json`"
    )
    raise FileError(f"{where}: a single file has no tokenizer: {advice}", field="tokenizer")


def converted(tokenizer: Any, config: TextConfig, pad: int | None) -> Tokenizer:
    """A tokenizer of transformers, by the files that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return TokenizerAt(ModelFolder(folder), "", pad).made(config)


def shared(tokenizer: Tokenizer, config: TextConfig) -> Tokenizer:
    """A tokenizer in memory, for a text encoder of that configuration."""
    size = tokenizer.bpe.get_vocab_size()
    if size > config.vocab_size:
        reason = f"has {size} tokens, and the text encoder {config.vocab_size}"
        raise ArgumentError(f"tokenizer: {reason}", field="tokenizer")
    length = min(tokenizer.length, config.positions)
    return Tokenizer(tokenizer.bpe, length, eos=tokenizer.eos, pad=tokenizer.pad)


def written(tokenizer: Tokenizer) -> dict[str, bytes]:
    """{file name: content} of a tokenizer in memory, as all versions of transformers read them."""
    data = json.loads(tokenizer.bpe.to_str())
    vocab: dict[str, int] = data["model"]["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
    further = {token["content"]: token["id"] for token in data["added_tokens"] if token["content"] not in vocab}
    roles = {
        "bos_token": data["post_processor"]["cls"][0],
        "eos_token": tokenizer.bpe.id_to_token(tokenizer.eos),
        "unk_token": data["model"]["unk_token"],
        "pad_token": tokenizer.bpe.id_to_token(tokenizer.pad),
    }
    files = {
        "tokenizer.json": _json(data),
        "vocab.json": _json(vocab),
        "merges.txt": "".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, merges))).encode(),
        "tokenizer_config.json": _json(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, **roles}
        ),
        "special_tokens_map.json": _json(roles),
    }
    return files | ({"added_tokens.json": _json(further)} if further else {})


def _json(data: object) -> bytes:
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()
