"""Folders, hub caches, shards and links: what is opened, what is refused, and that nothing else happens."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from fastldm.errors import FileError
from fastldm.weights import files as module
from fastldm.weights.files import ModelFolder, TensorFiles, open_file, open_model

STEM = "diffusion_pytorch_model"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A blocking open or an endless read fails its own test only."""

    def stop(*_: object) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _no_open_files_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv_in.weight": torch.randn(4, 2, 3, 3, generator=generator),
        "conv_in.bias": torch.randn(4, generator=generator).half(),
        "mid.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "mid.flag": torch.tensor([True, False]),
        "scale": torch.tensor(2.5),
    }


def shard(folder: Path, names: list[str], index: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Writes `tensors` over the files `names` with an index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if place[key] == name}, folder / name)
    content = {"metadata": {"total_size": 1}, "weight_map": place}
    (folder / index).write_text(json.dumps(content))
    return content


def write_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / f"{STEM}.safetensors.index.json").write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model's folder with one component in one file, below a folder that is not the model's."""
    root = tmp_path / "my model"
    (root / "unet").mkdir(parents=True)
    (root / "unet/config.json").write_text('{"in_channels": 4}')
    save_file(weights(), root / f"unet/{STEM}.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard(tmp_path / "model/unet", names, f"{STEM}.safetensors.index.json", weights())
    return tmp_path / "model"


def refused(root: Path, match: str, field: str | None = None) -> None:
    """Opening the U-Net's weights fails with the file or folder named."""
    with pytest.raises(FileError, match=match) as caught, open_model(root).tensors("unet"):
        pass
    assert str(root.resolve()) in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.field == field


def equal(tensors: TensorFiles, expected: dict[str, torch.Tensor]) -> None:
    assert tensors.infos.keys() == expected.keys()
    for name, value in expected.items():
        found = tensors.read(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert (found.dtype, found.shape) == (tensors.infos[name].dtype, tensors.infos[name].shape)
        assert torch.equal(found, value)


# ---------------------------------------------------------------------------------------------- what is read


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


# --------------------------------------------------------------------------------------------- damaged files


def test_f01_f02_a_file_cut_anywhere_is_an_error(root: Path, tmp_path: Path) -> None:
    whole = (root / f"unet/{STEM}.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(9), *random.Random(1).sample(range(len(whole)), 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.safetensors: is truncated: .* expected, \d+ present"):
            open_file(cut)


def test_f04_f32_a_sparse_giant_is_refused_by_its_size(tmp_path: Path) -> None:
    giant = tmp_path / "giant.safetensors"
    with giant.open("wb") as file:
        file.truncate(module.MAX_FILE + 1)
    with pytest.raises(FileError, match=f"has {module.MAX_FILE + 1} bytes; at most {module.MAX_FILE}"):
        open_file(giant)


def test_f18_a_file_cut_while_open_is_an_error(root: Path) -> None:
    path = root / f"unet/{STEM}.safetensors"
    whole = path.read_bytes()
    for length in random.Random(2).sample(range(len(whole)), 100):
        path.write_bytes(whole)
        with open_model(root).tensors("unet") as tensors:
            os.truncate(path, length)
            kept = 0
            for name, value in weights().items():
                try:
                    assert torch.equal(tensors.read(name), value)
                    kept += 1
                except FileError as error:
                    message = str(error)
            assert kept < len(weights())
            assert f"{STEM}.safetensors: tensor" in message
            assert "cut while open" in message


def test_f19_a_file_rewritten_after_the_read_changes_nothing(root: Path) -> None:
    path = root / f"unet/{STEM}.safetensors"
    with open_model(root).tensors("unet") as tensors:
        values = {name: tensors.read(name) for name in tensors.infos}
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(path.stat().st_size))
        for name, value in weights().items():
            assert torch.equal(values[name], value)


