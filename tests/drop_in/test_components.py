"""The parts of a pipeline, used as programs written for diffusers use them, beside diffusers' own."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastldm
from fastldm.components import MAX_TEXTS, View, unwrapped
from fastldm.hub_config import TEXT_KEYS, UNET_KEYS, VAE_KEYS
from tests.oracle import relative_error
from tests.pipeline import pairs

NETWORKS = ("unet", "vae", "text_encoder")
KEYS = {"unet": UNET_KEYS, "vae": VAE_KEYS, "text_encoder": TEXT_KEYS}
CLOSE = 1e-5  # relative, in float32
PROMPTS = ["the red cat", "", "a photo of <|endoftext|> cats, 3 of them", "Ünïcode 猫  and\nlines", "cat " * 90]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    made = pairs.make(tmp_path_factory.mktemp("components"))
    for module in (made.ref.unet, made.ref.vae, made.ref.text_encoder):
        module.requires_grad_(False)
    return made


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_configuration_has_all_keys_with_the_values_of_the_hubs_class(
    pair: pairs.Pair, tmp_path: Path, name: str, sparse: bool
) -> None:
    """sparse: the file leaves out what is the class's default, as files of other versions do."""
    folder = Path(shutil.copytree(pair.folder, tmp_path / "model"))
    path = folder / name / "config.json"
    data = json.loads(path.read_text())
    if sparse:
        path.write_text(json.dumps({k: v for k, v in data.items() if plain(KEYS[name].get(k)) != v}))
        assert len(json.loads(path.read_text())) < len(data) - 4
    found = getattr(fastldm.Pipeline(folder), name).config
    expected = getattr(pair.ref, name).config
    for key in KEYS[name]:
        assert plain(found[key]) == plain(getattr(expected, key)), key
        assert getattr(found, key) == found[key]


@pytest.mark.parametrize("kind", [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL])
def test_the_defaults_are_those_of_diffusers(kind: type) -> None:
    keys = UNET_KEYS if kind is diffusers.UNet2DConditionModel else VAE_KEYS
    signature = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    assert dict(keys) == {name: p.default for name, p in signature.items() if name != "self"}


def test_a_size_that_the_file_leaves_open_is_the_one_that_runs(pair: pairs.Pair, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pair.folder, tmp_path / "model"))
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
    assert fastldm.Pipeline(folder).unet.config.sample_size == 64


def test_what_programs_read_of_a_configuration(pair: pairs.Pair) -> None:
    fast = pair.fast
    assert fast.unet.config.in_channels == 4
    assert fast.unet.config["sample_size"] == 16
    assert fast.unet.config.time_cond_proj_dim is None
    assert fast.unet.config.get("no such key", 3) == 3
    assert fast.vae.config.scaling_factor == 0.18215
    assert 2 ** (len(fast.vae.config.block_out_channels) - 1) == fast.vae_scale_factor
    assert fast.text_encoder.config.to_dict()["hidden_size"] == 24
    assert not getattr(fast.text_encoder.config, "use_attention_mask", False)
    again = diffusers.UNet2DConditionModel.from_config(fast.unet.config)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in fast.unet.parameters())


def test_a_configuration_can_be_copied(pair: pairs.Pair) -> None:
    config = pair.fast.unet.config
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert copied.in_channels == 4


def test_a_key_that_is_none_is_named(pair: pairs.Pair) -> None:
    with pytest.raises(AttributeError, match="in_chanels"):
        _ = pair.fast.unet.config.in_chanels


