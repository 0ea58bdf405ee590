"""Loading patches nothing global: threads that build or load modules meanwhile are unharmed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from tests.weights.memory_tensors import KINDS, loaded


def test_modules_built_meanwhile_stay_on_the_cpu() -> None:
    build, tensors = KINDS["unet"]()
    stop, built, wrong = threading.Event(), [0], []

    def construct() -> None:
        while not stop.is_set():
            layer = nn.Linear(8, 8)
            built[0] += 1
            if layer.weight.device.type != "cpu" or not layer.weight.requires_grad or not layer.weight.any():
                wrong.append(layer)

    thread = threading.Thread(target=construct)
    thread.start()
    loads, end = 0, time.monotonic() + 1.0
    while time.monotonic() < end:
        loaded(build, tensors)
        loads += 1
    stop.set()
    thread.join()
    assert loads >= 2
    assert built[0] >= 100
    assert not wrong


def test_loads_at_once_are_all_right() -> None:
    kinds = [KINDS[name]() for name in ("unet", "vae", "text encoder", "unet")]
    alone = [loaded(*kind) for kind in kinds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: loaded(*kinds[i % 4]), range(12)))
    for i, model in enumerate(together):
        for a, b in zip(model.parameters(), alone[i % 4].parameters(), strict=True):
            assert torch.equal(a, b)