class Gadget:
    """Unpickling makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def hostile(canary: Path) -> dict[str, bytes]:
    archive = canary.parent / "archive"
    torch.save({"a": Gadget(canary)}, archive)
    old = canary.parent / "old"
    torch.save({"a": Gadget(canary)}, old, _use_new_zipfile_serialization=False)
    return {
        "zip archive": archive.read_bytes(),
        "pickle": pickle.dumps(Gadget(canary)),
        "pickle;": old.read_bytes(),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n",
        "web page": b"<html><head><title>403</title></head></html>",
    }


def test_f20_content_is_judged_and_extensions_are_not(root: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    kinds = [
        ".safetensors",
        ".SAFETENSORS",
        ".Safetensors",
        ".bin",
        ".ckpt",
        ".pt",
        ".safetensors.bin",
        ".gguf",
        "",
    ]
    names = [f"{stem}{kind}" for kind in kinds for stem in ("model", "a b", "model.fp16", "x")][:30]
    for match, content in hostile(canary).items():
        for name in names:
            path = tmp_path / name
            path.write_bytes(content)
            with pytest.raises(FileError, match=match) as caught:
                open_file(path)
            assert str(path) in str(caught.value)
        (root / f"unet/{STEM}.safetensors").write_bytes(content)
        refused(root, match)
    assert not canary.exists()


# --------------------------------------------------------------------------------------------- which weights


def test_pickled_weights_are_never_a_fallback(root: Path, tmp_path: Path) -> None:
    (root / f"unet/{STEM}.safetensors").unlink()
    canary = tmp_path / "canary"
    torch.save({"a": Gadget(canary)}, root / f"unet/{STEM}.bin")
    refused(root, "has only pickled weights, which can run code: convert them to safetensors")
    assert not canary.exists()


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


# --------------------------------------------------------------------------------------------------- indexes


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
    with pytest.raises(FileError, match="plain name"):
        folder.tensors(name, "model")


# -------------------------------------------------------------------------------------------- kinds of files


def test_f32_only_regular_files_are_read(root: Path, tmp_path: Path) -> None:
    place = root / f"unet/{STEM}.safetensors"
    place.unlink()
    os.mkfifo(place)
    refused(root, r"is not a regular file \(p")
    place.unlink()
    place.mkdir()
    refused(root, r"is not a regular file \(d")
    place.rmdir()
    here = os.getcwd()
    os.chdir(place.parent)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place.name)
        os.chdir(here)
        refused(root, "cannot be opened")
    for device in ("/dev/zero", "/dev/null", "/dev/stdin"):
        with pytest.raises(FileError, match=r"is not a regular file|is truncated|cannot be opened|missing"):
            open_file(device)
    os.mkfifo(root / "unet/pipe.json")
    with pytest.raises(FileError, match="is not a regular file"):
        open_model(root).read_json("unet/pipe.json")


def test_unreadable_and_oversized_json(root: Path) -> None:
    (root / "big.json").write_text('{"a": "' + "x" * (1 << 20) + '"}')
    with pytest.raises(FileError, match=r"big\.json has 1048585 bytes; at most 1048576"):
        open_model(root).read_json("big.json")


@pytest.mark.parametrize("depth", [2, 32, 33, 1000, 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_f16_json_nests_32_levels(root: Path, depth: int, name: str) -> None:
    (root / "scheduler").mkdir()
    (root / name).write_text('{"a":' * depth + "1" + "}" * depth)
    folder = open_model(root)
    if depth <= 32:
        assert folder.read_json(name)
    else:
        with pytest.raises(FileError, match=f"{name}: is nested deeper than 32 levels"):
            folder.read_json(name)


# ----------------------------------------------------------------------------------------------------- links


def link(at: Path, target: Path | str) -> None:
    if at.is_symlink() or at.exists():
        at.unlink()
    at.symlink_to(target)


def test_f31_links_out_of_the_folder_are_refused(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(root / f"unet/{STEM}.safetensors", outside / "w.safetensors")
    place = root / f"unet/{STEM}.safetensors"
    (root / "inner").symlink_to(outside)
    (root / "chain").symlink_to(outside / "w.safetensors")
    targets = [
        "../../outside/w.safetensors",
        outside / "w.safetensors",
        "../inner/w.safetensors",
        "../chain",
        "/dev/zero",
    ]
    targets += ["../../my model evil/w.safetensors", "/", "..", "../.."]
    (tmp_path / "my model evil").mkdir()
    shutil.copy(outside / "w.safetensors", tmp_path / "my model evil")
    for target in targets:
        link(place, target)
        refused(root, "leads out of the model's folder|is not a regular file")
    link(place, place.name)
    refused(root, "cannot be opened|is missing")
    link(place, "nothing")
    refused(root, "is missing")
    (root / "vae").symlink_to(outside)
    for name in ("vae/w.safetensors", "vae"):
        with pytest.raises(FileError, match="leads out"):
            open_model(root).path(name)
    with pytest.raises(FileError, match="leads out"):
        open_model(root).tensors("vae", "w")


def test_f31_links_inside_the_folder_and_to_it_are_followed(root: Path, tmp_path: Path) -> None:
    place = root / f"unet/{STEM}.safetensors"
    place.rename(root / "stored.bin")
    link(place, "../stored.bin")
    link(tmp_path / "alias", root)
    for path in (root, tmp_path / "alias", str(root)):
        with open_model(path).tensors("unet") as tensors:
            equal(tensors, weights())


@pytest.fixture
def cache(root: Path, tmp_path: Path) -> Path:
    """The hub's cache with the model "some-one/model.v1", as huggingface_hub lays it out."""
    repo = tmp_path / "hub/models--some-one--model.v1"
    snapshot = repo / "snapshots" / REVISION
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(REVISION)
    for i, file in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        blob = repo / "blobs" / f"{i:064x}"
        file.rename(blob)
        place = snapshot / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    return tmp_path / "hub"


