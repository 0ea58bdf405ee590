"""Arguments: every bad one is an error that names it, at once and before any work; good edge values pass."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

import fastldm
from fastldm.config import CLIP_L, SD15_UNET, SD_VAE
from fastldm.errors import ArgumentError
from fastldm.pipeline import Pipeline

GOOD: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": None,
    "height": None,
    "width": None,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "generator": None,
    "latents": None,
    "output_type": "pil",
}


class Awkward:
    """Can be neither shown nor converted."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __float__(self) -> float:
        raise ValueError("no float")


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator() for _ in range(count)]


def latents(*shape: int, value: float | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # names of tests show it
    if value is not None:
        out.view(-1)[-1] = value
    return out


def nested(*shape: int, layout: torch.layout = torch.strided) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        return torch.nested.nested_tensor([torch.zeros(shape)], layout=layout)


NO_NUMBER = [
    None,
    "7",
    b"7",
    bytearray(b"7"),
    "",
    [],
    [7, 8],
    {},
    (),
    object,
    Awkward(),
    1j,
    np.array([1.0, 2.0]),
    torch.ones(2),
    True,
    np.True_,
    torch.tensor(True),
    "NaN",
    np.str_("7"),
    np.complex64(1 + 2j),
]
NO_INTEGER = [*NO_NUMBER, 2.0, 2.5, math.nan, math.inf, np.float32(2), Decimal(2), torch.tensor(2.0)]
NO_SIDE = [x for x in NO_INTEGER if x is not None] + [0, -64, 63, 65, 7, 4, 2**70, -(2**70), 65536, 4097, 10**5000]
NO_TEXT = [
    None,
    1,
    b"cat",
    [],
    (),
    {},
    {"a"},
    iter(["a"]),
    [None],
    ["a", None],
    ["a", 1],
    [b"a"],
    [["a"]],
    np.array(["a"]),
    ["a"] * 17,
    ["a"] * 100_000,
    "x" * 65537,
    "é" * 40000,
    "\u0301" * 10**6,
    "x" * 10**7,
    "a\ud800b",
    ["a", "\udfff"],
    Awkward(),
    b"x" * 10**7,
    ["x" * 10**7] * 17,
]

BAD: dict[str, list[Any]] = {
    "height": NO_SIDE,
    "width": NO_SIDE,
    "num_inference_steps": [*(x for x in NO_INTEGER if x is not None), 0, -1, 1001, 10**9, 2**70],
    "num_images_per_prompt": [*NO_INTEGER, 0, -1, 17, 10**6],
    "guidance_scale": [
        *(x for x in NO_NUMBER if x is not None),
        math.nan,
        math.inf,
        -math.inf,
        -1,
        -1e-9,
        101,
        1e30,
        10**400,
    ],
    "guidance_rescale": [*NO_NUMBER, math.nan, math.inf, -0.1, 1.0001, 10**400],
    "guidance_interval": [
        0.5,
        "01",
        [],
        (0.5,),
        (0, 0.5, 1),
        (0.5, 0.5),
        (0.6, 0.4),
        (-0.1, 0.5),
        (0.5, 1.1),
        (0, math.nan),
        ("0", "1"),
        {0, 1},
    ],
    "eta": [*NO_NUMBER, math.nan, math.inf, -5, 5, -1e-9, 1.0001],
    "prompt": NO_TEXT,
    "negative_prompt": [x for x in NO_TEXT if x is not None] + [["a", "b"], ["a"] * 3],
    "generator": [
        0,
        42,
        -1,
        2**64,
        2.5,
        "7",
        [],
        (),
        [1],
        [None],
        torch.Generator,
        object(),
        generators(2),
        [torch.Generator(), None],
        {torch.Generator()},
        True,
        Awkward(),
    ],
    "latents": [
        1,
        "x",
        [[0.0]],
        np.zeros((1, 4, 64, 64), np.float32),
        Awkward(),
        latents(1, 4, 64, 63),
        latents(1, 4, 63, 64),
        latents(4, 64, 64),
        latents(2, 4, 64, 64),
        latents(1, 3, 64, 64),
        latents(1, 9, 64, 64),
        latents(1, 4, 512, 512),
        latents(0, 4, 64, 64),
        torch.tensor(1.0),
        torch.zeros(1, 4, 64, 64, dtype=torch.int64),
        torch.zeros(1, 4, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 4, 64, 64, dtype=torch.bool),
        torch.zeros(1, 4, 64, 64, dtype=torch.complex64),
        latents(1, 4, 64, 64, value=math.nan),
        latents(1, 4, 64, 64, value=math.inf),
        latents(1, 4, 64, 64, value=-math.inf),
        latents(1, 4, 64, 64, value=math.nan, dtype=torch.float16),
        latents(1, 4, 64, 64, value=1e300, dtype=torch.float64),
        torch.empty(1, 4, 64, 64, device="meta"),
        torch.zeros(1, 4, 64, 64).to_sparse(),
        latents(1, 4, 64, 64).to(torch.float8_e4m3fn),
    ],
    "output_type": [
        "",
        "PIL",
        "jpeg",
        "tensor",
        None,
        1,
        True,
        b"pil",
        [],
        ["pil"],
        {},
        ("pil",),
        np.array([1, 2]),
        np.array(["pil", "np"]),
        torch.ones(2),
        Awkward(),
        object,
    ],
}
NO_EMBEDDING: list[Any] = [
    1,
    "x",
    [[[0.0]]],
    np.zeros((1, 77, 768), np.float32),
    Awkward(),
    torch.tensor(1.0),
    latents(77, 768),
    latents(1, 1, 77, 768),
    latents(1, 77, 767),
    latents(1, 77, 1024),
    latents(0, 77, 768),
    latents(17, 77, 768),
    latents(1, 0, 768),
    latents(1, 1025, 768),
    latents(1, 77, 768, value=math.nan),
    latents(1, 77, 768, value=math.inf),
    latents(1, 77, 768, value=math.nan, dtype=torch.bfloat16),
    latents(1, 77, 768, value=1e300, dtype=torch.float64),
    torch.zeros(1, 77, 768, dtype=torch.int64),
    torch.zeros(1, 77, 768, dtype=torch.bool),
    torch.zeros(1, 77, 768, dtype=torch.complex64),
    torch.empty(1, 77, 768, device="meta"),
    torch.zeros(1, 77, 768).to_sparse(),
    nested(77, 768),
    nested(77, 768, layout=torch.jagged),
]
NO_SAMPLER: list[Any] = [
    "",
    "eular",
    "DPM++ 2M Karras",
    "\ud800",
    "x" * 10**6,
    7,
    True,
    b"euler",
    [],
    ["euler"],
    (),
    ("EulerDiscreteScheduler",),
    ("EulerDiscreteScheduler", 7),
    ("EulerDiscreteScheduler", None),
    np.ones(2),
    torch.ones(2),
    object(),
    type,
    Awkward(),
]


def takes_seven() -> Callable[..., Any]:
    """A callback that asks for tensors in a way of its own."""

    def callback(*_: Any) -> dict[str, Any]:
        return {}

    callback.tensor_inputs = 7  # type: ignore[attr-defined]
    return callback


NO_TENSOR_NAMES: list[Any] = [
    None,
    7,
    "latents",
    b"latents",
    {"latents"},
    {"latents": 1},
    iter(["latents"]),
    [7],
    [None],
    ["nope"],
    ["latents", "Latents"],
    ["image_latents"],
    ("mask",),
    ["masked_image_latents"],
    ["noise_pred"],
    ["x" * 10**6],
    ["\ud800"],
    [["latents"]],
    [Awkward()],
    Awkward(),
]
NO_FLAG: list[Any] = [None, 0, 1, 0.0, "", "no", "True", b"", [], [True], {}, (), object(), Awkward()]
NO_FLAG += [np.array([True, False]), np.array([]), torch.ones(2), torch.tensor(True), math.nan]
NO_SEED: list[Any] = [*(x for x in NO_INTEGER if x is not None), -1, 2**63, 2**64, 10**5000, range(1)]
NO_SEED += [[1, 2], (1, 2), [-1], [2**63], [2.5], ["1"], [None], [True], [[1]], {1}, np.array([1]), Awkward]
BAD |= {
    "seed": NO_SEED,
    "prompt_embeds": NO_EMBEDDING,
    "negative_prompt_embeds": [*NO_EMBEDDING, latents(1, 76, 768), latents(1, 78, 768), latents(2, 77, 768)],
    "clip_skip": [*(x for x in NO_INTEGER if x is not None), -1, 12, 13, 2**70],
    "return_dict": NO_FLAG,
    "callback_on_step_end": [7, "f", [], {}, True, torch.ones(2), object(), Awkward()],
    "callback_on_step_end_tensor_inputs": NO_TENSOR_NAMES,
    "cancel": [True, False, 0, "x", object(), fastldm.CancelToken, lambda: True, Awkward()],
    "scheduler": NO_SAMPLER,
}
BESIDE: dict[str, dict[str, Any]] = {"prompt_embeds": {"prompt": None}}  # what else such a call has
CASES = [(name, i) for name, values in BAD.items() for i in range(len(values))]


class Explodes:
    """Stands for a part of the pipeline that nobody may touch while a request is checked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was used before the request was checked")


def pipeline(unet: Any = SD15_UNET, vae: Any = SD_VAE) -> Pipeline:
    """Knows its configurations, and can do nothing."""
    engine, tokenizer = Explodes(), Explodes()
    engine.unet, engine.vae, engine.text_encoder = Explodes(), Explodes(), Explodes()
    engine.unet.config, engine.vae.config, engine.text_encoder.config = unet, vae, CLIP_L
    engine.device, tokenizer.length = torch.device("cpu"), 77
    engine.check_process = lambda: None
    pipe = object.__new__(Pipeline)
    pipe.__dict__.update(_scheduler=Explodes(), _engine=engine, _tokenizer=tokenizer)
    return pipe


class Checked(Exception):
    """Carries the request out of the pipeline, before the work begins."""


def checked(pipe: Pipeline | None = None, **change: Any) -> Any:
    """The request that a call becomes."""
    pipe = pipeline() if pipe is None else pipe

    def painted(request: Any, *_: object) -> None:
        raise Checked(request)

    pipe._painted = painted  # type: ignore[method-assign,assignment]
    with pytest.raises(Checked) as caught:
        pipe(**{**GOOD, **change})
    return caught.value.args[0]


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 400


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{name}-{i}" for name, i in CASES])
def test_a_bad_argument_is_named_at_once(name: str, index: int) -> None:
    pipe, call = pipeline(), {**GOOD, **BESIDE.get(name, {}), name: BAD[name][index]}
    seconds = []
    for _ in range(3):  # the best of three, of this thread: the machine is busy, the collector may run in one
        start = time.thread_time()
        with pytest.raises(fastldm.Error) as caught:
            pipe(**call)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.01
    assert caught.value.field == name
    assert isinstance(caught.value, ValueError)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500


PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt"),
    ({"prompt": ["a"], "negative_prompt": ["b", "c"]}, "negative_prompt"),
    ({"prompt": ["a", "b"], "generator": generators(3)}, "generator"),
    ({"prompt": ["a", "b"], "num_images_per_prompt": 2, "generator": generators(2)}, "generator"),
    ({"prompt": ["a"] * 9, "num_images_per_prompt": 2}, "num_images_per_prompt"),
    ({"height": 64, "width": 64, "latents": latents(1, 4, 64, 64)}, "latents"),
    ({"height": 64, "width": 128, "latents": latents(1, 4, 16, 8)}, "latents"),
    ({"num_images_per_prompt": 2, "latents": latents(1, 4, 64, 64)}, "latents"),
    ({"seed": 1, "generator": torch.Generator()}, "seed"),
    ({"seed": [1], "generator": generators(1)}, "seed"),
    ({"seed": [1], "num_images_per_prompt": 2}, "seed"),
    ({"seed": [1, 2, -1], "num_images_per_prompt": 3}, "seed"),
    ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed"),
    ({"prompt_embeds": latents(1, 77, 768)}, "prompt_embeds"),
    ({"prompt": None}, "prompt"),
    ({"prompt": None, "negative_prompt_embeds": latents(1, 77, 768)}, "prompt"),
    ({"negative_prompt": "b", "negative_prompt_embeds": latents(1, 77, 768)}, "negative_prompt_embeds"),
    ({"prompt": ["a", "b"], "negative_prompt_embeds": latents(1, 77, 768)}, "negative_prompt_embeds"),
    (
        {"prompt": None, "prompt_embeds": latents(1, 77, 768), "negative_prompt_embeds": latents(1, 70, 768)},
        "negative_prompt_embeds",
    ),
    (
        {"prompt": None, "prompt_embeds": latents(2, 77, 768), "negative_prompt_embeds": latents(1, 77, 768)},
        "negative_prompt_embeds",
    ),
    ({"prompt": None, "prompt_embeds": latents(2, 77, 768), "negative_prompt": ["b"] * 3}, "negative_prompt"),
    ({"prompt": None, "prompt_embeds": latents(1, 78, 768)}, "negative_prompt_embeds"),  # a negative prompt has 77
    ({"prompt": None, "prompt_embeds": latents(1, 77, 768), "clip_skip": 1}, "clip_skip"),
    ({"prompt": None, "prompt_embeds": latents(9, 77, 768), "num_images_per_prompt": 2}, "num_images_per_prompt"),
    ({"callback_on_step_end": takes_seven()}, "callback_on_step_end_tensor_inputs"),
]


@pytest.mark.parametrize(("change", "field"), PAIRS)
def test_arguments_at_odds_with_each_other(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        pipeline()(**{**GOOD, **change})
    assert caught.value.field == field


UNKNOWN = {
    "hieght": "height",
    "negativ_prompt": "negative_prompt",
    "num_inference_step": "num_inference_steps",
    "guidance": "guidance_scale",
    "prompts": "prompt",
    "Seed": "seed",
    "strenght": "strength",
    "mask_img": "mask_image",
    "callback_on_step": "callback_on_step_end",
}


@pytest.mark.parametrize(("name", "meant"), UNKNOWN.items())
@pytest.mark.parametrize("value", [64, None, False, Awkward()], ids=["64", "None", "False", "Awkward"])
def test_an_unknown_argument_is_refused_with_what_was_meant(name: str, meant: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{meant}'") as caught:
        pipeline()(**{**GOOD, name: value})
    assert isinstance(caught.value, fastldm.Error)
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 10**6, "\ud800", "zzz", "__class__", "safety_checker"])
def test_a_strange_name_of_an_argument_is_refused_in_few_words(name: str) -> None:
    with pytest.raises(TypeError, match="there is no such argument; there are prompt, ") as caught:
        pipeline()(**{**GOOD, name: 1})
    assert isinstance(caught.value, fastldm.Error)
    assert len(str(caught.value)) < 600  # the list of all arguments


def test_only_the_prompt_is_positional() -> None:
    """Python's own error: a call that passes diffusers' second argument so is refused, and not misread."""
    with pytest.raises(TypeError, match="positional"):
        pipeline()("a cat", 64)


# ---------------------------------------------------------------------------------------------------- what is good

Check = Callable[[Any], bool]
EDGES: list[tuple[dict[str, Any], Check]] = [
    ({"height": 8, "width": 8}, lambda r: (r.height, r.width) == (8, 8)),
    ({"height": 4096, "width": 4096}, lambda r: r.height == 4096),
    ({"height": np.int64(64), "width": np.uint8(64)}, lambda r: (type(r.height), r.width) == (int, 64)),
    ({"height": torch.tensor(64)}, lambda r: r.height == 64),
    ({"height": None, "width": 64}, lambda r: (r.height, r.width) == (512, 64)),
    ({"num_inference_steps": 1}, lambda r: r.steps == 1),
    ({"num_inference_steps": np.int32(1000)}, lambda r: r.steps == 1000),
    ({"guidance_scale": 0}, lambda r: r.scales.branches == 1),
    ({"guidance_scale": 1}, lambda r: r.scales.branches == 1),
    ({"guidance_scale": 1.0000001}, lambda r: r.scales.branches == 2),
    ({"guidance_scale": np.float16(7.5)}, lambda r: r.scales.text == 7.5),
    ({"guidance_scale": torch.tensor(3.0)}, lambda r: r.scales.text == 3.0),
    ({"guidance_scale": 100}, lambda r: r.scales.text == 100.0),
    ({"guidance_rescale": 1}, lambda r: r.scales.rescale == 1.0),
    ({"guidance_interval": None}, lambda r: r.scales.interval == (0.0, 1.0)),
    ({"guidance_interval": [0, np.float32(0.5)]}, lambda r: r.scales.interval == (0.0, 0.5)),
    ({"eta": 1}, lambda r: r.eta == 1.0),
    ({"prompt": ""}, lambda r: r.words.prompts == ("",)),
    ({"prompt": "x" * 65536}, lambda r: len(r.words.prompts[0]) == 65536),
    ({"prompt": ("a", "b")}, lambda r: r.words.prompts == ("a", "b")),
    ({"prompt": "a\x00b"}, lambda r: r.words.prompts == ("a\x00b",)),
    ({"prompt": ["a"] * 16}, lambda r: r.batch == 16),
    ({"prompt": ["a"] * 8, "num_images_per_prompt": 2}, lambda r: r.batch == 16),
    ({"prompt": ["a", "b"], "negative_prompt": "c"}, lambda r: r.words.negative_prompts == ("c", "c")),
    ({"prompt": ["a", "b"], "negative_prompt": None}, lambda r: r.words.negative_prompts == ("", "")),
    ({"generator": generators(1)}, lambda r: r.generator is not None),
    ({"prompt": ["a", "b"], "generator": generators(1)}, lambda r: r.batch == 2),
    ({"prompt": ["a", "b"], "generator": tuple(generators(2))}, lambda r: isinstance(r.generator, list)),
    ({"latents": latents(1, 4, 64, 64, dtype=torch.float16)}, lambda r: r.latents is not None),
    ({"latents": latents(1, 4, 64, 64).requires_grad_()}, lambda r: r.latents is not None),
    ({"latents": latents(1, 64, 64, 4).permute(0, 3, 1, 2)}, lambda r: r.latents is not None),
    ({"output_type": np.str_("np")}, lambda r: type(r.output_type) is str),
    ({"seed": 0}, lambda r: [g.initial_seed() for g in r.generator] == [0]),
    ({"seed": np.int64(7), "num_images_per_prompt": 3}, lambda r: [g.initial_seed() for g in r.generator] == [7, 8, 9]),
    ({"seed": 2**63 - 1}, lambda r: r.generator[0].initial_seed() == 2**63 - 1),
    ({"seed": (3, 1), "prompt": ["a", "b"]}, lambda r: [g.initial_seed() for g in r.generator] == [3, 1]),
    ({"prompt": None, "prompt_embeds": latents(3, 77, 768)}, lambda r: r.batch == 3),
    ({"prompt": None, "prompt_embeds": latents(16, 2, 768, dtype=torch.float16)}, lambda r: r.batch == 16),
    (
        {"prompt": None, "prompt_embeds": latents(1, 1024, 768), "negative_prompt_embeds": latents(1, 1024, 768)},
        lambda r: r.words.negative_embeds.shape == (1, 1024, 768),
    ),
    ({"prompt": None, "prompt_embeds": latents(1, 1, 768), "guidance_scale": 1}, lambda r: r.batch == 1),
    ({"negative_prompt_embeds": latents(1, 77, 768)}, lambda r: r.words.negative_prompts == ()),
    ({"clip_skip": 0}, lambda r: r.words.clip_skip == 0),
    ({"clip_skip": 11}, lambda r: r.words.clip_skip == 11),
    ({"return_dict": np.False_}, lambda r: r.batch == 1),
    ({"callback_on_step_end_tensor_inputs": []}, lambda r: r.callback_tensors == ()),
    ({"cancel": None}, lambda r: not r.cancel.cancelled),
    *[({"output_type": kind}, lambda r: True) for kind in ("pil", "np", "pt", "latent")],
]


@pytest.mark.parametrize(("change", "check"), EDGES, ids=[str(change)[:40] for change, _ in EDGES])
def test_edges_that_are_good(change: dict[str, Any], check: Check) -> None:
    assert check(checked(**change))


def test_a_request_cannot_be_changed() -> None:
    request = checked()
    with pytest.raises(AttributeError):
        request.height = 8


def test_a_factor_of_its_own() -> None:
    """A VAE of two levels halves: sizes are multiples of 2, latents are half as large."""
    pipe = pipeline(replace(SD15_UNET, sample_size=16), replace(SD_VAE, channels=(8, 8)))
    request = checked(pipe, height=6, latents=latents(1, 4, 3, 16))
    assert (request.height, request.width) == (6, 32)
    with pytest.raises(ArgumentError, match="multiple of 2"):
        pipe(**{**GOOD, "height": 7})
