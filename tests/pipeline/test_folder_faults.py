"""A model's folder with one fault in it: an error that names the file and the thing, at once, and nothing else happens.

The readers have their own tests, in far greater numbers; here a sample of each fault goes the whole way of a user.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastldm
from fastldm.errors import ConfigError, Error, FileError, WeightsError
from fastldm.runtime.build import COMPONENTS
from fastldm.weights.files import MAX_FILE, ModelFolder, open_file
from tests.pipeline.pairs import MODELS, Pair, make

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {
    "index": "model_index.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}
ODD_NAMES = [
    *("a\0b", "a\nb", "\r\n", "../../x", "..", "/etc/passwd", "\u202eabc", "\x1b[31m", "\u2028", "\x7f", "\x85"),
    *("é", "\u200b", "'", '"', "\\", "%s", "{0}", "a b", "\t", "x" * 300, "x" * 5000, "C:\\x", "file:///x", ""),
    *(f"conv_in.weight{ending}" for ending in ("\0", "\n", " ", "/", "\\", "\u202e", "é", "'", "\x1b")),
    *(f"{start}conv_in.weight" for start in ("../", "./", "/", "\0", "\n", "~/", "\ufeff", "//host/", "\u2066")),
    *("\U000e0041", "\udb40".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "ａ", "\u0301", "\x9b31m"),
    *("--help", "$(id)"),
]


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that code out of the model would make; nothing may be imported or started meanwhile."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started or a connection made")

    for owner, name in ((subprocess.Popen, "__init__"), (os, "system"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)
    before = set(sys.modules)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()
    imported = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not imported & {"evil", "pipeline", "my_unet", "antigravity", "this", "turtle", "idlelib", "unet"}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, kind: type[Error], *parts: str) -> Error:
    """Loading raises `kind`, in a message for people that has all of `parts`."""
    with pytest.raises(kind) as caught:
        fastldm.Pipeline(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for part in parts:
        assert part in message
    return caught.value


def plant(path: Path) -> str:
    """Python that makes the folder `path`."""
    return f"import os\nos.mkdir({str(path)!r})\n"


# ---------------------------------------------------------------------------------------------------- the weights


def test_f01_f02_a_cut_file_is_refused_with_both_sizes(copied: Path) -> None:
    for name in WEIGHTS.values():
        whole = (copied / name).read_bytes()
        for length in [0, 1, 7, 8, *random.Random(1).sample(range(len(whole)), 3), len(whole) - 1]:
            (copied / name).write_bytes(whole[:length])
            refused(copied, FileError, str(copied / name), "is truncated", "expected", "present")
        (copied / name).write_bytes(whole)


def damaged(whole: bytes) -> dict[str, bytes]:
    """The faults of a header, each in an otherwise good file."""
    end = 8 + int.from_bytes(whole[:8], "little")
    text, data = whole[8:end].decode().rstrip(), whole[end:]
    entries = json.loads(text)
    names = [name for name in entries if name != "__metadata__"]
    first = names[0]

    def file(text: str, behind: bytes = data) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode() + behind

    def changed(**change: Any) -> bytes:
        return file(json.dumps({**entries, first: {**entries[first], **change}}))

    start, stop = entries[first]["data_offsets"]
    twice = json.dumps({first: entries[first]})[1:-1]
    moved = {**entries, first: {**entries[first], "data_offsets": [start + 4, stop + 4]}}
    return {
        "F03 a length beyond the file": struct.pack("<Q", 1 << 40) + whole[8:],
        "F04 a header over 16 MiB": struct.pack("<Q", (16 << 20) + 1) + whole[8:],
        "F05 F06 a tensor that is moved": file(json.dumps(moved)),
        "F06 a hole before the end": file(text, data + bytes(8)),
        "F07 bytes behind the last tensor": whole + b"PK\x03\x04",
        "F08 a key twice, the same bytes": file(f"{text[:-1]},{twice}}}"),
        "F09 a key twice, other bytes": file(
            f"{text[:-1]},{twice.replace(f'{start}, {stop}', f'0, {stop - start}')}}}"
        ),
        "F10 an empty tensor": file(f'{text[:-1]},"e":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}'),
        "F11 a product that overflows": changed(shape=[1 << 31, 1 << 31, 4]),
        "F12 a negative size": changed(shape=[-1, -1]),
        "F12 a size that is no integer": changed(shape=[1.0]),
        "F13 an unknown dtype": changed(dtype="F8_E8M0"),
        "F14 a space before": file(f" {text}"),
        "F14 a tab behind": file(f"{text}\t"),
        "F15 a rank of 9": changed(shape=[1] * 9),
        "F16 deep nesting": changed(shape=json.loads("[" * 40 + "]" * 40)),
    }


def test_f03_to_f16_a_bad_header_has_the_same_verdict_in_every_mode(copied: Path) -> None:
    """As one file, as a component, as a shard, as a whole pipeline."""
    place = copied / WEIGHTS["unet"]
    shard = copied / "unet/shard.safetensors"
    index = copied / "unet/diffusion_pytorch_model.safetensors.index.json"
    weight_map = dict.fromkeys(load_file(place), shard.name)
    for name, content in damaged(place.read_bytes()).items():
        place.write_bytes(content)
        with pytest.raises(FileError) as alone:
            open_file(place)
        reason = str(alone.value).removeprefix(str(place))
        assert reason != str(alone.value), name
        refused(copied, FileError, f"{place}{reason}")
        place.rename(shard)
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FileError) as sharded, ModelFolder(copied).tensors("unet"):
            pass
        assert str(sharded.value) == f"{shard}{reason}"
        index.unlink()
        shard.rename(place)


def test_f17_names_of_tensors_stand_escaped_in_messages(copied: Path) -> None:
    place = copied / WEIGHTS["text_encoder"]
    tensors = load_file(place)
    for name in random.Random(17).sample(ODD_NAMES, 15):
        save_file({**tensors, name: torch.zeros(1)}, place)
        error = refused(copied, WeightsError, str(place), "1 of ", "do not belong to this model: ")
        assert error.field == name
        told = str(error).partition("model: ")[2]
        assert told[0] == told[-1]
        assert told[0] in "'\""


@pytest.mark.parametrize("component", WEIGHTS)
def test_f21_f22_f23_f24_tensors_that_do_not_fit_are_named(copied: Path, component: str) -> None:
    place = copied / WEIGHTS[component]
    tensors = load_file(place)
    for name in random.Random(21).sample(sorted(tensors), 2):
        right = tensors[name]
        faults = {
            "1 of ": {k: v for k, v in tensors.items() if k != name},
            "do not belong": {**tensors, f"{name}2": right.clone()},
            "has shape": {**tensors, name: torch.cat([right, right])},
            "weights must be floats": {**tensors, name: right.to(torch.int8)},
            "NaN or infinite": {**tensors, name: right.clone().index_fill_(0, torch.tensor(0), torch.nan)},
        }
        for words, content in faults.items():
            save_file(content, place)
            error = refused(copied, WeightsError, str(place), words, name)
            assert error.field in (name, f"{name}2")


def test_f26_one_nan_in_a_bias_of_the_vae_is_found(copied: Path) -> None:
    place = copied / WEIGHTS["vae"]
    tensors = load_file(place)
    tensors["decoder.conv_out.bias"][1] = torch.nan
    save_file(tensors, place)
    assert refused(copied, WeightsError, str(place)).field == "decoder.conv_out.bias"


@pytest.mark.parametrize("model", MODELS)
def test_f25_infinity_is_found_in_other_models(model: str, tmp_path: Path) -> None:
    made = make(tmp_path, model)
    place = made.folder / WEIGHTS["unet"]
    tensors = load_file(place)
    name = random.Random(25).choice(sorted(tensors))
    tensors[name].view(-1)[-1] = torch.inf
    save_file(tensors, place)
    assert refused(made.folder, WeightsError, str(place)).field == name


def shards_refused(folder: Path, *parts: str) -> Error:
    with pytest.raises(FileError) as caught, ModelFolder(folder).tensors("unet"):
        pass
    assert str(folder) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    return caught.value


def test_f33_f34_an_index_at_odds_with_its_shards(pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Each shard missing, and twelve tensors each out of the index, in the wrong shard, twice, and in two shards."""
    pair().ref.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    good = index.read_text()
    places = json.loads(good)["weight_map"]
    shards = sorted(set(places.values()))
    for name in shards:
        (tmp_path / "unet" / name).rename(tmp_path / "away")
        shards_refused(tmp_path, f"{name} is missing")
        (tmp_path / "away").rename(tmp_path / "unet" / name)
    for name in random.Random(33).sample(sorted(places), 12):
        other = next(shard for shard in shards if shard != places[name])
        texts = {
            "is in it, but the index says otherwise": {k: v for k, v in places.items() if k != name},
            "but the index says": {**places, name: other},
            "is not in it, but the index says so": {**places, f"{name}2": other},
        }
        for words, changed in texts.items():
            index.write_text(json.dumps({"weight_map": changed}))
            assert shards_refused(tmp_path, words, name).field in (name, f"{name}2")
        index.write_text(good.replace('"weight_map": {', f'"weight_map": {{"{name}": "{other}",', 1))
        assert shards_refused(tmp_path, str(index), f"duplicate key '{name}'").field == name
    index.write_text(good)
    tensors = load_file(tmp_path / "unet" / shards[0])
    save_file({**tensors, next(k for k in places if k not in tensors): torch.zeros(1)}, tmp_path / "unet" / shards[0])
    shards_refused(tmp_path, shards[0], "is in it, but the index says otherwise")