def test_a_model_in_the_hubs_cache_is_read_without_network(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--some-one--model.v1/snapshots" / REVISION
    link(tmp_path / "alias", snapshot)
    link(tmp_path / "hub alias", cache)
    folders = [
        open_model("some-one/model.v1", cache_dir=cache, local_files_only=True),
        open_model("some-one/model.v1", cache_dir=cache, local_files_only=True, revision=REVISION),
        open_model("some-one/model.v1", cache_dir=tmp_path / "hub alias", local_files_only=True),
        open_model(snapshot),
        open_model(tmp_path / "alias"),
    ]
    for folder in folders:
        assert folder.read_json("unet/config.json") == {"in_channels": 4}
        with folder.tensors("unet") as tensors:
            equal(tensors, weights())


def test_f31_links_of_a_snapshot_lead_to_its_own_blobs_only(cache: Path) -> None:
    repo = cache / "models--some-one--model.v1"
    snapshot = repo / "snapshots" / REVISION
    place = snapshot / f"unet/{STEM}.safetensors"
    blob = place.resolve()
    for other in (cache / "models--other--model/blobs", repo / "refs", repo / "blobs-evil", cache):
        other.mkdir(parents=True, exist_ok=True)
        shutil.copy(blob, other / "w")
        link(place, other / "w")
        refused(snapshot, "leads out of the model's folder")
    (repo / "blobs/out").symlink_to(cache / "w")
    link(place, repo / "blobs/out")
    refused(snapshot, "leads out of the model's folder")


def test_a_folder_that_only_looks_like_a_snapshot_gains_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    place = root / f"unet/{STEM}.safetensors"
    place.rename(tmp_path / "blobs/w")
    link(place, tmp_path / "blobs/w")
    (tmp_path / "snapshots").mkdir()
    root.rename(tmp_path / "snapshots/x")
    refused(tmp_path / "snapshots/x", "leads out of the model's folder")


@pytest.mark.parametrize("blobs", ["/", "../outside", "../models--other--model/blobs", None])
def test_a_snapshot_whose_blobs_are_a_link_gains_nothing(root: Path, tmp_path: Path, blobs: str | None) -> None:
    """A folder may come from anyone, also one that looks like the hub's cache."""
    repo = tmp_path / "models--a--b"
    (repo / "snapshots").mkdir(parents=True)
    for outside in (tmp_path / "outside", tmp_path / "models--other--model/blobs"):
        outside.mkdir(parents=True)
        shutil.copy(root / f"unet/{STEM}.safetensors", outside / REVISION)
    if blobs is not None:
        (repo / "blobs").symlink_to(blobs)
        assert (repo / "blobs").is_dir()
    root.rename(repo / "snapshots/c")
    place = repo / f"snapshots/c/unet/{STEM}.safetensors"
    for target in (tmp_path / "outside", tmp_path / "models--other--model/blobs", repo / "blobs"):
        link(place, target / REVISION)
        if target.exists() and (target / REVISION).exists():
            refused(repo / "snapshots/c", "leads out of the model's folder")


@pytest.mark.parametrize(
    "name", ["w", "x" * 40, "0" * 39, "0" * 65, "A" * 40, f"{'0' * 40}.incomplete", f"in/{'0' * 40}", ""]
)
def test_only_what_the_hub_calls_a_blob_is_one(cache: Path, name: str) -> None:
    snapshot = cache / "models--some-one--model.v1/snapshots" / REVISION
    place = snapshot / f"unet/{STEM}.safetensors"
    target = cache / "models--some-one--model.v1/blobs" / name
    target.parent.mkdir(exist_ok=True)
    if name:
        shutil.copy(place.resolve(), target)
    link(place, target)
    refused(snapshot, "leads out of the model's folder")


# ------------------------------------------------------------------------------------------ the hub's errors


def test_an_id_that_is_nowhere_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"owner/model is no folder here.*connect to the network") as caught:
        open_model("owner/model", cache_dir=tmp_path, local_files_only=True)
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "check the name"),
        ("RevisionNotFoundError", "check revision="),
        ("ConnectError", "connect to the network"),
    ],
)
def test_what_the_hub_says_becomes_one_error(monkeypatch: pytest.MonkeyPatch, kind: str, advice: str) -> None:
    def fail(name: str, **options: Any) -> str:
        assert options["token"] == "secret"
        raise type(kind, (Exception,), {})("secret")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileError, match=f"revision 'v1' of owner/model .*{kind}.*{advice}") as caught:
        open_model("owner/model", revision="v1", token="secret")
    assert "secret" not in str(caught.value)


