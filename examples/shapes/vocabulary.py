"""A byte-level CLIP tokenizer: each word of the captions is one token, any other text is spelled in bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from scenes import words
from tokenizers.pre_tokenizers import ByteLevel

START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77
Pair = tuple[str, str]


def merges(texts: Iterable[str]) -> list[Pair]:
    """Merges that leave one token of each word. What a word adds ranks behind all before it, so it disturbs none."""
    ranks: dict[Pair, int] = {}
    for word in texts:
        pieces = _merged([*word[:-1], f"{word[-1]}</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _merged(pieces, ranks)
    return list(ranks)


def _merged(pieces: list[str], ranks: Mapping[Pair, int]) -> list[str]:
    """Byte-pair encoding: the merge of the lowest rank first, wherever it applies."""
    while True:
        known = [pair for pair in itertools.pairwise(pieces) if pair in ranks]
        if not known:
            return pieces
        best = min(known, key=ranks.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Writes the tokenizer as the hub lays it out. -> {token: id}"""
    pairs = merges(words())
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    return vocab


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
