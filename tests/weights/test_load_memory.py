"""Memory: one copy of the weights in their dtype, and one tensor as it is on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from fastldm.config import UNetConfig, Level, mirrored
from fastldm.model.unet import UNet
from fastldm.weights.files import open_file
from fastldm.weights.keymap import addresses
from fastldm.weights.load import load

down = (Level(192, 2, 1, 8), Level(384, 2, 1, 8), Level(768, 2, 1, 8))
config = UNetConfig(4, 4, down, mirrored(down), 1, 768, 32, 1e-5, True, 0.0, 64, None)
path = Path(sys.argv[2])

def peak():
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))) * 1024

if sys.argv[1] == "write":
    from safetensors.torch import save_file
    with torch.device("meta"):
        model = UNet(config)
    tensors, largest = {}, 0
    for hub, a in addresses(model).items():
        p = model.get_parameter(a.parameter)[a.start : a.stop]
        tensors[hub] = torch.full(p.shape, 0.01)
        largest = max(largest, tensors[hub].nbytes)
    save_file(tensors, path)
    print(sum(t.numel() for t in tensors.values()) * 2, largest)
else:
    with open_file(path) as tensors:
        open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
        torch.empty(8).to(torch.bfloat16).sum(dtype=torch.float32)
        before = peak()
        load(lambda: UNet(config), tensors, dtype=torch.bfloat16, device=torch.device("cpu"))
        print(peak() - before)
"""


def run(mode: str, path: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' peak counter")
def test_memory_grows_by_the_weights_and_one_tensor(tmp_path: Path) -> None:
    """Float32 on disk, bfloat16 in memory: at most 1.15 × the weights, and the largest tensor of the file."""
    weights, largest = run("write", tmp_path / "unet.safetensors")
    assert weights > 200e6
    (grown,) = run("read", tmp_path / "unet.safetensors")
    assert weights < grown <= 1.15 * weights + largest, (grown / 1e6, weights / 1e6, largest / 1e6)
