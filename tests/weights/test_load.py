"""Loading is strict: what is missing, left over, misshapen, no float or not finite is named; what is right is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastldm.config import unet_config
from fastldm.errors import WeightsError
from fastldm.model.unet import UNet
from fastldm.weights.header import DTYPES
from fastldm.weights.keymap import addresses, present_name
from fastldm.weights.load import fill, matched, skeleton
from tests.weights.memory_tensors import CPU, KINDS, Dictionary, loaded


@dataclass
class Tiny:
    build: Callable[[], nn.Module]
    tensors: dict[str, Tensor]

    def refused(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> WeightsError:
        with pytest.raises(WeightsError) as caught:
            loaded(self.build, tensors, dtype)
        return caught.value

    def refused_names(self, infos: dict[str, Any]) -> WeightsError:
        """What a file with these names and shapes raises before a tensor is read."""
        with pytest.raises(WeightsError) as caught:
            matched(self.skeleton, SimpleNamespace(where="memory", infos=infos))  # type: ignore[arg-type]
        return caught.value

    @cached_property
    def skeleton(self) -> nn.Module:
        return skeleton(self.build)

    @property
    def present(self) -> dict[str, Tensor]:
        """The tensors under the names of the model's own table."""
        return {str(present_name(name)): tensor for name, tensor in self.tensors.items()}


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(0)
    return Tiny(*KINDS[request.param]())


SMALLEST = {
    "block_out_channels": (4,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "use_linear_projection": True,
}


def smallest_unet() -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    ref = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=8, **SMALLEST)
    config = unet_config(dict(ref.config))
    return lambda: UNet(config), ref.state_dict()


@pytest.fixture(scope="module", params=[smallest_unet, KINDS["vae"], KINDS["text encoder"]])
def small(request: pytest.FixtureRequest) -> Tiny:
    """Models that load in so short a time that each of their tensors can have its turn."""
    torch.manual_seed(0)
    return Tiny(*request.param())