CHANGES: list[Callable[[Any], object]] = [
    lambda config: config.__setitem__("in_channels", 9),
    lambda config: setattr(config, "in_channels", 9),
    lambda config: config.update(in_channels=9),
    lambda config: config.pop("in_channels"),
    lambda config: config.__delitem__("in_channels"),
    lambda config: config.clear(),
    lambda config: config.setdefault("new", 1),
    lambda config: config.__ior__({"in_channels": 9}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_cannot_be_changed(pair: pairs.Pair, change: Callable[[Any], object]) -> None:
    config = pair.fast.unet.config
    with pytest.raises(fastldm.errors.RefusedError, match="cannot be changed"):
        change(config)
    assert config.in_channels == 4


# --------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_as_a_module(pair: pairs.Pair, name: str) -> None:
    mine, other = getattr(pair.fast, name), getattr(pair.ref, name)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in other.parameters())
    assert next(mine.parameters()).device == mine.device == torch.device("cpu")
    assert mine.dtype == other.dtype == torch.float32
    assert not any(p.requires_grad for p in mine.parameters())
    assert mine.eval() is mine
    assert mine.requires_grad_(False) is mine
    assert mine.to(memory_format=torch.channels_last) is mine
    assert mine.to("cpu", dtype=torch.float32) is mine
    assert name in repr(mine)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_network_does_not_move_alone(pair: pairs.Pair, name: str) -> None:
    with pytest.raises(fastldm.Error, match=r"moves with its pipeline alone: pipe\.to") as caught:
        getattr(pair.fast, name).to(torch.float16)
    assert caught.value.field == "dtype"
    with pytest.raises(fastldm.Error) as caught:
        getattr(pair.fast, name).requires_grad_(True)
    assert caught.value.field == "requires_grad"


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vae", "use_tiling", True),
        ("vae", "config", {}),
        ("unet", "x", 1),
        ("text_encoder", "dtype", torch.float16),
        ("tokenizer", "padding_side", "left"),
        ("tokenizer", "model_max_length", 7),
        ("tokenizer", "tokenizer", None),
    ],
)
def test_what_a_view_would_lose_cannot_be_assigned(pair: pairs.Pair, part: str, name: str, value: Any) -> None:
    view = getattr(pair.fast, part)
    with pytest.raises(fastldm.errors.RefusedError, match=f"^{name} cannot be assigned") as caught:
        setattr(view, name, value)
    assert caught.value.field == caught.value.name == name
    assert name not in vars(view)
    view._mark = 1
    assert view._mark == 1


def test_what_is_needless_is_no_error_and_what_is_unknown_is_one(pair: pairs.Pair) -> None:
    pair.fast.unet.enable_xformers_memory_efficient_attention()
    with pytest.raises(AttributeError, match="add_adapter"):
        pair.fast.unet.add_adapter("x")
    assert not hasattr(pair.fast.unet, "peft_config")


@pytest.mark.parametrize("timestep", [7, 981.0, torch.tensor(981), torch.tensor([3]), torch.tensor([3, 500])])
def test_a_unet_predicts_what_diffusers_does(pair: pairs.Pair, timestep: Any) -> None:
    sample, states = noise(2, 4, 16, 12), noise(2, 77, 24, seed=1)
    expected = pair.ref.unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]
    found = pair.fast.unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]
    assert relative_error(found, expected) < CLOSE
    assert found.is_contiguous()
    others = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
    assert torch.equal(pair.fast.unet(sample, timestep, states, **others).sample, found)


def test_a_text_encoder_reads_what_transformers_does(pair: pairs.Pair) -> None:
    ids = pair.ref.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    mine, expected = pair.fast.text_encoder(ids, attention_mask=None), pair.ref.text_encoder(ids)
    assert relative_error(mine[0], expected[0]) < CLOSE
    assert torch.equal(mine.last_hidden_state, mine[0])
    assert relative_error(mine.pooler_output, expected.pooler_output) < CLOSE
    assert relative_error(pair.fast.text_encoder(ids[:, :5])[0], pair.ref.text_encoder(ids[:, :5])[0]) < CLOSE


def test_an_autoencoder_encodes_as_diffusers(pair: pairs.Pair) -> None:
    x = noise(2, 3, 32, 48).clamp(-1, 1)
    mine, expected = pair.fast.vae.encode(x).latent_dist, pair.ref.vae.encode(x).latent_dist
    assert relative_error(mine.mean, expected.mean) < CLOSE
    assert relative_error(mine.mode(), expected.mode()) < CLOSE
    assert relative_error(mine.std, expected.std) < CLOSE
    samples = [d.sample(torch.Generator().manual_seed(5)) for d in (mine, expected)]
    assert relative_error(*samples) < CLOSE
    assert torch.equal(pair.fast.vae.encode(x, return_dict=False)[0].mean, mine.mean)