NO_IDS = [
    "a/b..c",
    "model",
    "a/b/c",
    "../x",
    "a/..",
    "/nowhere/at/all",
    "a/b\0",
    "",
    "~nobody/x/y",
    "a b/c",
    "-a/b",
    "é/b",
    "x" * 5000,
]


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_folder_and_no_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"is neither a folder nor a model id|is not a folder"):
        open_model(name, cache_dir=tmp_path, local_files_only=True)


def test_a_file_is_no_folder(root: Path) -> None:
    with pytest.raises(FileError, match=r"config\.json is not a folder; the folder with model_index\.json"):
        open_model(root / "unet/config.json")


def test_only_what_is_needed_is_fetched() -> None:
    offered = [
        "model_index.json",
        "README.md",
        "v1-5.ckpt",
        "v1-5.safetensors",
        "unet/config.json",
        *(f"unet/{STEM}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".non_ema.safetensors")),
        f"unet/{STEM}-00001-of-00002.safetensors",
        f"unet/{STEM}-00001-of-00002.fp16.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/evil.py",
        "scheduler/scheduler_config.json",
        "safety_checker/model.safetensors",
    ]
    common = ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    common += ["scheduler/scheduler_config.json"]
    for variant, word in ((None, ""), ("fp16", ".fp16")):
        chosen = filter_repo_objects(offered, allow_patterns=module._hub_patterns(variant))
        ours = [f"unet/{STEM}{word}.safetensors", f"unet/{STEM}-00001-of-00002{word}.safetensors"]
        assert sorted(chosen) == sorted(common + ours)


def test_mutated_files_are_read_right_or_refused(root: Path, tmp_path: Path) -> None:
    """The same verdict through the disk as in memory: seeded damage to a whole file."""
    rng = random.Random(3)
    whole = (root / f"unet/{STEM}.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "mutated"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with open_file(path) as tensors:
                for name, info in tensors.infos.items():
                    assert tensors.read(name).shape == info.shape
        except FileError as error:
            message = str(error)
            assert message.startswith(str(path))


def test_a_folder_opened_directly_is_the_same(root: Path) -> None:
    assert ModelFolder(root).read_json("unet/config.json") == open_model(root).read_json("unet/config.json")
