"""The estimate of a call's memory against what it holds, and the refusal of what cannot fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastldm import Pipeline, config, ops
from fastldm.errors import ArgumentError
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.runtime import memory
from fastldm.runtime.engine import Engine
from fastldm.runtime.memory import Blocks, Call, available_bytes, check, peak_bytes
from fastldm.runtime.plan import Plan, Shape
from tests.oracle import saved, stable_diffusion
from tests.runtime.live import Counter

WITHIN = 0.1  # what the estimate may be off by
CALL = Call(batch=1, branches=2, height=128, width=128, steps=2, slicing=True, tiling=False)
HUGE = replace(CALL, batch=16, height=4096, width=4096)


@cache
def sd15() -> Engine:
    with torch.device("meta"):
        return Engine(UNet(config.SD15_UNET), AutoencoderKL(config.SD_VAE), TextEncoder(config.CLIP_L))


# ------------------------------------------------------------------------------------------ the estimate and the truth


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The largest stage is the sampling, or with a wider autoencoder the encoding or decoding."""
    pipes = {"narrow": stable_diffusion(), "wide": stable_diffusion()}
    pipes["wide"].vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    return {name: saved(pipe, tmp_path_factory.mktemp(name)) for name, pipe in pipes.items()}


CASES = [
    ("narrow", CALL),
    ("narrow", replace(CALL, height=62, width=94)),  # odd sizes at every level
    ("narrow", replace(CALL, batch=4, branches=1)),
    ("narrow", replace(CALL, encodes=1)),
    ("wide", CALL),
    ("wide", replace(CALL, height=64, width=192)),
    ("wide", replace(CALL, batch=2)),
    ("wide", replace(CALL, batch=2, slicing=False)),
    ("wide", replace(CALL, batch=2, output_type="latent")),
    ("wide", replace(CALL, tiling=True)),
    ("wide", replace(CALL, encodes=1, output_type="latent")),
]


