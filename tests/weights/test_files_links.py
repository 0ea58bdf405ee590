"""Links, the hub's cache and the hub: nothing outside of a model's folder is read, and nothing is fetched unasked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from fastldm.errors import FileError
from fastldm.weights import files as module
from fastldm.weights.files import open_model
from tests.weights.folders import REVISION, STEM, equal, link, refused, weights

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")


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


# ---------------------------------------------------------------------------------------------------- the hub's cache


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


# --------------------------------------------------------------------------------------------------- the hub's errors


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