def test_an_autoencoder_decodes_as_diffusers(pair: pairs.Pair) -> None:
    z = noise(2, 4, 16, 24) / pair.fast.vae.config.scaling_factor
    expected = pair.ref.vae.decode(z, return_dict=False)[0]
    found = pair.fast.vae.decode(z, return_dict=False)[0]
    assert relative_error(found, expected) < CLOSE
    assert torch.equal(pair.fast.vae.decode(z, generator=None).sample, found)


def test_the_autoencoder_sets_how_its_pipeline_decodes(pair: pairs.Pair) -> None:
    fast, latents = fastldm.Pipeline(**pair.fast.components), noise(1, 4, 32, 32)
    call = {"num_inference_steps": 1, "latents": latents, "output_type": "pt", "height": 64, "width": 64}
    whole = pairs.paint(fast, prompt="cat", **call)
    fast.vae.enable_tiling()
    fast.vae.enable_slicing()
    tiled = pairs.paint(fast, prompt="cat", **call)
    assert not torch.equal(tiled, whole)
    assert not torch.equal(fast.vae.decode(latents).sample, pair.fast.vae.decode(latents).sample)
    fast.disable_vae_tiling()
    assert torch.equal(pairs.paint(fast, prompt="cat", **call), whole)
    fast.vae.enable_tiling(True)
    fast.vae.disable_tiling()
    fast.vae.disable_slicing()
    assert torch.equal(pairs.paint(fast, prompt="cat", **call), whole)