@pytest.mark.parametrize(("model", "call"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a04_the_estimate_is_what_a_call_takes(
    folders: dict[str, Path], model: str, call: Call, dtype: torch.dtype
) -> None:
    pipe = Pipeline(folders[model], torch_dtype=dtype)
    pipe.enable_vae_slicing(call.slicing)
    pipe.enable_vae_tiling(call.tiling)
    options: dict[str, Any] = {"height": call.height, "width": call.width, "num_inference_steps": call.steps}
    if call.encodes:
        options |= {"image": torch.rand(call.encodes, 3, call.height, call.width), "strength": 1.0}
    options |= {"guidance_scale": 7.5 if call.branches > 1 else 1.0, "output_type": call.output_type}
    with Counter() as measured:
        pipe("a red cat", num_images_per_prompt=call.batch, **options)
    assert peak_bytes(pipe._engine, call) == pytest.approx(measured.peak, rel=WITHIN)


def fake(network: nn.Module, dtype: torch.dtype) -> Any:
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
            weight = torch.empty(p.shape, dtype=dtype, memory_format=layout)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return network


def maps(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "side"), [(2, 64), (16, 96), (3, 129), (32, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_the_networks_of_stable_diffusion(rows: int, side: int, dtype: torch.dtype) -> None:
    """At their own widths, on tensors without data."""
    with FakeTensorMode(), ops.using("reference"):
        unet, vae = fake(UNet(config.SD15_UNET), dtype), fake(AutoencoderKL(config.SD_VAE), dtype)
        row, b = Plan(unet, Shape(rows, side, side, 77)).of(1), Blocks.like(unet.conv_in.weight)
        with Counter() as denoiser:
            unet(row.model_input, row.modulation, row.context)
        with Counter() as decoder:
            vae.decode(maps(1, 4, side, side, dtype=dtype))
        with Counter() as encoder:
            vae.encode(maps(2, 3, 8 * side, 8 * side, dtype=dtype))
    expected = {
        "unet": (denoiser.peak, max(memory._unet(b, unet.config, rows, side, side))),
        "decoder": (decoder.peak, max(memory._decoder(b, vae.config, side**2))),
        "encoder": (encoder.peak, max(memory._encoder(b, vae.config, 2 * (8 * side) ** 2))),
    }
    for name, (measured, estimate) in expected.items():
        assert estimate == pytest.approx(measured, rel=WITHIN), name


@pytest.mark.parametrize("field", ["batch", "branches", "height", "width", "steps", "encodes"])
def test_more_of_anything_takes_no_less(field: str) -> None:
    step = 64 if field in ("height", "width") else 1
    for tiling in (False, True):
        calls = [replace(CALL, tiling=tiling, **{field: step * k}) for k in range(1, 33)]
        estimates = [peak_bytes(sd15(), call) for call in calls]
        assert estimates == sorted(estimates)


@pytest.mark.parametrize("name", ["slicing", "tiling"])
def test_what_saves_memory_in_the_decoder_does(name: str) -> None:
    call = replace(CALL, batch=4, height=2048, width=2048, slicing=False)
    assert peak_bytes(sd15(), replace(call, **{name: True})) < 0.7 * peak_bytes(sd15(), call)


# --------------------------------------------------------------------------------------------------------- the refusal


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def set_to(size: float | None) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda _, enough=None: size)

    return set_to


def refused(call: Call) -> ArgumentError:
    with pytest.raises(ArgumentError) as error:
        check(sd15(), call)
    return error.value


def test_a04_refused_above_what_is_available_and_not_at_it(available: Any) -> None:
    needed = memory.needed_bytes(sd15(), CALL)
    for enough in (needed, None):
        available(enough)
        check(sd15(), CALL)
    available(needed - 1)
    assert refused(CALL).field == "height"


def test_a04_the_largest_call_names_what_would_fit(available: Any) -> None:
    available(128e9)
    error = refused(HUGE)
    assert error.field == "num_images_per_prompt"
    for words in (
        "16 images of 4096×4096",
        "would take 216 GB",
        "128 GB are available",
        "fit: 9 images, a smaller size",
    ):
        assert words in str(error)
    available(16e9)
    error = refused(HUGE)
    assert error.field == "height"
    assert "fit: 1 image with pipe.enable_vae_tiling(), a smaller size" in str(error)
    assert "enable_vae_slicing" not in str(error), "it is on"


def test_a04_what_would_fit_does(available: Any) -> None:
    available(128e9)
    check(sd15(), replace(HUGE, batch=9))
    assert refused(replace(HUGE, batch=10))
    available(16e9)
    check(sd15(), replace(HUGE, batch=1, tiling=True))
    assert refused(replace(HUGE, batch=1))


def test_slicing_is_named_where_it_is_off(available: Any) -> None:
    available(4e9)
    call = replace(CALL, batch=8, height=512, width=512, slicing=False)
    assert "8 images with pipe.enable_vae_slicing()" in str(refused(call))
    check(sd15(), replace(call, slicing=True))


# ------------------------------------------------------------------------------------------------- what is available


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8000 KiB that are free, and no control groups."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\nHugePages_Total: 0\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


CPU = torch.device("cpu")


def test_what_the_machine_says(machine: Path) -> None:
    assert available_bytes(CPU) == 8000 * 1024


def test_nothing_is_known_where_nothing_tells(machine: Path) -> None:
    (machine / "proc/meminfo").unlink()
    assert available_bytes(CPU) is None


@pytest.mark.parametrize("where", ["a/b", "a", ""])
def test_every_group_of_version_2_limits(machine: Path, where: str) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    write(machine / "cgroup/a/b/memory.max", "max\n")
    group = machine / "cgroup" / where
    write(group / "memory.max", "500000\n")
    write(group / "memory.current", "300000\n")
    write(group / "memory.stat", "anon 5\nfile 70000\nactive_file 20000\ninactive_file 40000\n")
    assert available_bytes(CPU) == 500_000 - 300_000 + 60_000


@pytest.mark.parametrize("where", ["memory/docker/x", "memory"])
def test_every_group_of_version_1_limits(machine: Path, where: str) -> None:
    write(machine / "proc/self/cgroup", "5:cpu,cpuacct:/y\n4:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    group = machine / "cgroup" / where
    write(group / "memory.limit_in_bytes", "500000\n")
    write(group / "memory.usage_in_bytes", "300000\n")
    write(group / "memory.stat", "active_file 1\ntotal_active_file 20000\ntotal_inactive_file 40000\n")
    assert available_bytes(CPU) == 500_000 - 300_000 + 60_000


def test_a_group_without_a_limit_does_not(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "4:memory:/\n")
    write(machine / "cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(machine / "cgroup/memory/memory.usage_in_bytes", "300000\n")
    assert available_bytes(CPU) == 8000 * 1024


def test_a_gpu_has_what_is_free_and_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(device: int, total: int, active: int, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        return {"device": device, "total_size": total, "active_size": active, "segment_pool_id": pool}

    kept = [segment(0, 700, 400), segment(0, 5000, 100, (0, 1)), segment(1, 800, 0)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: kept)
    assert available_bytes(torch.device("cuda", 0)) == 1300
    assert available_bytes(torch.device("cuda", 0), enough=1001) == 1300
    monkeypatch.setattr(torch.cuda, "memory_snapshot", None)
    assert available_bytes(torch.device("cuda", 0), enough=1000) == 1000


def test_more_tokens_or_a_second_plan_take_more() -> None:
    base = peak_bytes(sd15(), replace(CALL, height=512, width=512, output_type="latent"))
    assert peak_bytes(sd15(), replace(CALL, height=512, width=512, output_type="latent", tokens=1024)) > 1.1 * base
    assert peak_bytes(sd15(), replace(CALL, height=512, width=512, output_type="latent", plans=2)) > base
