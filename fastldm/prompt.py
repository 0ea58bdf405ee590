"""Prompts to token ids, by the model's own tokenizer.

Its files are read here, checked, through `ModelFolder` alone: nothing that they say opens a file, runs code or is
taken as a regular expression. How a text is split is CLIP's rule and not the files', as in transformers 5, which is not
imported: that takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BPE
from torch import Tensor

from fastldm.config import Reader
from fastldm.errors import ConfigError, FileError, brief
from fastldm.weights.files import JSON_DEPTH, MAX_JSON, ModelFolder, inside
from fastldm.weights.strict import strict_json

log = logging.getLogger("fastldm")

MAX_VOCABULARY = 16 << 20  # bytes; CLIP's files take up to 4 MiB
MIN_WINDOW = 3  # the two special tokens and one of the prompt
WORD_END = "</w>"
ROLES = {  # of the special tokens, and how CLIP writes them
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# What transformers writes as model_max_length where there is none, int(1e30), and what we can read.
_ENDLESS, _LONG = b"1000000000000000019884624838656", b"1000000000000000"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-level BPE. Safe to call from many threads: truncation and padding are done here, not by settings.

    bpe: puts the special tokens at both ends. length: the window in tokens; shorter prompts are padded to it.
    """

    def __init__(self, bpe: BPE, length: int, *, eos: int, pad: int) -> None:
        self.bpe, self.length, self.eos, self.pad = bpe, length, eos, pad

    @classmethod
    def from_folder(cls, folder: ModelFolder, component: str, *, positions: int, vocab_size: int) -> Tokenizer:
        """From `tokenizer.json`, or `vocab.json` and `merges.txt`, and the settings beside them.

        component: the folder's name within the model's; "" for the model's own.
        positions, vocab_size: of the text encoder, which bound the window and the ids.
        Raises `FileError` or `ConfigError` naming the file and what is wrong with it.
        """
        where, vocab, merges, added = _vocabulary(folder, component, vocab_size)
        settings = _settings(folder, component, added)
        length = _window(settings, component, positions)
        roles = _roles(settings, added, vocab, where)
        bpe = _bpe(vocab, merges, roles["unk_token"], where)
        ids = _add(bpe, added, vocab_size, where)
        last, first = ((text, ids[text]) for text in (roles["eos_token"], roles["bos_token"]))
        bpe.post_processor = processors.RobertaProcessing(last, first, trim_offsets=False, add_prefix_space=False)
        return cls(bpe, length, eos=ids[roles["eos_token"]], pad=ids[roles["pad_token"]])

    def padded_with(self, pad: int) -> Tokenizer:
        """The same tokenizer, filling the window with the id `pad`."""
        return Tokenizer(self.bpe, self.length, eos=self.eos, pad=pad)

    def __call__(self, prompts: Sequence[str], *, length: int | None = None) -> Tensor:
        """-> (B, length) int64 on the CPU. What does not fit is left out, with one warning that says what."""
        length = length or self.length
        return torch.tensor([self._window(prompt, length) for prompt in prompts], dtype=torch.int64, device="cpu")

    def _window(self, prompt: str, length: int) -> list[int]:
        ids: list[int] = self.bpe.encode(prompt).ids
        if len(ids) > length:
            lost = self.bpe.decode(ids[length - 1 : -1]).replace(WORD_END, " ").strip()
            log.warning("the prompt is longer than %d tokens; left out: %s", length, brief(lost))
            ids = [*ids[: length - 1], self.eos]
        return ids + [self.pad] * (length - len(ids))


Added = dict[str, tuple[int | None, AddedToken]]
"""The tokens that are found in a text before it is split, by what they say; None: the id that the vocabulary gives."""


def _vocabulary(
    folder: ModelFolder, component: str, vocab_size: int
) -> tuple[str, dict[str, int], list[tuple[str, str]], Added]:
    """The file's name in messages, the vocabulary, the merges, and what a `tokenizer.json` adds to them."""
    added: Added = {}
    if folder.has(inside(component, "tokenizer.json")):
        where, data = tokenizer_json(folder, inside(component, "tokenizer.json"), MAX_VOCABULARY)
        model, tokens = data.get("model"), data.get("added_tokens") or []
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(tokens, list):
            raise FileError(f"{where}: is no byte-pair encoding: the model's type must be 'BPE'", field="model")
        if model.get("end_of_word_suffix") != WORD_END:
            raise FileError(f"{where}: is not CLIP's: end_of_word_suffix must be {WORD_END!r}", field="model")
        vocab, merges = model.get("vocab"), model.get("merges")
        for token in tokens:
            _note(added, token.get("id") if isinstance(token, dict) else None, token, where)
    elif folder.has(inside(component, "vocab.json")):
        where, vocab = tokenizer_json(folder, inside(component, "vocab.json"), MAX_VOCABULARY)
        merges = _merges(folder, inside(component, "merges.txt"))
    else:
        where = str(folder.root / component)
        raise FileError(f"{where}: there is no tokenizer: neither tokenizer.json nor vocab.json", field=component)
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise FileError(f"{where}: vocab must map the tokens to their ids, and merges must be a list")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < vocab_size:
            reason = f"must be an integer from 0 to {vocab_size - 1}, the ids that the text encoder has"
            raise FileError(f"{where}: the id {brief(number)} of {brief(token)} {reason}", field=token)
    return where, vocab, _pairs(merges, where), added


