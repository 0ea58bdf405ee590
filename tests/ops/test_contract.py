"""The contract itself: one signature for every implementation, and the choice among them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch

from fastldm import ops
from fastldm.ops import reference

WIDER = {ops.Activation | None: str | None, ops.RowTables: Any}  # what kernels, which know neither, take instead


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("name", ops.IMPLEMENTATIONS)
def test_an_implementation_has_the_contracts_signature(name: str, op: str) -> None:
    theirs, contract = (getattr(m, op) for m in (ops.implementation(name), ops))
    assert parameters(theirs) == parameters(contract)
    hints = get_type_hints(theirs)
    for key, hint in get_type_hints(contract).items():
        assert hints[key] in (hint, WIDER.get(hint, hint)), key


def parameters(op: Callable[..., Any]) -> list[tuple[object, ...]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(op).parameters.values()]


def test_every_op_is_listed_and_documented() -> None:
    for op in ops.OPS:
        assert inspect.getdoc(getattr(ops, op)), op
    public = {name for name, f in vars(reference).items() if inspect.isfunction(f) and name in vars(ops)}
    assert public - {"compute_dtype"} == set(ops.OPS)


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A second implementation, "loud": the reference, that notes which ops it was asked for."""
    called: list[str] = []

    def noting(op: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            called.append(op)
            return getattr(reference, op)(*args, **options)

        return run

    module = SimpleNamespace(**{op: noting(op) for op in ops.OPS})
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", ("reference", "loud"))
    monkeypatch.setattr(ops, "implementation", {"reference": reference, "loud": module}.__getitem__)
    return called


def call_some() -> None:
    ops.linear(torch.ones(1, 1), torch.ones(1, 1))
    ops.geglu(torch.ones(1, 1), torch.ones(2, 1), torch.ones(2))
    ops.layer_norm(torch.ones(1, 2), torch.ones(2), torch.ones(2), 1e-5)


def test_using_selects_for_all_ops_and_restores(loud: list[str]) -> None:
    with ops.using("loud"):
        call_some()
    assert loud == ["linear", "geglu", "layer_norm"]
    call_some()
    assert len(loud) == 3


def test_one_op_may_be_overridden(loud: list[str]) -> None:
    with ops.using("loud", geglu="reference"):
        call_some()
    assert loud == ["linear", "layer_norm"]
    loud.clear()
    with ops.using("reference", linear="loud"):
        call_some()
    assert loud == ["linear"]


def test_selections_nest_and_the_inner_one_is_whole(loud: list[str]) -> None:
    with ops.using("loud", linear="reference"):
        with ops.using("reference", geglu="loud") as inner:
            call_some()
            assert (inner.of("geglu"), inner.of("linear")) == ("loud", "reference")
        assert loud == ["geglu"]
        call_some()
    assert loud == ["geglu", "geglu", "layer_norm"]


def test_an_error_restores_the_selection(loud: list[str]) -> None:
    with pytest.raises(RuntimeError, match="boom"), ops.using("loud"):
        raise RuntimeError("boom")
    call_some()
    assert not loud


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"default": "fast"}, "fast"),
        ({"default": ""}, "default"),
        ({"default": "reference", "attention": "fast"}, "attention"),
        ({"default": "reference", "atention": "reference"}, "atention"),
        ({"default": "reference", "using": "reference"}, "using"),
    ],
)
def test_unknown_names_are_refused_by_name(arguments: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named), ops.using(**arguments):
        pass


def test_threads_have_their_own_selection(loud: list[str]) -> None:
    """A barrier on each side makes both selections hold at the same time."""
    barrier, seen = threading.Barrier(2, timeout=10), {}

    def work(name: str) -> None:
        with ops.using(name):
            barrier.wait()
            seen[name] = ops._selection.get().default
            call_some()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("loud", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"loud": "loud", "reference": "reference"}
    assert loud == ["linear", "geglu", "layer_norm"]


def test_a_new_thread_starts_from_the_default(loud: list[str]) -> None:
    with ops.using("loud"):
        thread = threading.Thread(target=call_some)
        thread.start()
        thread.join()
    assert not loud


@pytest.mark.parametrize(
    ("default", "want", "expected"),
    [("reference", None, False), ("loud", None, True), ("reference", True, True), ("loud", False, False)],
)
def test_statistics_are_wanted_where_they_are_free(
    loud: list[str], default: str, want: bool | None, expected: bool
) -> None:
    with ops.using(default, want_stats=want):
        _, stats = ops.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), want_stats=True)
    assert (stats is not None) is expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_compute_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert ops.compute_dtype(dtype) == expected