def special(place: Path, kind: str) -> None:
    match kind:
        case "fifo":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case "socket":
            here = os.getcwd()
            os.chdir(place.parent)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(place.name)
            os.chdir(here)
        case "giant":
            with place.open("wb") as file:
                file.truncate(MAX_FILE + 1)
        case "loop":
            place.symlink_to(place.name)
        case device:
            place.symlink_to(device)


KINDS = ["fifo", "folder", "socket", "giant", "loop", "/dev/zero", "/dev/null", "/dev/full"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [WEIGHTS["unet"], CONFIGS["vae"], CONFIGS["index"]])
def test_f32_what_is_no_regular_file_is_refused_at_once(copied: Path, name: str, kind: str) -> None:
    (copied / name).unlink()
    special(copied / name, kind)
    refused(copied, FileError, Path(name).name)
    folder, seconds = ModelFolder(copied), []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(FileError):
            folder.tensors("unet") if name == WEIGHTS["unet"] else folder.read_json(name)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


# --------------------------------------------------------------------------------------------- the configurations


@pytest.mark.parametrize("name", CONFIGS.values())
def test_f16_json_is_32_levels_deep_at_most(copied: Path, name: str) -> None:
    for depth in (33, 100, 1000, 10_000, 100_000, 200_000):
        (copied / name).write_text('{"a":' + "[" * depth + "]" * depth + "}")
        refused(copied, FileError, name, "is nested deeper than 32 levels")


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_f17_keys_stand_escaped_in_messages(copied: Path, name: str) -> None:
    assert len(set(ODD_NAMES)) >= 50
    text = (copied / CONFIGS[name]).read_text()
    for key in ODD_NAMES:
        (copied / CONFIGS[name]).write_text(text)
        edit(copied / CONFIGS[name], **{key: 5})
        error = refused(copied, ConfigError, CONFIGS[name], "does not know")
        assert error.field == f"{CONFIGS[name]}: {key}"