def some(tensors: dict[str, Tensor]) -> list[str]:
    """A dozen names, spread over the model."""
    names = sorted(tensors)
    return names[:: max(1, len(names) // 12)]


def test_every_row_holds_its_source_exactly(tiny: Tiny) -> None:
    model = loaded(tiny.build, tiny.tensors)
    parameters, covered = dict(model.named_parameters()), dict.fromkeys(dict(model.named_parameters()), 0)
    for hub, address in addresses(model).items():
        rows = parameters[address.parameter][address.start : address.stop]
        assert torch.equal(rows, tiny.present[hub].reshape(rows.shape)), hub
        covered[address.parameter] += address.stop - address.start
    assert covered == {name: len(p) for name, p in parameters.items()}, "every row is written once"


def test_a_loaded_model_is_for_inference_and_in_its_layout(tiny: Tiny) -> None:
    model = loaded(tiny.build, tiny.tensors, torch.bfloat16)
    assert not model.training
    for name, p in model.named_parameters():
        assert (p.dtype, p.device, p.requires_grad) == (torch.bfloat16, CPU, False), name
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
        assert p.is_contiguous(memory_format=layout), name


def test_f21_each_missing_tensor_is_named(tiny: Tiny) -> None:
    infos = Dictionary(tiny.present).infos
    for name in infos:
        error = tiny.refused_names({k: v for k, v in infos.items() if k != name})
        assert error.field == name
        assert f"1 of {len(infos)} tensors are missing: {name}" in str(error)


def test_f21_each_missing_tensor_of_another_unet_is_named() -> None:
    test_f21_each_missing_tensor_is_named(Tiny(*smallest_unet()))


def test_f21_many_missing_tensors_are_counted_and_ten_are_named(tiny: Tiny) -> None:
    gone = sorted(tiny.present)[3:18]
    error = tiny.refused({k: v for k, v in tiny.present.items() if k not in gone})
    assert f"{len(gone)} of {len(tiny.tensors)} tensors are missing" in str(error)
    assert [name in str(error) for name in gone] == [True] * 10 + [False] * 5
    assert "and 5 more" in str(error)


EXTRA = [
    "conv_in.weight.extra",
    "lora_up.weight",
    "conv_in.Weight",
    " conv_in.weight",
    "v_pred",
    "a\nb",
    "a\0b",
    "../../x",
    "/etc/passwd",
    "\u202eabc",
    "\x1b[31m",
    "é",
    "",
    "x" * 300,
    "x" * 5000,
]


@pytest.mark.parametrize("name", EXTRA, ids=lambda name: ascii(name)[:20])
def test_f17_f22_an_extra_tensor_is_named(small: Tiny, name: str) -> None:
    error = small.refused({**small.tensors, name: torch.zeros(2)})
    assert error.field == name
    assert "do not belong" in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 400
    assert ": ../" not in str(error)
    assert ": /" not in str(error)


def test_f22_extra_tensors_are_named(small: Tiny) -> None:
    """Fifty names that look like the model's own, one by one and together."""
    infos = Dictionary(small.present).infos
    extra = {f"{name.rpartition('.')[0]}.{i}.weight": infos[name] for i, name in enumerate(sorted(infos) * 2)}
    extra = dict(list(extra.items())[:50])
    assert len(extra) == 50
    for name, info in extra.items():
        error = small.refused_names({**infos, name: info})
        assert error.field == name
        assert f"1 of {len(infos) + 1} tensors do not belong to this model: {name}" in str(error)
    error = small.refused_names({**infos, **extra})
    assert "50 of " in str(error)
    assert "and 40 more" in str(error)


def test_the_same_tensor_twice_is_named(tiny: Tiny) -> None:
    infos = Dictionary(tiny.present).infos
    name = next(iter(infos))
    error = tiny.refused_names({**infos, f"text_model.{name}": infos[name]})
    assert f"{name}, text_model.{name} are the same tensor" in str(error)


def test_f23_each_wrong_shape_is_named_with_both_shapes(small: Tiny) -> None:
    infos = Dictionary(small.present).infos
    for name, info in infos.items():
        right = info.shape
        for shape in ((*right[:-1], right[-1] + 1), (1, *right), (right[0] + 1, *right[1:])):
            bad = SimpleNamespace(name=name, shape=shape, dtype=info.dtype)
            error = small.refused_names({name: bad, **{k: v for k, v in infos.items() if k != name}})
            assert error.field == name
            assert f"{name} has shape {shape}, the model needs" in str(error)


def test_f23_a_tensor_of_another_rank_or_half_the_rows_is_refused(tiny: Tiny) -> None:
    """Through the whole load; the number of elements fits in one of the cases."""
    for i, name in enumerate(some(tiny.tensors)):
        right = tiny.tensors[name]
        wrong = (right[1:], right.flatten()[None, None], torch.cat([right, right]))[i % 3]
        error = tiny.refused({**tiny.tensors, name: wrong})
        assert error.field == name
        assert str(tuple(wrong.shape)) in str(error)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_f24_what_is_no_float_is_refused(small: Tiny, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Of the dtypes that a file may have: four are floats, of which float64 is rounded with a warning."""
    for name in some(small.tensors)[:5]:
        caplog.clear()
        tensors = {**small.tensors, name: small.tensors[name].to(dtype)}
        if not dtype.is_floating_point:
            error = small.refused(tensors)
            assert error.field == name
            assert str(dtype) in str(error)
            continue
        model = loaded(small.build, tensors)
        address = addresses(model)[str(present_name(name))]
        rows = model.get_parameter(address.parameter)[address.start : address.stop]
        assert torch.equal(rows, tensors[name].float().reshape(rows.shape))
        assert ("1 tensors are float64" in caplog.text) == (dtype == torch.float64)


def test_f25_f26_one_value_that_is_not_finite_is_found_in_each_tensor(small: Tiny) -> None:
    for i, (name, right) in enumerate(small.tensors.items()):
        poisoned = right.clone()
        poisoned.view(-1)[(7 * i) % right.numel()] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        with pytest.raises(WeightsError, match="has 1 values that are NaN or infinite") as caught:
            fill(small.skeleton, Dictionary({**small.tensors, name: poisoned}), dtype=torch.float32, device=CPU)
        assert caught.value.field == name
        assert f"memory: {name} has" in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_f25_one_value_that_is_not_finite_is_found_whatever_it_is(tiny: Tiny, value: float) -> None:
    for i, name in enumerate(some(tiny.tensors)[int(value < 0) :: 2]):
        poisoned = tiny.tensors[name].clone()
        poisoned.view(-1)[(7 * i) % poisoned.numel()] = value
        error = tiny.refused({**tiny.tensors, name: poisoned})
        assert error.field == name
        assert "1 values that are NaN or infinite" in str(error)


def test_f25_infinities_that_cancel_are_found(tiny: Tiny) -> None:
    name = some(tiny.tensors)[2]
    poisoned = tiny.tensors[name].clone()
    poisoned.view(-1)[0], poisoned.view(-1)[-1] = torch.inf, -torch.inf
    assert tiny.refused({**tiny.tensors, name: poisoned}).field == name


def test_a_value_too_large_for_float16_is_found_and_fits_bfloat16(tiny: Tiny) -> None:
    for name in some(tiny.tensors)[::3]:
        large = {**tiny.tensors, name: torch.full_like(tiny.tensors[name], -1e5)}
        error = tiny.refused(large, torch.float16)
        assert error.field == name
        assert "too large for torch.float16" in str(error)
        loaded(tiny.build, large, torch.bfloat16)


def test_a_sum_that_overflows_is_no_reason_to_refuse(tiny: Tiny) -> None:
    """The quick check sums in float32; finite weights may still sum to infinity."""
    name = max(tiny.tensors, key=lambda k: tiny.tensors[k].numel())
    loaded(tiny.build, {**tiny.tensors, name: torch.full_like(tiny.tensors[name], 3e38)})


def test_f24_double_precision_is_rounded_with_a_warning(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    doubles = {name: tensor.double() for name, tensor in tiny.tensors.items()}
    model, same = loaded(tiny.build, doubles), loaded(tiny.build, tiny.tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert "float64" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources(tiny: Tiny, dtype: torch.dtype) -> None:
    half = {name: tensor.to(dtype) for name, tensor in tiny.present.items()}
    model = loaded(tiny.build, half)
    for hub, address in addresses(model).items():
        rows = model.get_parameter(address.parameter)[address.start : address.stop]
        assert torch.equal(rows, half[hub].float().reshape(rows.shape)), hub


def test_a_failed_load_leaves_the_default_device_alone(tiny: Tiny) -> None:
    tiny.refused({})
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
