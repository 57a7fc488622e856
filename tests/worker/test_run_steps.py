"""A rank's loop: plans come on a thread, and one that may is enqueued behind the step that runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from lightmoe.core import Batch, StepResult
from lightmoe.errors import RankError
from lightmoe.worker.inbox import Inbox
from lightmoe.worker.runner import RunningStep
from lightmoe.worker.worker import run_steps

WAIT_SECONDS = 20.0


class Plans:
    """A driver's end: plans that `receive` gives out, None for the end, errors to raise."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Batch | None | Exception] = queue.Queue()

    def send(self, *plans: Batch | None | Exception) -> None:
        for plan in plans:
            self._queue.put(plan)

    def receive(self) -> Batch | None:
        plan = self._queue.get(timeout=WAIT_SECONDS)
        if isinstance(plan, Exception):
            raise plan
        return plan


class FakeWorker:
    """Steps that end when they are let go; those in `follows_in` may begin behind another."""

    def __init__(self, follows_in: set[int]) -> None:
        self._follows_in = follows_in
        self.events: list[tuple[str, int]] = []
        self.begun = {number: threading.Event() for number in range(10)}
        self.may_end = {number: threading.Event() for number in range(10)}

    def follows(self, plan: Batch) -> bool:
        return plan.step in self._follows_in

    def begin(self, plan: Batch) -> RunningStep:
        self.events.append(("begin", plan.step))
        self.begun[plan.step].set()
        return RunningStep(self.may_end[plan.step].is_set, lambda: self._end(plan.step))

    def _end(self, step: int) -> StepResult:
        assert self.may_end[step].wait(WAIT_SECONDS)
        self.events.append(("end", step))
        return step  # type: ignore[return-value]

    def finish(self) -> None:
        self.events.append(("finish", -1))


@pytest.fixture
def run() -> Callable[[FakeWorker, Plans], tuple[threading.Thread, list[object]]]:
    def run(worker: FakeWorker, plans: Plans) -> tuple[threading.Thread, list[object]]:
        sent: list[object] = []
        thread = threading.Thread(
            target=run_steps, args=(worker, plans.receive, sent.append), daemon=True
        )
        thread.start()
        return thread, sent

    return run


Run = Callable[[FakeWorker, Plans], tuple[threading.Thread, list[object]]]


def test_a_step_begins_behind_the_one_that_runs(run: Run) -> None:
    worker, plans = FakeWorker(follows_in={1, 2}), Plans()
    thread, sent = run(worker, plans)
    plans.send(Batch(0, (1,)))
    assert worker.begun[0].wait(WAIT_SECONDS)
    plans.send(Batch(1, (1,)))
    assert worker.begun[1].wait(WAIT_SECONDS), "it does not wait for step 0"
    assert not sent
    worker.may_end[0].set()
    plans.send(Batch(2, (1,)))
    assert worker.begun[2].wait(WAIT_SECONDS)
    assert sent == [0]
    for number in (1, 2):
        worker.may_end[number].set()
    plans.send(None)
    thread.join(WAIT_SECONDS)

    assert sent == [0, 1, 2]
    assert worker.events[-1] == ("finish", -1)


def test_one_that_may_not_waits_for_the_step_before(run: Run) -> None:
    worker, plans = FakeWorker(follows_in=set()), Plans()
    thread, sent = run(worker, plans)
    plans.send(Batch(0, (1,)), Batch(1, (1,)), None)
    for number in (0, 1):
        worker.may_end[number].set()
    thread.join(WAIT_SECONDS)

    order = ["begin", "end", "begin", "end", "finish"]
    assert [kind for kind, _ in worker.events] == order
    assert sent == [0, 1]


def test_a_result_is_sent_though_no_other_plan_comes(run: Run) -> None:
    worker, plans = FakeWorker(follows_in={1}), Plans()
    thread, sent = run(worker, plans)
    plans.send(Batch(0, (1,)))
    assert worker.begun[0].wait(WAIT_SECONDS)
    worker.may_end[0].set()
    plans.send(None)
    thread.join(WAIT_SECONDS)

    assert sent == [0]


def test_what_reading_raises_is_raised_behind_the_plans_before_it() -> None:
    plans = Plans()
    plans.send(Batch(0, (1,)), RankError("a frame too large"))
    inbox = Inbox(plans.receive)

    assert inbox.first == Batch(0, (1,))
    assert inbox.take() == Batch(0, (1,))
    with pytest.raises(RankError, match="too large"):
        _ = inbox.first
