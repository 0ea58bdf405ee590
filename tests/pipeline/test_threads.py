"""Many threads may call one Pipeline: each gets the bits that it would get alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.pipeline.pairs import Pair, paint

WORKERS = 4


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns a thousand times more often than usual: a race that is possible shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


CALLS: list[dict[str, Any]] = [
    {"prompt": "the red cat", "seed": 1, "num_inference_steps": 4},
    {"prompt": "dog", "seed": 2, "num_inference_steps": 6, "guidance_scale": 1.0, "height": 16, "width": 24},
    {"prompt": ["a", "red"], "seed": [3, 4], "num_inference_steps": 2, "eta": 1.0, "guidance_rescale": 0.5},
    {"prompt": "cat " * 90, "seed": 5, "num_inference_steps": 3, "negative_prompt": "the " * 90, "height": 24},
]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_different_calls_at_once(pair: Callable[..., Pair], scheduler: str) -> None:
    fast = pair("sd1", scheduler).fast
    alone = [paint(fast, output_type="pt", **call) for call in CALLS]
    order = [(i + turn) % 4 for turn in range(3) for i in range(4)]
    with ThreadPoolExecutor(WORKERS) as pool:
        together = list(pool.map(lambda i: paint(fast, output_type="pt", **CALLS[i]), order))
    wrong = [i for i, image in zip(order, together, strict=True) if not torch.equal(image, alone[i])]
    assert not wrong


def test_the_tokenizer_serves_threads(pair: Callable[..., Pair]) -> None:
    """The library's tokenizers keep the window and the padding of a call in themselves."""
    tokenizer = pair().fast._tokenizer
    prompts = ["", "the red cat", "cat " * 200, "dog " * 76]
    alone = [tokenizer([p]) for p in prompts]

    def many(k: int) -> int:
        return sum(not torch.equal(tokenizer([prompts[(k + i) % 4]]), alone[(k + i) % 4]) for i in range(200))

    with ThreadPoolExecutor(WORKERS) as pool:
        assert sum(pool.map(many, range(WORKERS))) == 0


def test_the_loggers_level_survives_threads(pair: Callable[..., Pair]) -> None:
    import transformers

    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_warning()
        tokenizer = pair().fast._tokenizer
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda _: tokenizer(["a cat"]), range(800)))
        assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    finally:
        transformers.logging.set_verbosity(before)
