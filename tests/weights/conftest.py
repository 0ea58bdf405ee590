"""Models' folders, and what every test that reads files must keep."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.weights.folders import REVISION, STEM, shard, weights


@pytest.fixture
def no_hang() -> Iterator[None]:
    """A blocking open or an endless read fails its own test only."""

    def stop(*_: object) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_open_files_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


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
