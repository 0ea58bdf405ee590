"""Embeddings: what `encode_prompt` gives, calls with it or with others, and the layers that `clip_skip` leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel

from fastldm.errors import ArgumentError
from tests import oracle
from tests.pipeline.pairs import Pair, paint

TOLERANCE = 1e-4
CAT, DOG = "the red cat", "a dog in the snow, oil on canvas"
CALL = {"num_inference_steps": 2, "height": 8, "width": 16, "output_type": "latent"}
WIDTH = 24


def encoded(pipe: Any, *args: Any, **call: Any) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        found: tuple[Tensor, Tensor | None] = pipe.encode_prompt(*args, **call)
    return found


def assert_equal(mine: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.shape, a.dtype, a.device, a.requires_grad) == (b.shape, b.dtype, b.device, False)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- encode_prompt


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"prompt": CAT}, id="a prompt"),
        pytest.param({"prompt": [CAT, DOG]}, id="two"),
        pytest.param({"prompt": [CAT, CAT, DOG, CAT]}, id="some alike"),
        pytest.param({"prompt": CAT, "negative_prompt": DOG}, id="a negative prompt"),
        pytest.param({"prompt": [CAT, DOG], "negative_prompt": ["", "red"]}, id="two of both"),
        pytest.param({"prompt": "the red cat " * 40, "negative_prompt": "the " * 90}, id="too long"),
        pytest.param({"prompt_embeds": random(2, 77), "negative_prompt": [DOG, ""]}, id="embeddings"),
        pytest.param({"prompt_embeds": random(1, 9), "negative_prompt": DOG}, id="short embeddings"),
        pytest.param(
            {"prompt_embeds": random(2, 154), "negative_prompt_embeds": random(2, 154, seed=1)}, id="long embeddings"
        ),
        pytest.param({"prompt": [CAT, DOG], "negative_prompt_embeds": random(2, 77)}, id="negative embeddings alone"),
    ],
)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("guided", [True, False])
def test_encode_prompt(pair: Callable[..., Pair], call: dict[str, Any], images: int, guided: bool) -> None:
    """Values, shapes, and the order of repeated rows."""
    options = {"device": "cpu", "num_images_per_prompt": images, "do_classifier_free_guidance": guided, "prompt": None}
    options |= call
    assert_equal(encoded(pair().fast, **options), encoded(pair().ref, **options))


def test_encode_prompt_by_position(pair: Callable[..., Pair]) -> None:
    args = [CAT], torch.device("cpu"), 2, True, [DOG]
    assert_equal(encoded(pair().fast, *args), encoded(pair().ref, *args))


def test_encode_prompt_knows_where_and_how_by_itself(pair: Callable[..., Pair]) -> None:
    assert_equal(encoded(pair().fast, CAT), encoded(pair().ref, CAT, "cpu", 1, True))


def test_encode_prompt_gives_what_may_be_written(pair: Callable[..., Pair]) -> None:
    """Nothing is kept: weighting in place changes no later call."""
    fast = pair().fast
    first, _ = encoded(fast, CAT)
    kept = first.clone()
    first *= 3
    assert torch.equal(encoded(fast, CAT)[0], kept)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": CAT, "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": CAT, "do_classifier_free_guidance": "yes"}, "do_classifier_free_guidance"),
        ({"prompt": CAT, "negative_prompt": [CAT, DOG]}, "negative_prompt"),
        ({"prompt": CAT, "prompt_embeds": random(1, 77)}, "prompt_embeds"),
        ({"prompt": CAT, "negative_prompt_embeds": random(1, 5)}, "negative_prompt_embeds"),
        ({"prompt_embeds": random(1, 154)}, "negative_prompt_embeds"),
        ({"prompt_embeds": random(1, 5), "negative_prompt_embeds": random(1, 6)}, "negative_prompt_embeds"),
        ({"prompt": CAT, "lora_scale": 0.5}, "lora_scale"),
        ({"prompt": CAT, "clip_skip": 3}, "clip_skip"),
        ({"prompt": CAT, "device": "the moon"}, "device"),
    ],
)
def test_encode_prompt_names_what_is_wrong(pair: Callable[..., Pair], call: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError, match=field) as caught:
        encoded(pair().fast, **call)
    assert caught.value.field == field


# ----------------------------------------------------------------------------------------------- calls with embeddings


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_encoded_prompts_are_the_prompts(pair: Callable[..., Pair], images: int, guidance_scale: float) -> None:
    """Bit for bit."""
    fast = pair().fast
    call = {"num_images_per_prompt": images, "guidance_scale": guidance_scale, **CALL}
    positive, negative = encoded(fast, [CAT, DOG], negative_prompt=["", "red"])
    plain = paint(fast, prompt=[CAT, DOG], negative_prompt=["", "red"], **call)
    assert torch.equal(plain, paint(fast, prompt_embeds=positive, negative_prompt_embeds=negative, **call))
    assert torch.equal(plain, paint(fast, prompt_embeds=positive, negative_prompt=["", "red"], **call))
    assert torch.equal(plain, paint(fast, prompt=[CAT, DOG], negative_prompt_embeds=negative, **call))


@pytest.mark.parametrize("tokens", [1, 5, 77, 154])
@pytest.mark.parametrize("images", [1, 2])
def test_embeddings_of_any_length(pair: Callable[..., Pair], tokens: int, images: int) -> None:
    call = {"num_images_per_prompt": images, "seed": list(range(2 * images)), **CALL}
    call |= {"prompt_embeds": random(2, tokens), "negative_prompt_embeds": random(2, tokens, seed=1)}
    assert oracle.relative_error(*pair().both(**call)) <= TOLERANCE


@pytest.mark.parametrize("tokens", [2, 5, 77])
@pytest.mark.parametrize("negative", [{}, {"negative_prompt": [DOG, "x"]}], ids=["none", "words"])
def test_negative_words_are_as_long_as_the_embeddings(
    pair: Callable[..., Pair], tokens: int, negative: dict[str, Any]
) -> None:
    mine, theirs = pair().both(prompt_embeds=random(2, tokens), **negative, **CALL)
    assert oracle.relative_error(mine, theirs) <= TOLERANCE


def test_unguided_embeddings_need_no_negatives(pair: Callable[..., Pair]) -> None:
    mine, theirs = pair().both(prompt_embeds=random(1, 154), guidance_scale=1.0, **CALL)
    assert oracle.relative_error(mine, theirs) <= TOLERANCE


def test_weighted_embeddings(pair: Callable[..., Pair]) -> None:
    """As programs weight words: some tokens louder, the mean kept."""
    images = []
    for pipe in (pair().fast, pair().ref):
        positive, negative = encoded(pipe, [CAT], "cpu", 1, True, [DOG])
        louder = positive.clone()
        louder[:, 1:3] *= 1.4
        louder *= positive.mean() / louder.mean()
        images.append(paint(pipe, prompt_embeds=louder, negative_prompt_embeds=negative, **CALL))
    assert oracle.relative_error(*images) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_another_dtype(pair: Callable[..., Pair], dtype: torch.dtype) -> None:
    fast, narrow = pair().fast, random(1, 5).to(dtype)
    negative = random(1, 5, seed=1)
    mine = paint(fast, prompt_embeds=narrow, negative_prompt_embeds=negative, **CALL)
    assert torch.equal(mine, paint(fast, prompt_embeds=narrow.float(), negative_prompt_embeds=negative, **CALL))


def test_embeddings_are_not_written_to(pair: Callable[..., Pair]) -> None:
    positive, negative = random(1, 5), random(1, 5, seed=1)
    kept = positive.clone(), negative.clone()
    paint(pair().fast, prompt_embeds=positive, negative_prompt_embeds=negative, guidance_rescale=0.5, **CALL)
    assert torch.equal(positive, kept[0])
    assert torch.equal(negative, kept[1])


# --------------------------------------------------------------------------------------------------------- clip_skip


@torch.no_grad()
def skipped(pair: Pair, prompts: list[str], skip: int) -> Tensor:
    """By transformers. diffusers 0.42 asks its encoder for an attribute that transformers 5 has no more."""
    encoder: CLIPTextModel = pair.ref.text_encoder
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pair.ref.tokenizer(prompts, max_length=77, **options).input_ids
    hidden = encoder(ids, output_hidden_states=True).hidden_states[-(skip + 1)]
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    found: Tensor = norm(hidden)
    return found


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip(pair: Callable[..., Pair], skip: int) -> None:
    """Of the prompt alone: the negative one is encoded by all layers."""
    both = pair()
    mine, negative = encoded(both.fast, [CAT, DOG], negative_prompt=["", "red"], clip_skip=skip)
    truth = skipped(both, [CAT, DOG], skip)
    torch.testing.assert_close(mine, truth, atol=1e-5, rtol=1e-5)
    assert torch.equal(negative, encoded(both.fast, ["", "red"])[0])

    call = {"negative_prompt": ["", "red"], "num_images_per_prompt": 2, **CALL}
    painted = paint(both.fast, prompt=[CAT, DOG], clip_skip=skip, **call)
    assert torch.equal(painted, paint(both.fast, prompt_embeds=mine, negative_prompt_embeds=negative, **call_of(call)))
    assert oracle.relative_error(painted, paint(both.ref, prompt_embeds=truth, **call)) <= TOLERANCE


def call_of(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "negative_prompt"}


def test_the_layers_differ(pair: Callable[..., Pair]) -> None:
    """The tests above would say nothing if they did not."""
    layers = [encoded(pair().fast, CAT, clip_skip=skip)[0] for skip in (0, 1, 2)]
    assert oracle.relative_error(layers[1], layers[0]) > 0.001
    assert oracle.relative_error(layers[2], layers[1]) > 0.001


def test_no_clip_skip_is_none(pair: Callable[..., Pair]) -> None:
    fast = pair().fast
    assert torch.equal(encoded(fast, CAT)[0], encoded(fast, CAT, clip_skip=0)[0])
