"""diffusers and fastldm read the same file in the original layout to the same weights and images.

Our own exporter writes the files. It is not its own judge: what diffusers' converters read from them must be, bit for
bit, what the pipeline held that they were made of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import fastldm
from tests import oracle
from tests.single.models import CAT, KINDS, Sample, as_ckpt, assert_same, converted, image, painted, theirs, weights

LATENTS = 1e-4  # as in tests/pipeline; for pictures to start from, as in tests/tasks
TASK_LATENTS = 2e-4
PICTURE = PIL.Image.effect_noise((32, 32), 60).convert("RGB")
MASK = PIL.Image.new("L", (32, 32))
MASK.paste(255, (8, 8, 24, 24))
PICTURES: dict[str, dict[str, Any]] = {
    "inpainting": {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
    "sd2 inpainting": {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
    "instruct": {"image": PICTURE},
}


def reads(sample: Sample, file: Path, kind: str) -> tuple[Any, fastldm.Pipeline]:
    return theirs(file, sample.folder, KINDS[kind].kind), fastldm.Pipeline(file, config=sample.folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_weights_of_the_pipeline(sample: Callable[..., Sample], kind: str) -> None:
    """The exporter, judged by diffusers alone."""
    made = sample(kind)
    assert_same(weights(theirs(made.file, made.folder, KINDS[kind].kind)), weights(made.ref))


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, ".safetensors") for kind in KINDS), ("sd1", ".ckpt"), ("sd2", ".ckpt")]
)
def test_weights_and_images_equal_diffusers(
    sample: Callable[..., Sample], tmp_path: Path, kind: str, suffix: str
) -> None:
    made = sample(kind)
    file = made.file if suffix == ".safetensors" else as_ckpt(made.file, tmp_path / "model.ckpt")
    ref, fast = reads(made, file, kind)
    assert_same(weights(fast), weights(ref))
    call = {"output_type": "latent", **PICTURES.get(kind, {})}
    error = oracle.relative_error(image(fast, **call), image(ref, **call))
    assert error <= (TASK_LATENTS if kind in PICTURES else LATENTS)


@pytest.mark.parametrize(("kind", "dtype"), [("sd1", "fp16"), ("sd2", "fp16"), ("sd2", "bf16")])
def test_files_in_half_precision(sample: Callable[..., Sample], tmp_path: Path, kind: str, dtype: str) -> None:
    made = sample(kind)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    file = converted(made.folder, tmp_path / "half.safetensors", dtype=dtype)
    ref, fast = reads(made, file, kind)
    assert_same(weights(fast), weights(ref))
    assert_same(weights(fast), {name: weight.to(half).float() for name, weight in weights(made.ref).items()})
    assert oracle.relative_error(image(fast), image(ref)) <= LATENTS


@pytest.mark.parametrize("kind", ["sd2", "deep", "inpainting"])
def test_the_file_paints_what_the_folder_paints(sample: Callable[..., Sample], kind: str) -> None:
    made = sample(kind)
    call = PICTURES.get(kind, {})
    assert torch.equal(image(made.fast(), **call), image(fastldm.Pipeline(made.folder), **call))


def test_every_kind_of_file_reads_the_prompt(sample: Callable[..., Sample]) -> None:
    """Equal pictures would say nothing if the text did not reach them."""
    for kind in ("sd1", "sd2", "deep"):
        fast = sample(kind).fast()
        latents = [
            fast(prompt, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1)).images
            for prompt in (CAT, "a dog")
        ]
        assert oracle.relative_error(latents[0], latents[1]) > 0.005, kind


def test_from_single_file_is_the_same(sample: Callable[..., Sample]) -> None:
    made = sample()
    pipe = fastldm.Pipeline.from_single_file(str(made.file), config=str(made.folder), torch_dtype=torch.float32)
    assert torch.equal(image(pipe), painted(made))


def test_from_single_file_refuses_a_folder(sample: Callable[..., Sample]) -> None:
    with pytest.raises(fastldm.Error, match="is no single file") as caught:
        fastldm.Pipeline.from_single_file(sample().folder)
    assert caught.value.field == "model"


def test_the_files_name_does_not_matter(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """A pickle named as safetensors, and the other way round, are what they are."""
    made = sample()
    as_ckpt(made.file, tmp_path / "pickle.safetensors")
    (tmp_path / "plain.ckpt").write_bytes(made.file.read_bytes())
    for name in ("pickle.safetensors", "plain.ckpt"):
        assert torch.equal(image(fastldm.Pipeline(tmp_path / name, config=made.folder)), painted(made))


def test_in_half_precision_it_is_what_diffusers_casts_to(sample: Callable[..., Sample]) -> None:
    made = sample()
    fast = made.fast(torch_dtype=torch.bfloat16)
    assert_same(weights(fast), {name: weight.bfloat16() for name, weight in weights(made.ref).items()})
    assert torch.isfinite(image(fast)).all()
