"""What a graph could replay, shown by a stand-in that runs each row and compares; queues; captured stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastldm import ops
from fastldm.model.unet import UNet
from fastldm.runtime.graph import Eager, Queue, Stage, captured
from fastldm.runtime.plan import ROWS, Guidance, Plan, Row, Shape
from fastldm.runtime.pool import Pool
from tests.runtime.recorded import NotReplayable, Recorded
from tests.runtime.test_plan import ONE_LEVEL, run
from tests.runtime.tiny import guidance, plan_for, table, unet, with_history

ELSEWHERE = [torch.zeros(()) for _ in range(9)]


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    return unet(**ONE_LEVEL)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


# ------------------------------------------------------------------------------------------------ rows that are sound


def test_one_capture_serves_every_table_and_gives_the_same_bits(model: UNet, recorded: Recorded) -> None:
    plan, plain = plan_for(model, batch=2, graphs=recorded), plan_for(model, batch=2)
    for t, weights in (
        (table(3), (-6.5, 7.5)),
        (with_history(table(9), 4), (-1.0, 2.0)),
        (table(5, "EulerDiscreteScheduler"), (0.0, 1.0)),
    ):
        for one in (plan, plain):
            run(one, model, t, weights)
        assert torch.equal(plan.state, plain.state)
    assert recorded.count == 1


def test_another_number_of_branches_is_another_capture_on_the_same_state(model: UNet, recorded: Recorded) -> None:
    plan = plan_for(model, graphs=recorded)
    for weights in ((1.0,), (-6.5, 7.5), (1.0,), (0.1, 0.2, 0.7), (-6.5, 7.5)):
        run(plan, model, table(2), weights)
    assert recorded.count == 3


def test_making_a_row_in_the_middle_of_a_run_leaves_the_state_alone(model: UNet, recorded: Recorded) -> None:
    plan = plan_for(model, graphs=recorded)
    run(plan, model, table(2))
    before, row = plan.state.clone(), plan.row.clone()
    plan.of(2)
    assert torch.equal(plan.state, before)
    assert torch.equal(plan.row, row)
    assert before.any()


def test_a_row_is_made_also_where_the_last_one_was_the_tables_last(model: UNet, recorded: Recorded) -> None:
    plan, plain = plan_for(model, graphs=recorded), plan_for(model)
    run(plan, model, table(ROWS))
    assert plan.row.item() == ROWS
    for one in (plan, plain):
        run(one, model, table(2), (-1.0, 2.0))
    assert torch.equal(plan.state, plain.state)


def test_a_plan_that_is_made_under_inference_mode_serves_other_calls(model: UNet) -> None:
    pool, states = Pool(1 << 30), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode(), pool.lease("plan", lambda: plan_for(model)) as plan:
            run(plan, model, table(2), (-1.0, 2.0))
            states.append(plan.state.clone())
    assert len(pool) == 1
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"]
)
def test_lack_of_memory_by_other_names(said: str, caplog: pytest.LogCaptureFixture) -> None:
    def capture(function: Any, buffers: Any) -> None:
        raise RuntimeError(said)

    full = Full()
    full.capture = capture  # type: ignore[method-assign]
    assert captured(full, lambda: None, dict, "a name") is None
    said = "an error of another kind"
    with pytest.raises(RuntimeError, match="another kind"):
        captured(full, lambda: None, dict, "a name")


# --------------------------------------------------------------------------------------------- rows that no graph takes


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[Row, Plan], object]) -> None:
    """Rows that also do `change`."""
    sound = Row.compute

    def compute(self: Row, plan: Plan) -> None:
        change(self, plan)
        sound(self, plan)

    monkeypatch.setattr(Row, "compute", compute)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row, plan: plan.state.sum().item(), "reads back"),
        (lambda row, plan: bool(plan.state.any()), "reads back"),
        (lambda row, plan: plan.state.nonzero(), "reads back"),
        (lambda row, plan: plan.state[plan.state > 0], "by a mask"),
        (lambda row, plan: setattr(plan, "noise", plan.noise.clone()), "moved since the capture: noise"),
        (lambda row, plan: plan.noise.mul_(1 + time.monotonic() % 1), "op 0 was"),
        (lambda row, plan: plan.noise.add_(ELSEWHERE.pop()), r"op \d was"),
    ],
    ids=["item", "bool", "nonzero", "mask", "moved", "a number of the host", "a tensor from elsewhere"],
)
def test_what_a_graph_could_not_replay(
    monkeypatch: pytest.MonkeyPatch, model: UNet, recorded: Recorded, change: Callable[[Row, Plan], object], said: str
) -> None:
    broken(monkeypatch, change)
    with pytest.raises(NotReplayable, match=said):
        run(plan_for(model, graphs=recorded), model, table(3))


def test_rows_of_different_ops(monkeypatch: pytest.MonkeyPatch, model: UNet, recorded: Recorded) -> None:
    rows = iter(range(10))
    broken(monkeypatch, lambda row, plan: plan.noise.add_(0) if next(rows) == 2 else None)
    with pytest.raises(NotReplayable, match=r"op 0 was|there were"):
        run(plan_for(model, graphs=recorded), model, table(4))


@pytest.fixture
def valueless() -> Iterator[Plan]:
    """A plan on a device whose values no host can read."""
    config = unet(**ONE_LEVEL).config
    with torch.device("meta"), torch.no_grad(), ops.using("reference"):
        yield Plan(UNet(config), Shape(1, 8, 6, 5), Recorded())


def test_a_row_copies_nothing_to_or_from_the_host(valueless: Plan) -> None:
    valueless.of(2)
    valueless.replay(2)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda row, plan: plan.state.cpu(), NotImplementedError, "Cannot copy out of meta"),
        (lambda row, plan: plan.state.tolist(), NotImplementedError, "Cannot copy out of meta"),
        (lambda row, plan: plan.state.numpy(), TypeError, "can't convert meta"),
        (lambda row, plan: plan.noise.copy_(torch.ones(1, device="cpu")), NotReplayable, "between cpu and meta"),
        (lambda row, plan: plan.noise.add_(torch.ones((), device="cpu")), NotReplayable, "between cpu and meta"),
    ],
    ids=["cpu", "tolist", "numpy", "copy", "a number"],
)
def test_copies_are_seen(
    monkeypatch: pytest.MonkeyPatch,
    valueless: Plan,
    change: Callable[[Row, Plan], object],
    error: type[Exception],
    said: str,
) -> None:
    broken(monkeypatch, change)
    with pytest.raises(error, match=said):
        valueless.of(2)


# -------------------------------------------------------------------------------------- rows without some branches


@pytest.mark.parametrize("on", [[True, False, True, False, False], [False] * 5, [True] * 5])
def test_rows_without_guidance_are_the_last_branch_alone(model: UNet, recorded: Recorded, on: list[bool]) -> None:
    """As if their weights were 0, …, 0, 1, with fewer products, and one capture for each number of branches."""
    t, x, states = table(5), torch.randn(2, 4, 8, 6), torch.randn(4, 5, 24)
    weights = guidance(5, -6.5, 7.5, rescale=0.3)
    mods = model.modulation(torch.from_numpy(t.timesteps).float())
    plan, plain = plan_for(model, batch=2, graphs=recorded), plan_for(model, batch=2)
    some = Guidance(weights.weights, weights.rescale, np.array(on))
    plan.start(x, states=states, alone=not all(on))
    assert list(plan.run(t, some, mods, lambda r: x)) == list(range(5))
    whole = Guidance(np.where(np.array(on)[:, None], weights.weights, [0.0, 1.0]), np.where(on, weights.rescale, 0.0))
    plain.start(x, states=states)
    assert list(plain.run(t, whole, mods, lambda r: x)) == list(range(5))
    torch.testing.assert_close(plan.state, plain.state, rtol=0, atol=1e-5)
    assert recorded.count == 1 + (not all(on))


# ------------------------------------------------------------------------------------------------------ without memory


class Full(Eager):
    captures = True

    def capture(self, function: Any, buffers: Any) -> None:
        function()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_memory_for_a_graph_rows_run_uncaptured(model: UNet, caplog: pytest.LogCaptureFixture) -> None:
    plan, plain = plan_for(model, graphs=Full()), plan_for(model)
    for one in (plan, plain, plan):
        run(one, model, table(3))
    assert torch.equal(plan.state, plain.state)
    assert len(caplog.records) == 1
    assert "Shape(batch=1" in caplog.text


# --------------------------------------------------------------------------------------------------------- stages


def test_a_stage_gives_results_of_its_own(recorded: Recorded) -> None:
    stage = Stage(recorded, lambda x, y: (x + y, x * y), (torch.zeros(3), torch.zeros(3)))
    first = stage(torch.ones(3), torch.full((3,), 2.0))
    second = stage(torch.full((3,), 5.0), torch.full((3,), 2.0))
    assert [t.tolist() for t in first] == [[3.0] * 3, [2.0] * 3], "kept by the caller, not overwritten"
    assert [t.tolist() for t in second] == [[7.0] * 3, [10.0] * 3]
    assert recorded.count == 1
    assert stage.nbytes == 4 * 3 * 4


def test_a_stage_that_reads_back(recorded: Recorded) -> None:
    with pytest.raises(NotReplayable, match="reads back"):
        Stage(recorded, lambda x: (x * x.sum().item(),), (torch.zeros(3),))


def test_captured_says_what_had_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    assert captured(Full(), lambda: None, dict, "a name") is None
    assert "a name" in caplog.text


# --------------------------------------------------------------------------------------------------------- queues


def test_turns_are_taken_in_the_order_of_coming() -> None:
    queue, order, threads = Queue(), [], []

    def take(number: int) -> None:
        with queue.turn():
            order.append(number)

    with queue.turn():
        for number in range(20):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(queue._waiting) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == list(range(20))


def test_one_at_a_time_and_errors_pass_the_turn_on() -> None:
    queue, inside, most = Queue(), [0], [0]

    def take(number: int) -> None:
        for _ in range(50):
            try:
                with queue.turn():
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
                    if number == 3:
                        raise ValueError
            except ValueError:
                pass

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1]
    assert not queue._waiting


def test_an_interrupted_wait_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C while another thread has its turn."""
    queue = Queue()

    class Interrupted:
        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> None:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    with queue.turn():
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Lock", Interrupted)
            with pytest.raises(KeyboardInterrupt), queue.turn():
                pass
        assert len(queue._waiting) == 1
    with queue.turn():
        pass
