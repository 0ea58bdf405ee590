"""The tokenizer of the captions, as transformers and as fastldm read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenes
import vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from transformers import CLIPTokenizer

from fastldm.prompt import Tokenizer
from fastldm.weights.files import ModelFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def vocab(folder: Path) -> dict[str, int]:
    return vocabulary.write_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(folder: Path, vocab: dict[str, int]) -> Tokenizer:
    return Tokenizer.from_folder(ModelFolder(folder), "", positions=vocabulary.POSITIONS, vocab_size=len(vocab))


@pytest.fixture(scope="module")
def theirs(folder: Path, vocab: dict[str, int]) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def test_the_ids_are_those_from_0_on(vocab: dict[str, int]) -> None:
    assert sorted(vocab.values()) == list(range(len(vocab)))


def test_each_word_is_one_token(vocab: dict[str, int], theirs: CLIPTokenizer) -> None:
    for word in scenes.words():
        ids = theirs(word).input_ids
        assert ids == [vocab[vocabulary.START], vocab[f"{word}</w>"], vocab[vocabulary.END]], word


def test_a_caption_takes_a_token_for_each_word_and_comma(theirs: CLIPTokenizer) -> None:
    for i in range(100):
        text = scenes.caption(scenes.random_scene(default_rng(i), scenes.KINDS[i % 4]), default_rng(i))
        assert len(theirs(text).input_ids) == 2 + len(text.split()) + text.count(",")
        assert len(theirs(text).input_ids) < 40


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_encodes_and_fastldm_agrees(ours: Tokenizer, theirs: CLIPTokenizer, text: str) -> None:
    wanted = theirs(text, padding="max_length", truncation=True).input_ids
    assert ours([text])[0].tolist() == wanted
    if len(theirs(text).input_ids) < vocabulary.POSITIONS:
        assert theirs.unk_token not in theirs.convert_ids_to_tokens(theirs(text).input_ids)[1:-1]


def test_fastldm_agrees_on_captions(ours: Tokenizer, theirs: CLIPTokenizer) -> None:
    texts = [scenes.caption(scenes.random_scene(default_rng(i), "triple"), default_rng(i)) for i in range(50)]
    texts += ["", "A RED circle!", "a teal dodecahedron, 3 of them", "ein grüner Kreis 🟢", "red " * 90]
    assert ours(texts).tolist() == theirs(texts, padding="max_length", truncation=True).input_ids


def test_words_that_share_letters() -> None:
    words = ["in", "inside", "within", "tin", "side", "nnn", "a"]
    ranks = {pair: i for i, pair in enumerate(vocabulary.merges(words))}
    for word in words:
        assert vocabulary._merged([*word[:-1], f"{word[-1]}</w>"], ranks) == [f"{word}</w>"]