@torch.no_grad()
def by_hand(pipe: Any, scheduler: Any) -> Tensor:
    """The loop of a tutorial: encode, denoise with guidance, decode."""
    texts = []
    for prompt in ("", "the red cat"):
        tokens = pipe.tokenizer(
            [prompt],
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        texts.append(pipe.text_encoder(tokens.input_ids.to("cpu"))[0])
    embeddings = torch.cat(texts)
    generator = torch.Generator().manual_seed(9)
    side = pipe.unet.config.sample_size
    latents = torch.randn((1, pipe.unet.config.in_channels, side, side), generator=generator)
    scheduler.set_timesteps(5)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
        unconditional, text = pipe.unet(both, t, encoder_hidden_states=embeddings).sample.chunk(2)
        latents = scheduler.step(unconditional + 7.5 * (text - unconditional), t, latents).prev_sample
    image = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents).sample
    return (image / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_a_loop_by_hand_paints_the_same(pair: pairs.Pair, kind: Any) -> None:
    config = pair.fast.scheduler.config
    mine, expected = (by_hand(pipe, kind.from_config(config)) for pipe in (pair.fast, pair.ref))
    assert relative_error(mine, expected) < 1e-4


def test_threads_get_what_each_would_get_alone(pair: pairs.Pair) -> None:
    unet, vae = pair.fast.unet, pair.fast.vae
    sizes = [(2, 4, 16, 16), (1, 4, 8, 24), (1, 4, 24, 8)]

    def both(i: int) -> Tensor:
        x = noise(*sizes[i % 3], seed=i)
        states = noise(len(x), 7, 24, seed=i + 100)
        return vae.decode(unet(x, i, encoder_hidden_states=states).sample).sample

    alone = [both(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(both, range(12)))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_gradients_stay_out(pair: pairs.Pair) -> None:
    x = noise(1, 4, 8, 8).requires_grad_()
    assert not pair.fast.unet(x, 3, noise(1, 7, 24)).sample.requires_grad
    assert not pair.fast.vae.decode(x).sample.requires_grad


WRONG: list[tuple[str, str, Callable[[Any], object]]] = [
    ("no tensor", "sample", lambda p: p.unet([1.0], 3, noise(1, 7, 24))),
    ("integers", "sample", lambda p: p.unet(torch.ones(1, 4, 8, 8, dtype=torch.int64), 3, noise(1, 7, 24))),
    ("three channels", "sample", lambda p: p.unet(noise(1, 3, 8, 8), 3, noise(1, 7, 24))),
    ("no batch", "sample", lambda p: p.unet(noise(4, 8, 8), 3, noise(1, 7, 24))),
    ("nothing in it", "sample", lambda p: p.unet(noise(0, 4, 8, 8), 3, noise(0, 7, 24))),
    ("on meta", "sample", lambda p: p.unet(torch.empty(1, 4, 8, 8, device="meta"), 3, noise(1, 7, 24))),
    ("sparse", "sample", lambda p: p.unet(noise(1, 4, 8, 8).to_sparse(), 3, noise(1, 7, 24))),
    ("a text", "timestep", lambda p: p.unet(noise(1, 4, 8, 8), "3", noise(1, 7, 24))),
    ("NaN", "timestep", lambda p: p.unet(noise(1, 4, 8, 8), float("nan"), noise(1, 7, 24))),
    ("three timesteps", "timestep", lambda p: p.unet(noise(2, 4, 8, 8), torch.ones(3), noise(2, 7, 24))),
    ("another width", "encoder_hidden_states", lambda p: p.unet(noise(1, 4, 8, 8), 3, noise(1, 7, 25))),
    ("another batch", "encoder_hidden_states", lambda p: p.unet(noise(2, 4, 8, 8), 3, noise(1, 7, 24))),
    ("no tokens", "encoder_hidden_states", lambda p: p.unet(noise(1, 4, 8, 8), 3, noise(1, 0, 24))),
    ("None", "encoder_hidden_states", lambda p: p.unet(noise(1, 4, 8, 8), 3, None)),
    ("a mask", "attention_mask", lambda p: p.unet(noise(1, 4, 8, 8), 3, noise(1, 7, 24), attention_mask=noise(1))),
    ("return_dict", "return_dict", lambda p: p.unet(noise(1, 4, 8, 8), 3, noise(1, 7, 24), return_dict=3)),
    ("a list of ids", "input_ids", lambda p: p.text_encoder([[1, 2]])),
    ("float ids", "input_ids", lambda p: p.text_encoder(noise(1, 3))),
    ("too many ids", "input_ids", lambda p: p.text_encoder(torch.ones(1, 78, dtype=torch.int64))),
    ("an id too large", "input_ids", lambda p: p.text_encoder(torch.full((1, 3), 520))),
    ("a negative id", "input_ids", lambda p: p.text_encoder(torch.full((1, 3), -1))),
    ("one row", "input_ids", lambda p: p.text_encoder(torch.ones(3, dtype=torch.int64))),
    ("a text's mask", "attention_mask", lambda p: p.text_encoder(torch.ones(1, 3).long(), torch.ones(1, 3))),
    (
        "all states",
        "output_hidden_states",
        lambda p: p.text_encoder(torch.ones(1, 3).long(), output_hidden_states=True),
    ),
    ("an odd size", "x", lambda p: p.vae.encode(noise(1, 3, 33, 32))),
    ("one channel", "x", lambda p: p.vae.encode(noise(1, 1, 32, 32))),
    ("an array", "x", lambda p: p.vae.encode(noise(1, 3, 32, 32).numpy())),
    ("pixels", "z", lambda p: p.vae.decode(noise(1, 3, 32, 32))),
    ("NaN in z", "image", lambda p: p.vae.decode(torch.full((1, 4, 8, 8), torch.nan))),
    ("a generator's seed", "generator", lambda p: p.vae.encode(noise(1, 3, 32, 32)).latent_dist.sample(3)),
    ("tiling", "use_tiling", lambda p: p.vae.enable_tiling("yes")),
    ("a number as a text", "text", lambda p: p.tokenizer(3)),
    ("too many texts", "text", lambda p: p.tokenizer(["x"] * (MAX_TEXTS + 1))),
    ("bytes for a device", "device", lambda p: p.tokenizer("cat").to(b"cpu")),
    ("another padding", "padding", lambda p: p.tokenizer("cat", padding="left")),
    ("another truncation", "truncation", lambda p: p.tokenizer("cat", truncation="only_first")),
    ("arrays", "return_tensors", lambda p: p.tokenizer("cat", return_tensors="np")),
    ("no room", "max_length", lambda p: p.tokenizer("cat", max_length=1)),
    ("ragged", "padding", lambda p: p.tokenizer(["cat", "the red"], return_tensors="pt")),
    ("a stride", "stride", lambda p: p.tokenizer("cat", stride=3)),
    ("a text for ids", "token_ids", lambda p: p.tokenizer.decode("cat")),
    ("a negative token", "token_ids", lambda p: p.tokenizer.decode([-1])),
    ("an odd way to decode", "errors", lambda p: p.tokenizer.decode([1], errors="x")),
    ("one number of many", "sequences", lambda p: p.tokenizer.batch_decode(3)),
]


@pytest.mark.parametrize(("field", "call"), [(f, c) for _, f, c in WRONG], ids=[name for name, _, _ in WRONG])
def test_a_wrong_argument_is_named(pair: pairs.Pair, field: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(fastldm.Error, match=field) as caught:
        call(pair.fast)
    assert caught.value.field == field


# -------------------------------------------------------------------------------------------------------- tokenizer


CALLS: list[dict[str, Any]] = [
    {},
    {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"},
    {"padding": "max_length", "truncation": True, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"padding": "max_length", "max_length": 200},
    {"padding": "longest", "return_tensors": "pt"},
    {"padding": True, "truncation": True, "max_length": 6, "return_tensors": "pt"},
    {"truncation": True, "max_length": 4},
    {"max_length": 4},
    {"truncation": True},
    {"truncation": False},
    {"add_special_tokens": False},
    {"add_special_tokens": False, "truncation": True, "max_length": 2},
    {"padding": False, "return_length": False},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("texts", [PROMPTS, *PROMPTS], ids=["all", *(p[:9] for p in PROMPTS)])
def test_a_tokenizer_gives_the_ids_of_transformers(pair: pairs.Pair, texts: Any, call: dict[str, Any]) -> None:
    mine, expected = pair.fast.tokenizer(texts, **call), pair.ref.tokenizer(texts, **call)
    for name in ("input_ids", "attention_mask"):
        a, b = mine[name], expected[name]
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, name
        assert getattr(mine, name) is a


@pytest.mark.parametrize("skip", [False, True])
def test_a_tokenizer_decodes_as_transformers(pair: pairs.Pair, skip: bool) -> None:
    ids = pair.ref.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = pair.ref.tokenizer.batch_decode(ids, skip_special_tokens=skip)
    assert pair.fast.tokenizer.batch_decode(ids, skip_special_tokens=skip) == expected
    assert pair.fast.tokenizer.decode(ids[2].tolist(), skip_special_tokens=skip) == expected[2]
    assert pair.fast.tokenizer.decode(517) == pair.ref.tokenizer.decode(517)


def test_a_tokenizer_takes_more_texts_than_a_call_paints(pair: pairs.Pair) -> None:
    words = [f"the red cat {i}" for i in range(100)]
    assert pair.fast.tokenizer(words).input_ids == pair.ref.tokenizer(words).input_ids


def test_what_a_tokenizer_is(pair: pairs.Pair) -> None:
    mine, expected = pair.fast.tokenizer, pair.ref.tokenizer
    for name in ("model_max_length", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(mine, name) == getattr(expected, name), name
    assert len(mine) == len(expected)
    assert mine("cat", return_tensors="pt").to("cpu").input_ids.shape == (1, 3)


# --------------------------------------------------------------------------------------------------- what wraps them


def test_a_compiled_network_is_recognised(pair: pairs.Pair) -> None:
    unet = pair.fast.unet
    once = torch.compile(unet)
    for value in (unet, once, torch.compile(once, mode="reduce-overhead", fullgraph=True)):
        found = unwrapped(value)
        assert isinstance(found, View)
        assert found.network is unet.network
    assert unwrapped(torch.compile(pair.ref.unet)) is pair.ref.unet
    for other in (None, 3, "unet", print, pair.ref.unet, torch.compile(torch.sin)):
        assert not isinstance(unwrapped(other), View)


def test_compiling_a_network_is_accepted_and_another_is_refused(pair: pairs.Pair) -> None:
    fast = pair.fast
    before = fast.unet.network
    fast.unet = torch.compile(fast.unet, mode="reduce-overhead", fullgraph=True)
    fast.vae = fast.vae
    assert fast.unet.network is before
    for name, value in (("unet", pair.ref.unet), ("unet", fast.vae), ("vae", None), ("text_encoder", 3)):
        with pytest.raises(fastldm.Error, match=name) as caught:
            setattr(fast, name, value)
        assert caught.value.field == name
    assert fast.unet.network is before