def _pairs(merges: list[Any], where: str) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise FileError(f"{where}: the merge {brief(merge)} must be two tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _merges(folder: ModelFolder, name: str) -> list[str]:
    raw = folder.read_bytes(name, MAX_VOCABULARY)
    try:
        lines = raw.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except ValueError as error:
        raise FileError(f"{folder.root / name}: is not UTF-8: {error}") from None
    return [line for line in lines if line and not line.startswith("#version")]


def _settings(folder: ModelFolder, component: str, added: Added) -> dict[str, Any]:
    """tokenizer_config.json with what older files say beside it; completes `added`. Keys with null are left out."""
    settings: dict[str, Any] = {}
    if folder.has(inside(component, "tokenizer_config.json")):
        settings = tokenizer_json(folder, inside(component, "tokenizer_config.json"), MAX_JSON)[1]
    where = str(folder.root / inside(component, "tokenizer_config.json"))
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict) or not all(key.isascii() and key.isdigit() for key in decoder):
            raise FileError(f"{where}: added_tokens_decoder must map ids to tokens", field="added_tokens_decoder")
        added.clear()
        for key, token in decoder.items():
            _note(added, int(key[:17]), token, where)
    else:
        if folder.has(inside(component, "special_tokens_map.json")):
            settings |= tokenizer_json(folder, inside(component, "special_tokens_map.json"), MAX_JSON)[1]
        if folder.has(inside(component, "added_tokens.json")):
            older, listed = tokenizer_json(folder, inside(component, "added_tokens.json"), MAX_JSON)
            for token, number in listed.items():
                if token not in added:
                    _note(added, number, {"content": token}, older)
    return {key: value for key, value in settings.items() if value is not None}


def _window(settings: Mapping[str, Any], component: str, positions: int) -> int:
    read = Reader(settings, inside(component, "tokenizer_config.json"))
    longest = read.integer("model_max_length", MIN_WINDOW, 1 << 53, positions)
    for side in ("padding_side", "truncation_side"):
        read.choice(side, ("right",), "right")
    if positions < MIN_WINDOW:
        reason = f"a prompt takes {MIN_WINDOW} tokens or more, and the text encoder has {positions} positions"
        raise ConfigError(f"{component}: {reason}", field=component)
    return min(int(longest), positions)


def _roles(settings: Mapping[str, Any], added: Added, vocab: Mapping[str, int], where: str) -> dict[str, str]:
    """What the special tokens say; all are in the vocabulary, and become part of `added`."""
    roles: dict[str, str] = {}
    for role, usual in ROLES.items():
        text = _note(added, None, settings.get(role, usual), where, special=True)
        if text not in vocab and (added[text][0] is None or role == "unk_token"):
            raise FileError(f"{where}: {role} = {brief(text)} is not in the vocabulary", field=role)
        roles[role] = text
    return roles


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str, where: str) -> BPE:
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=WORD_END,
            fuse_unk=False,
            unk_token=unknown,
        )
    except Exception as error:  # the library raises Exception itself
        raise FileError(f"{where}: is no byte-pair encoding: {brief(str(error))}") from None
    bpe = BPE(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _add(bpe: BPE, added: Added, vocab_size: int, where: str) -> dict[str, int]:
    """Their ids; those that the vocabulary lacks get the ids behind it, which must be the ids that the files say."""
    in_order = sorted(added.items(), key=lambda item: item[1][0] or 0)
    bpe.add_tokens([token for _, (_, token) in in_order])
    ids: dict[str, int] = {}
    for text, (expected, _) in in_order:
        found = bpe.token_to_id(text)
        if found is None or expected not in (None, found):
            raise FileError(f"{where}: the added token {brief(text)} has the id {found}, not {expected}", field=text)
        if found >= vocab_size:
            reason = f"is beyond the {vocab_size} that the text encoder has"
            raise FileError(f"{where}: the id {found} of {brief(text)} {reason}", field=text)
        ids[text] = found
    return ids


def _note(added: Added, number: object, token: object, where: str, *, special: bool = False) -> str:
    """Takes one token, a string or an object with its content and flags, into `added`; returns what it says."""
    entry = token if isinstance(token, dict) else {"content": token}
    text = entry.get("content")
    flags = {key: entry.get(key, False) for key in ("single_word", "lstrip", "rstrip")}
    flags["special"] = special or entry.get("special", False)
    flags["normalized"] = entry.get("normalized", not flags["special"])
    if not isinstance(text, str) or not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise FileError(f"{where}: the token {brief(token)} must be a text, or an object with its content and flags")
    if not special and (type(number) is not int or number < 0):
        raise FileError(f"{where}: the id {brief(number)} of {brief(text)} must be an integer from 0", field=text)
    if special and text in added and added[text][0] is not None:
        added[text][1].special = True
    else:  # of two roles with one text the later counts, as in transformers 5
        added[text] = number if isinstance(number, int) else None, AddedToken(text, **flags)
    return text


def tokenizer_json(folder: ModelFolder, name: str, limit: int) -> tuple[str, dict[str, Any]]:
    """The name of a tokenizer's file in messages, and what it holds."""
    where = str(folder.root / name)
    return where, strict_json(folder.read_bytes(name, limit).replace(_ENDLESS, _LONG), where, JSON_DEPTH)