BAD_VALUES = {
    "unet": {"layers_per_block": 10**9, "norm_eps": 0, "attention_head_dim": 0, "block_out_channels": [10**6] * 3},
    "vae": {"scaling_factor": 0, "norm_num_groups": -4, "layers_per_block": 10**9, "latent_channels": 10**6},
    "text_encoder": {"num_hidden_layers": 10**9, "vocab_size": 10**12, "layer_norm_eps": -1, "hidden_act": "relu"},
    "scheduler": {"beta_start": 0, "beta_end": 2, "num_train_timesteps": 10**12, "prediction_type": "x"},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_f27_f28_f29_values_out_of_range_are_refused_before_a_weight_is_read(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFolder, "tensors", lambda *_: pytest.fail("weights were opened"))
    text = (copied / CONFIGS[name]).read_text()
    for key, value in BAD_VALUES[name].items():
        (copied / CONFIGS[name]).write_text(text)
        edit(copied / CONFIGS[name], **{key: value})
        assert refused(copied, ConfigError, CONFIGS[name], key).field == f"{CONFIGS[name]}: {key}"


@pytest.mark.parametrize(
    "literal", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-0", "0x10", "01", "+1"]
)
def test_f27_numbers_that_json_does_not_have_are_refused(copied: Path, literal: str) -> None:
    for name, key in (("vae", "scaling_factor"), ("scheduler", "beta_start")):
        path = copied / CONFIGS[name]
        text = path.read_text()
        path.write_text(text.replace("{", f'{{"{key}": {literal}, "_was": ', 1).replace('"_was": ', "", 1))
        refused(copied, FileError, CONFIGS[name])
        path.write_text(text)


@pytest.mark.parametrize("name", CONFIGS.values())
def test_f08_a_key_twice_in_any_file_is_refused(copied: Path, name: str) -> None:
    text = (copied / name).read_text()
    key = next(iter(json.loads(text)))
    (copied / name).write_text(text.rstrip().removesuffix("}") + f', "{key}": 1}}')
    assert refused(copied, FileError, name, f"duplicate key '{key}'").field == key


# ------------------------------------------------------------------------------------------------------ the index

MODULES = ["subprocess", "os", "builtins", "shutil", "ctypes", "antigravity", "this", "turtle", "evil", "unet.evil"]
MODULES += ["../evil", "torch.hub", "diffusers", "transformers", "importlib", "pickle", "__main__", "runpy", "", "."]
OTHERS = ["Popen", "system", "exec", "UNet3DConditionModel", "../evil"]


def test_f35_only_known_classes_are_taken_and_nothing_is_imported(copied: Path, canary: Path) -> None:
    (copied / "evil.py").write_text(plant(canary))
    (copied / "unet/evil.py").write_text(plant(canary))
    index = json.loads((copied / "model_index.json").read_text())
    pairs = [(module, name) for module in MODULES for name in OTHERS]
    assert len(pairs) == 100
    for i, (module, name) in enumerate(pairs):
        component = list(COMPONENTS)[i % len(COMPONENTS)]
        (copied / "model_index.json").write_text(json.dumps({**index, component: [module, name]}))
        assert refused(copied, ConfigError, "model_index.json", component).field == component


def test_f35_a_known_class_of_another_module_is_refused(copied: Path, canary: Path) -> None:
    (copied / "evil.py").write_text(plant(canary))
    index = json.loads((copied / "model_index.json").read_text())
    for module in set(MODULES) - {"diffusers"}:
        (copied / "model_index.json").write_text(json.dumps({**index, "unet": [module, "UNet2DConditionModel"]}))
        assert refused(copied, ConfigError, "model_index.json", "unet").field == "unet"


def test_f35_a_component_is_a_pair(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    for wrong in ("UNet2DConditionModel", {"a": 1}, None, [None, None], ["diffusers"], [], 3, ["diffusers", "a", "b"]):
        (copied / "model_index.json").write_text(json.dumps({**index, "unet": wrong}))
        assert refused(copied, ConfigError, "model_index.json", "unet").field == "unet"


def test_f35_configurations_name_no_other_class(copied: Path, canary: Path) -> None:
    (copied / "evil.py").write_text(plant(canary))
    for name, key in (
        ("unet", "_class_name"),
        ("vae", "_class_name"),
        ("scheduler", "_class_name"),
        ("text_encoder", "architectures"),
    ):
        text = (copied / CONFIGS[name]).read_text()
        for wrong in ("evil.UNet", "subprocess.Popen", "os.system", "../evil", "evil", "AutoModel", ""):
            edit(copied / CONFIGS[name], **{key: [wrong] if key == "architectures" else wrong})
            assert refused(copied, ConfigError, CONFIGS[name]).field == f"{CONFIGS[name]}: {key}"
        (copied / CONFIGS[name]).write_text(text)


ELSEWHERE = [
    "../elsewhere",
    "..",
    ".",
    "/",
    "/etc",
    "unet/../../x",
    "unet/",
    "./unet",
    "unet\\..",
    "unet\0",
    "~",
    "%2e%2e",
]


def test_f36_components_of_other_names_are_refused(copied: Path, canary: Path) -> None:
    """The folder beside the model's exists and holds a good component."""
    shutil.copytree(copied / "unet", copied.parent / "elsewhere")
    index = json.loads((copied / "model_index.json").read_text())
    names = [*ELSEWHERE, *(name for name in ODD_NAMES if name not in ELSEWHERE)]
    assert len(names) >= 50
    for name in names:
        (copied / "model_index.json").write_text(json.dumps({**index, name: index["unet"]}))
        assert refused(copied, ConfigError, "model_index.json", "is no component").field == name


CODE: dict[str, dict[str, Any]] = {
    "a pipeline of its own": {"index": {"_class_name": ["pipeline", "MyPipeline"]}},
    "a component of its own": {"index": {"unet": ["my_unet", "MyUNet"]}},
    "auto_map of the U-Net": {"unet": {"auto_map": {"AutoModel": "my_unet.MyUNet"}}},
    "auto_map of the scheduler": {"scheduler": {"auto_map": {"AutoScheduler": "my_unet.MyUNet"}}},
    "a flag that trusts": {"unet": {"trust_remote_code": True}},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "nothing names it": {},
    "auto_map of the text encoder": {"text_encoder": {"auto_map": {"AutoModel": "my_unet.MyUNet"}}},
    "auto_map of the tokenizer": {"tokenizer": {"auto_map": {"AutoTokenizer": ["my_unet.MyUNet", None]}}},
    "a flag in the index": {"index": {"trust_remote_code": True, "custom_pipeline": "pipeline"}},
}


@pytest.mark.parametrize(
    ("changes", "loads"),
    [*((c, False) for c in CODE.values()), *((c, True) for c in HARMLESS.values())],
    ids=[*CODE, *HARMLESS],
)
def test_f37_python_beside_the_weights_is_never_run(
    copied: Path, canary: Path, changes: dict[str, dict[str, Any]], loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("", "unet", "text_encoder", "tokenizer", "scheduler", "vae"):
        for name in ("pipeline.py", "my_unet.py", "__init__.py", "modeling_my.py", "conftest.py"):
            (copied / place / name).write_text(plant(canary))
    monkeypatch.chdir(copied)
    for name, change in changes.items():
        edit(copied / CONFIGS[name], **change)
    if loads:
        fastldm.Pipeline(copied)
    else:
        refused(copied, ConfigError)
