"""`pipe.explain()`: a table of who computes what."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastldm.errors import ArgumentError
from tests.pipeline.pairs import Pair


def test_on_this_cpu_pytorch_computes_everything(pair: Callable[..., Pair], capsys: pytest.CaptureFixture[str]) -> None:
    pair().fast.explain()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["part", "op", "calls", "for", "by", "because"]
    assert {line.split()[0] for line in lines} == {"text", "steps", "row", "decode"}
    assert all(line.endswith("reference  kernels run on CUDA devices, and this is cpu") for line in lines)


def test_for_a_gpu_that_is_not_here(pair: Callable[..., Pair], capsys: pytest.CaptureFixture[str]) -> None:
    """At the size and number of images that are asked for, in both branches of guidance."""
    pair().fast.explain(device="cuda", height=48, width=32, num_images_per_prompt=3)
    lines = capsys.readouterr().out.splitlines()
    assert any("6×4×24×16" in line and " conv2d " in line for line in lines)
    assert any(" group_norm " in line and " fused " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"height": 63}, "height"),
        ({"width": "64"}, "width"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_arguments(pair: Callable[..., Pair], arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        pair().fast.explain(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
