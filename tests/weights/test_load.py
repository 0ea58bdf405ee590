"""Loading is strict: what is missing, left over, misshapen, no float or not finite is named; what is right is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastldm.errors import WeightsError
from fastldm.weights import load as load_module
from fastldm.weights.keymap import addresses, present_name
from tests.weights.memory_tensors import CPU, KINDS, Dictionary, loaded


@dataclass(frozen=True)
class Tiny:
    build: Callable[[], nn.Module]
    tensors: dict[str, Tensor]

    def refused(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> WeightsError:
        with pytest.raises(WeightsError) as caught:
            loaded(self.build, tensors, dtype)
        return caught.value

    @property
    def present(self) -> dict[str, Tensor]:
        """The tensors under the names of the model's own table."""
        return {str(present_name(name)): tensor for name, tensor in self.tensors.items()}


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(0)
    return Tiny(*KINDS[request.param]())


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


def test_each_missing_tensor_is_named(tiny: Tiny) -> None:
    """Every key of the model in turn; the check needs no weights, so it runs on the names alone."""
    model = torch.nn.Module.to(tiny.build(), "meta")
    table, infos = addresses(model), Dictionary(tiny.present).infos
    for name in tiny.present:
        rest = SimpleNamespace(where="memory", infos={k: v for k, v in infos.items() if k != name})
        with pytest.raises(WeightsError, match="missing") as caught:
            load_module._matched(table, model, rest)
        assert caught.value.field == name
        assert name in str(caught.value)


def test_many_missing_tensors_are_counted_and_ten_are_named(tiny: Tiny) -> None:
    gone = sorted(tiny.present)[3:18]
    error = tiny.refused({k: v for k, v in tiny.present.items() if k not in gone})
    assert f"{len(gone)} of {len(tiny.tensors)} tensors are missing" in str(error)
    assert [name in str(error) for name in gone] == [True] * 10 + [False] * 5
    assert "and 5 more" in str(error)


@pytest.mark.parametrize("name", ["conv_in.weight.extra", "lora_up.weight", "a\nb", "x" * 5000])
def test_an_extra_tensor_is_named(tiny: Tiny, name: str) -> None:
    error = tiny.refused({**tiny.tensors, name: torch.zeros(2)})
    assert error.field == name
    assert "do not belong" in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def test_a_wrong_shape_is_named_with_both_shapes(tiny: Tiny) -> None:
    for i, name in enumerate(some(tiny.tensors)):
        right = tiny.tensors[name]
        wrong = (right[1:], right.flatten()[None, None], torch.cat([right, right]))[i % 3]
        error = tiny.refused({**tiny.tensors, name: wrong})
        assert error.field == name
        assert str(tuple(wrong.shape)) in str(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_what_is_no_float_is_refused(tiny: Tiny, dtype: torch.dtype) -> None:
    for name in some(tiny.tensors)[:4]:
        error = tiny.refused({**tiny.tensors, name: tiny.tensors[name].to(dtype)})
        assert error.field == name
        assert str(dtype) in str(error)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found(tiny: Tiny, value: float) -> None:
    for i, name in enumerate(some(tiny.tensors)[int(value < 0) :: 2]):
        poisoned = tiny.tensors[name].clone()
        poisoned.view(-1)[(7 * i) % poisoned.numel()] = value
        error = tiny.refused({**tiny.tensors, name: poisoned})
        assert error.field == name
        assert "1 values that are NaN or infinite" in str(error)


def test_infinities_that_cancel_are_found(tiny: Tiny) -> None:
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


def test_double_precision_is_rounded_with_a_warning(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
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
