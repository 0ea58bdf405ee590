"""Folders, variants, shards and their indexes: what is opened, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from fastldm.errors import FileError
from fastldm.weights import files as module
from fastldm.weights.files import ModelFolder, TensorFiles, open_file, open_model
from tests.weights.folders import STEM, equal, refused, shard, weights, write_index

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")


def test_a_folder_is_read(root: Path) -> None:
    folder = open_model(root)
    assert folder.root == root.resolve()
    assert folder.read_json("unet/config.json") == {"in_channels": 4}
    assert folder.has("unet")
    assert folder.has("unet/config.json")
    assert not folder.has("vae/config.json")
    assert folder.path("unet/config.json") == root.resolve() / "unet/config.json"
    with folder.tensors("unet") as tensors:
        equal(tensors, weights())
        assert tensors.metadata == {"format": "pt"}
        assert tensors.where.endswith(f"unet/{STEM}.safetensors")
        with pytest.raises(FileError, match="has no tensor 'nothing'"):
            tensors.read("nothing")


def test_one_file_is_read_whatever_its_name(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / f"unet/{STEM}.safetensors", tmp_path / "model.ckpt")
    with open_file(tmp_path / "model.ckpt") as tensors:
        equal(tensors, weights())


@pytest.mark.parametrize(
    ("component", "variant", "index", "names"),
    [
        ("unet", None, f"{STEM}.safetensors.index.json", f"{STEM}-0000%d-of-00003.safetensors"),
        ("vae", "fp16", f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000%d-of-00003.safetensors"),
        ("unet", "fp16", f"{STEM}.safetensors.index.fp16.json", f"{STEM}-0000%d-of-00003.fp16.safetensors"),
        ("unet", "fp16", f"{STEM}.safetensors.fp16.index.json", f"{STEM}-0000%d-of-00003.fp16.safetensors"),
        (
            "text_encoder",
            "fp16",
            "model.fp16.safetensors.index.json",
            "model.fp16-0000%d-of-00003.safetensors",
        ),
        ("text_encoder_2", None, "model.safetensors.index.json", "model-0000%d-of-00003.safetensors"),
    ],
)
def test_shards_under_every_name_in_use(
    tmp_path: Path, component: str, variant: str | None, index: str, names: str
) -> None:
    shard(tmp_path / component, [names % i for i in (1, 2, 3)], index, weights())
    with open_model(tmp_path, variant=variant).tensors(component) as tensors:
        equal(tensors, weights())
        assert tensors.where.endswith(index)
    patterns = module._hub_patterns(variant)
    for name in [index, *(names % i for i in (1, 2, 3))]:
        assert list(filter_repo_objects([f"{component}/{name}"], allow_patterns=patterns))


def test_what_diffusers_and_transformers_write_is_read(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    signal.setitimer(signal.ITIMER_REAL, 120)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    models = {"vae": vae, "text_encoder": transformers.CLIPTextModel(config)}
    for component, model in models.items():
        model.save_pretrained(tmp_path / component)
        model.save_pretrained(tmp_path / component, variant="fp16", max_shard_size="8KB")
        assert any("-of-" in name for name in os.listdir(tmp_path / component))
        for variant in (None, "fp16"):
            with open_model(tmp_path, variant=variant).tensors(component) as tensors:
                equal(tensors, dict(model.state_dict()))


def test_tensors_are_read_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    preadv = os.preadv

    def count(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(map(len, buffers)))
        return preadv(fd, buffers, offset)

    with open_model(root).tensors("unet") as tensors:
        monkeypatch.setattr(os, "preadv", count)
        tensors.read("conv_in.bias")
    assert read == [8]


def test_a_read_that_comes_in_pieces_is_complete(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_CHUNK", 3)
    with open_model(root).tensors("unet") as tensors:
        equal(tensors, weights())


def test_threads_share_one_open_file(root: Path) -> None:
    failures: list[BaseException] = []

    def work(tensors: TensorFiles) -> None:
        try:
            for _ in range(50):
                equal(tensors, weights())
        except BaseException as error:
            failures.append(error)

    with open_model(root).tensors("unet") as tensors:
        threads = [threading.Thread(target=work, args=(tensors,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_closed_files_are_an_error(root: Path) -> None:
    tensors = open_model(root).tensors("unet")
    tensors.close()
    with open(root / "unet/config.json", "rb") as other:  # has the number that the closed file had
        tensors.close()
        with pytest.raises(FileError, match="cannot be read"):
            tensors.read("scale")
        assert other.read()


def test_a_folder_opened_directly_is_the_same(root: Path) -> None:
    assert ModelFolder(root).read_json("unet/config.json") == open_model(root).read_json("unet/config.json")


# ------------------------------------------------------------------------------------------------------ which weights


@pytest.mark.parametrize("variant", ["bf16", "ema", None])
def test_a_missing_variant_lists_those_that_exist(root: Path, variant: str | None) -> None:
    unet = root / "unet"
    names = ["fp16.safetensors", "safetensors.index.int8.json", "non_ema-00001-of-00002.safetensors"]
    for name in [f"{STEM}.{name}" for name in names]:
        (unet / name).touch()
    if variant is None:
        (unet / f"{STEM}.safetensors").unlink()
    found = "'fp16', 'int8'" if variant is None else "none, 'fp16', 'int8'"
    wanted = "weights without a variant" if variant is None else f"variant '{variant}'"
    with pytest.raises(FileError, match=f"unet has no {wanted}; variants here: {found}$") as caught:
        open_model(root, variant=variant).tensors("unet")
    assert caught.value.field == "variant"


@pytest.mark.parametrize("variant", ["", "../x", "a/b", "a.b", "*", "x" * 65, "a\n"])
def test_a_variant_is_a_plain_word(root: Path, variant: str) -> None:
    with pytest.raises(FileError, match="must be a plain word such as 'fp16'"):
        open_model(root, variant=variant)


def test_missing_components_and_files_are_named(root: Path) -> None:
    folder = open_model(root)
    with pytest.raises(FileError, match="has no folder 'vae'"):
        folder.tensors("vae")
    with pytest.raises(FileError, match="'tokenizer' has no usual file name; known: unet, vae"):
        folder.tensors("tokenizer")
    with pytest.raises(FileError, match=r"vae/config\.json is missing"):
        folder.read_json("vae/config.json")
    with pytest.raises(FileError, match=r"unet/other\.safetensors is missing"):
        folder.tensors("unet", "other")


# ------------------------------------------------------------------------------------------------------------ indexes


def test_f08_f34_a_key_twice_in_an_index(sharded: Path) -> None:
    unet = sharded / "unet"
    for name in weights():
        for other in ("00001", "00002"):
            text = (unet / f"{STEM}.safetensors.index.json").read_text()
            extra = f'"weight_map": {{"{name}": "{STEM}-{other}-of-00002.safetensors", '
            write_index(unet, text.replace('"weight_map": {', extra, 1))
            refused(sharded, f"duplicate key '{name}'", name)
            write_index(unet, text)


def test_f34_a_tensor_in_two_shards(sharded: Path) -> None:
    first = sharded / f"unet/{STEM}-00001-of-00002.safetensors"
    for name in ("conv_in.bias", "extra"):
        save_file(
            {**{k: weights()[k] for k in ("conv_in.weight", "mid.weight", "scale")}, name: torch.ones(1)},
            first,
        )
        refused(sharded, f"00001-of-00002.*tensor '{name}' is in it, but the index says otherwise", name)


def test_f33_a_missing_shard(sharded: Path) -> None:
    (sharded / f"unet/{STEM}-00002-of-00002.safetensors").unlink()
    refused(sharded, r"00002-of-00002\.safetensors is missing")


def test_f33_an_index_without_metadata(sharded: Path) -> None:
    index = sharded / f"unet/{STEM}.safetensors.index.json"
    write_index(sharded / "unet", {"weight_map": json.loads(index.read_text())["weight_map"]})
    with open_model(sharded).tensors("unet") as tensors:
        equal(tensors, weights())


def test_f33_a_shard_that_lacks_a_listed_tensor(sharded: Path) -> None:
    index = json.loads((sharded / f"unet/{STEM}.safetensors.index.json").read_text())
    index["weight_map"]["more.weight"] = f"{STEM}-00001-of-00002.safetensors"
    write_index(sharded / "unet", index)
    refused(sharded, "tensor 'more.weight' is not in it, but the index says so", "more.weight")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "weight_map must map"),
        ({"weight_map": {}}, "weight_map must map"),
        ({"weight_map": ["a"]}, "weight_map must map"),
        ("[]", "must be a JSON object"),
        ('{"weight_map": {"a": "b"}', "not valid JSON"),
        ('{"weight_map": ' + '{"a":' * 40 + "1" + "}" * 41, "nested deeper than 32"),
        ({"weight_map": {str(i): f"s{i}" for i in range(257)}}, "lists 257 files; at most 256"),
        ({"weight_map": {"a": "x" * (1 << 20)}}, "bytes; at most 1048576"),
    ],
)
def test_f33_an_index_of_another_form(sharded: Path, content: object, match: str) -> None:
    write_index(sharded / "unet", content)
    refused(sharded, match)


def spellings() -> list[object]:
    """Ways to name a file that is not beside the index, or that is no plain name."""
    ups = [
        "..",
        ".",
        "",
        "./",
        "../",
        "//",
        "...",
        "%2e%2e",
        "..%2f",
        "~",
        "~root",
        "\uff0e\uff0e",
        "..;",
        "..\0",
        ". .",
    ]
    tails = [
        "secret.safetensors",
        "../secret.safetensors",
        "a/b.safetensors",
        "",
        "..",
        "secret\0.safetensors",
    ]
    joined = [f"{up}{slash}{tail}" for up in ups for slash in ("/", "\\", "") for tail in tails]
    plain = ("secret.safetensors", "..secret.safetensors")
    odd = [
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "file:///x",
        "http://x/y",
        "a\nb",
        "\u202ex",
        "é",
        "x" * 256,
    ]
    return [*(name for name in joined if name not in plain), *odd, None, 5, 1.5, True, ["x"], {"x": "y"}]


def test_f30_shards_are_plain_names_beside_the_index(sharded: Path) -> None:
    save_file(weights(), sharded / "secret.safetensors")
    names = spellings()
    assert len(names) >= 200
    for name in names:
        write_index(sharded / "unet", {"weight_map": {"conv_in.weight": name}})
        with pytest.raises(FileError, match=r"is not a plain file name|lone|valid JSON") as caught:
            open_model(sharded).tensors("unet")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["..", "../x.json", "/etc/hostname", "unet/../../x.json", "a\\b", "unet//config.json", ""]
)
def test_f30_every_name_is_relative_and_plain(root: Path, name: str) -> None:
    folder = open_model(root)
    for call in (folder.has, folder.path, folder.read_json, folder.open, folder.tensors):
        with pytest.raises(FileError):
            call(name)
    expected = "plain name" if name else r"model\.safetensors is missing"  # "" is the model's own folder
    with pytest.raises(FileError, match=expected):
        folder.tensors(name, "model")
