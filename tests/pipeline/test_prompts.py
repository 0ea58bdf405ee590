"""Every string is a prompt: empty ones, other scripts, long ones, special tokens as text."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from tests.pipeline.pairs import Pair, paint

PROMPTS = {
    "empty": "",
    "blank": "  \n\t ",
    "Chinese": "一只红色的猫",
    "Arabic": "قطة حمراء في الثلج",
    "Hindi": "लाल बिल्ली",
    "emoji with joiners": "👩‍🚀 🐈‍⬛ 🏳️‍🌈",
    "combining marks": "z̸̢̛a̷͎l̶̨g̵̞o̴͔",
    "capitals and umlauts": "ÄÖÜ ẞ İSTANBUL",
    "NUL and control": "a\x00b\x07c",
    "special tokens as text": "a <|endoftext|> cat <|startoftext|>",
    "exactly the window": " ".join(["cat"] * 75),
    "one more than the window": " ".join(["cat"] * 76),
    "far more": "the red cat, " * 400,
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_any_prompt_gives_what_diffusers_gives(pair: Callable[..., Pair], prompt: str) -> None:
    """As prompt, and as negative prompt beside it."""
    errors = pair().errors(
        prompt=["a cat", prompt], negative_prompt=[prompt, "red"], num_inference_steps=2, height=16, width=16
    )
    assert max(errors.values()) <= 1e-4, errors


def test_one_negative_prompt_serves_every_prompt(pair: Callable[..., Pair]) -> None:
    """diffusers refuses a string beside a list."""
    call = {"prompt": ["a cat", "dog"], "num_inference_steps": 2, "height": 8, "width": 16, "output_type": "pt"}
    one, many = (paint(pair().fast, negative_prompt=n, **call) for n in ("red", ["red", "red"]))
    assert torch.equal(one, many)
    assert not torch.equal(one, paint(pair().fast, negative_prompt=["red", ""], **call))


def test_a_long_prompt_is_cut_with_one_warning_that_says_what_is_lost(
    pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    fast, call = pair().fast, {"num_inference_steps": 1, "height": 8, "width": 8, "output_type": "latent"}
    with caplog.at_level(logging.WARNING):
        paint(fast, prompt=" ".join(["cat"] * 75 + ["red", "the"]), **call)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert caplog.records[0].name == "fastldm"
    assert "77" in message
    assert "red the" in message
    assert "cat" not in message


@pytest.mark.parametrize("words", [1, 75])
def test_a_prompt_that_fits_says_nothing(
    pair: Callable[..., Pair], caplog: pytest.LogCaptureFixture, words: int
) -> None:
    with caplog.at_level(logging.WARNING):
        paint(
            pair().fast,
            prompt=" ".join(["cat"] * words),
            num_inference_steps=1,
            height=8,
            width=8,
            output_type="latent",
        )
    assert not caplog.records


def test_the_level_of_transformers_logger_is_as_it_was(pair: Callable[..., Pair]) -> None:
    import transformers

    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        paint(pair().fast, prompt="x " * 90, num_inference_steps=1, height=8, width=8, output_type="latent")
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)
