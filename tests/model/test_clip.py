"""The text encoder equals transformers' CLIP classes, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.model.loading import assert_close, text_pair
from tests.oracle import relative_error

BOS, EOS = 98, 99
TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def ids(length: int = 77) -> Tensor:
    """Texts that end at different places: padded by the end token, padded by 0, and filled to the last place."""
    out = torch.randint(3, 90, (4, length))
    out[:, 0] = BOS
    out[0, length // 3 :] = EOS
    out[1, length // 2] = EOS
    out[1, length // 2 + 1 :] = 0
    out[2, -1] = EOS
    out[3, 1:] = EOS
    return out


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, EOS], ids=["the hub's 2", "the real end"])
@pytest.mark.parametrize("model", [CLIPTextModel, CLIPTextModelWithProjection])
@torch.no_grad()
def test_states_and_pooled_output(model: type, eos: int, act: str) -> None:
    ours, theirs = text_pair(model, **TINY | {"eos_token_id": eos, "hidden_act": act})
    text = ids()
    expected, out = theirs(text), ours(text)
    assert_close(out.states, expected.last_hidden_state)
    pooled = expected.text_embeds if model is CLIPTextModelWithProjection else expected.pooler_output
    assert_close(out.pooled, pooled)


@torch.no_grad()
def test_the_acts_differ() -> None:
    """Else the test above could not tell one from the other."""
    (a, _), (b, _) = (text_pair(CLIPTextModel, **TINY | {"hidden_act": act}) for act in ("quick_gelu", "gelu"))
    b.load_state_dict(a.state_dict())
    text = ids()
    assert relative_error(a(text).states, b(text).states) > 1e-4


@pytest.mark.parametrize("skip", [1, 2, 3])
@torch.no_grad()
def test_layers_left_out(skip: int) -> None:
    """clip_skip normalises the earlier states (SD), SDXL's penultimate layer does not."""
    ours, theirs = text_pair(CLIPTextModelWithProjection, **TINY)
    text = ids()
    expected = theirs(text, output_hidden_states=True)
    state = expected.hidden_states[-(skip + 1)]
    raw = ours(text, skip=skip, final_norm=False)
    assert_close(raw.states, state)
    norm = next(m for name, m in theirs.named_modules() if name.endswith("final_layer_norm"))
    assert_close(ours(text, skip=skip).states, norm(state))
    assert_close(raw.pooled, expected.text_embeds)


@torch.no_grad()
def test_states_without_the_last_norm() -> None:
    ours, theirs = text_pair(CLIPTextModel, **TINY)
    text = ids()
    expected = theirs(text, output_hidden_states=True).hidden_states[-1]
    assert_close(ours(text, final_norm=False).states, expected)


@pytest.mark.parametrize("length", [1, 2, 9, 77])
@torch.no_grad()
def test_any_length_up_to_the_positions(length: int) -> None:
    ours, theirs = text_pair(CLIPTextModel, **TINY)
    text = torch.randint(3, 90, (2, length))
    text[:, -1] = EOS
    assert_close(ours(text).states, theirs(text).last_hidden_state)


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    ours, _ = text_pair(CLIPTextModel, **TINY)
    text = ids()
    changed = text.clone()
    changed[:, 40:] = 5
    before, after = ours(text).states, ours(changed).states
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert relative_error(before[:, 40:], after[:, 40:]) > 0.01


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 1}, {"layer_norm_eps": 0.1}, {"max_position_embeddings": 9}, {"projection_dim": 40}],
)
@torch.no_grad()
def test_other_shapes(change: dict[str, Any]) -> None:
    ours, theirs = text_pair(CLIPTextModelWithProjection, **TINY | change)
    text = ids(9)
    assert_close(ours(text).states, theirs(text).last_hidden_state)
    assert_close(ours(text).pooled, theirs(text).text_embeds)
