"""The balancer's loop beside ranks played here: when it plans, what it says, how it dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from lightmoe.balancer import loop
from lightmoe.balancer.gain import max_over_mean, renumbered
from lightmoe.balancer.loop import Balancer
from lightmoe.balancer.migration import Costs
from lightmoe.balancer.planner import plan
from lightmoe.balancer.window import LoadWindow
from lightmoe.core import Arrivals, Orders, StepResult
from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement, initial_placement
from tests.moe.cases import placement_of

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_SPARES = 2, 8, 4, 1
INTERVAL = 5
SKEWED = np.tile([3, 3, 200, 3, 3, 400, 3, 3], (NUM_LAYERS, 1))
POOLS = [8, 8, 7, 5]


class Played:
    """Ranks that do at once what they are told, and count pairs as `--route none` would."""

    def __init__(self, balancer: Balancer, placement: Placement) -> None:
        self.balancer = balancer
        self.placement = placement
        self.step_seconds = 0.01
        self.all_orders: list[Orders] = []

    def step(self, load: np.ndarray = SKEWED, error: str | None = None) -> None:
        given = self.balancer.orders(self.placement, "waterfill")
        arrived: dict[int, list[int]] = {}
        if given is not None:
            orders, reached = given
            self.all_orders.append(orders)
            if orders.changes:
                self.placement = self.placement.changed(orders.changes, orders.epoch)
            assert orders.epoch == self.placement.epoch == reached.epoch
            assert np.array_equal(reached.slot_table, self.placement.slot_table)
            for piece in orders.pieces:
                if piece.is_last:
                    arrived.setdefault(piece.target_rank, []).append(piece.transfer)
        results = []
        for rank in range(NUM_RANKS):
            is_home = self.placement.homes == rank
            results.append(
                StepResult(
                    rank=rank,
                    step=len(self.all_orders),
                    tokens=(),
                    expert_tokens=load // NUM_RANKS,
                    layer_pairs=(load * is_home).sum(axis=1),
                    seconds=self.step_seconds,
                    arrivals=Arrivals(tuple(arrived.get(rank, ())), 0.0, error),
                )
            )
        self.balancer.observe(load, results)

    def steps_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.step()
            time.sleep(0.002)
        raise AssertionError("2000 steps and nothing")


def real_plan(load: np.ndarray, now: Placement) -> Placement:
    usable = [count - 1 for count in POOLS]
    return plan(load, usable, num_spares=NUM_SPARES, previous=now)


@pytest.fixture
def new_played() -> Iterator[Callable[..., Played]]:
    balancers = []

    def make(plan_next: loop.Plan = real_plan, expert_bytes: int = 100) -> Played:
        balancer = Balancer(
            plan_next,
            LoadWindow(NUM_LAYERS, NUM_EXPERTS),
            POOLS,
            Costs(expert_bytes=expert_bytes, bytes_per_step=60),
            INTERVAL,
        )
        balancers.append(balancer)
        placement = initial_placement(
            NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, num_spares=NUM_SPARES, replicas_per_layer=2
        )
        return Played(balancer, placement)

    yield make
    for balancer in balancers:
        balancer.close()


def test_skew_leads_to_a_plan_that_comes_into_force_and_says_what_it_brought(
    new_played: Callable[..., Played], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightmoe.balancer")
    played = new_played()
    before = max_over_mean(SKEWED, played.placement, "waterfill", int(SKEWED[0].sum()))

    played.steps_until(lambda: "realised" in caplog.text)

    after = max_over_mean(SKEWED, played.placement, "waterfill", int(SKEWED[0].sum()))
    assert after < 0.9 * before
    report = played.balancer.report()
    assert report.error is None
    assert report.num_migrations == 1
    assert report.num_moved_experts > 0
    assert report.moved_bytes == 100 * report.num_moved_experts
    begins, realised = (record.getMessage() for record in caplog.records)
    assert begins.startswith("migration 1 begins at epoch 0: ")
    assert f"predicted max/mean {before:.2f} -> " in begins
    assert realised.startswith("migration 1 realised max/mean ")
    texts = [event.text for event in report.events]
    assert begins in texts
    assert any(text.startswith("layer 0: expert ") for text in texts)


def test_epochs_rise_by_one_and_a_placement_that_is_good_stays(
    new_played: Callable[..., Played],
) -> None:
    played = new_played()
    played.steps_until(lambda: played.balancer.report().num_migrations == 1)
    settled = played.placement

    for _ in range(6 * INTERVAL):
        played.step()
        time.sleep(0.002)

    assert played.placement is settled
    epochs = [orders.epoch for orders in played.all_orders if orders.changes]
    assert epochs == list(range(1, len(epochs) + 1))


def test_bytes_that_cost_more_than_they_save_are_not_moved(
    new_played: Callable[..., Played],
) -> None:
    planned = threading.Event()

    def counting(load: np.ndarray, now: Placement) -> Placement:
        planned.set()
        return real_plan(load, now)

    played = new_played(counting, expert_bytes=1 << 40)

    for _ in range(4 * INTERVAL):
        played.step()
        time.sleep(0.002)

    assert planned.wait(5)
    assert not played.all_orders
    assert played.placement.epoch == 0


def test_a_plan_for_a_placement_that_is_past_is_not_begun(
    new_played: Callable[..., Played],
) -> None:
    asked: list[int] = []
    may_answer = threading.Event()

    def slow(load: np.ndarray, now: Placement) -> Placement:
        asked.append(now.epoch)
        assert may_answer.wait(10)
        return real_plan(load, now)

    played = new_played(slow)
    played.steps_until(lambda: bool(asked))
    played.placement = played.placement.changed([], 1)  # by somebody else
    may_answer.set()
    played.steps_until(lambda: bool(played.all_orders))

    # The first answer was for epoch 0: what began is the answer to a later question.
    assert asked[0] == 0
    assert asked[1:] == [1] * (len(asked) - 1) != []


def test_few_tokens_are_no_ground_for_a_plan(new_played: Callable[..., Played]) -> None:
    def never(load: np.ndarray, now: Placement) -> Placement:
        raise AssertionError("planned")

    played = new_played(never)

    for _ in range(4 * INTERVAL):
        played.step(np.zeros_like(SKEWED))
        time.sleep(0.001)

    assert played.balancer.report().error is None


@pytest.mark.parametrize("dies_at", range(0, 14, 2))
def test_a_balancer_that_dies_anywhere_leaves_a_placement_and_says_so(
    new_played: Callable[..., Played],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dies_at: int,
) -> None:
    played = new_played()
    real, num_calls = loop.Migration.orders, 0

    def mortal(migration: loop.Migration) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls > dies_at:
            raise MemoryError("killed")
        return real(migration)

    monkeypatch.setattr(loop.Migration, "orders", mortal)
    played.steps_until(lambda: played.balancer.report().error is not None)
    reached = played.placement
    for _ in range(3 * INTERVAL):
        played.step()

    assert played.placement is reached
    # Placement's own checks make it servable; its epoch is the number of changes before.
    assert reached.epoch == sum(bool(orders.changes) for orders in played.all_orders)
    assert played.balancer.report().error == "MemoryError: killed"
    assert f"the balancer has died (MemoryError: killed); placement {reached.epoch}" in caplog.text


def test_a_planner_that_raises_is_a_balancer_that_has_died(
    new_played: Callable[..., Played], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(load: np.ndarray, now: Placement) -> Placement:
        raise PlacementError("no slots")

    played = new_played(broken)

    played.steps_until(lambda: played.balancer.report().error is not None)

    assert "the balancer has died (PlacementError: no slots); placement 0 stays" in caplog.text
    assert not played.all_orders


def test_an_expert_that_does_not_arrive_ends_the_balancer(
    new_played: Callable[..., Played], caplog: pytest.LogCaptureFixture
) -> None:
    played = new_played()

    played.step(error="rank 2: the file is gone")

    error = played.balancer.report().error
    assert error == "PlacementError: an expert did not arrive: rank 2: the file is gone"
    assert "has died" in caplog.text


def test_the_watchdog_barks_when_the_planner_hangs(
    new_played: Callable[..., Played],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loop, "WATCHDOG_SECONDS", 0.05)
    monkeypatch.setattr(loop, "HEARTBEAT_SECONDS", 0.01)
    may_end = threading.Event()

    def hangs(load: np.ndarray, now: Placement) -> Placement:
        may_end.wait(10)
        return now

    played = new_played(hangs)
    assert played.balancer.report().heartbeat_age_seconds < 0.05

    played.steps_until(lambda: played.balancer.report().error is not None)
    may_end.set()

    assert "its planner has been silent for" in caplog.text


def test_a_closed_balancer_has_not_died(new_played: Callable[..., Played]) -> None:
    played = new_played()
    played.balancer.close()
    played.balancer.close()

    assert played.balancer.report().error is None


def test_renumbered_slots_are_dense_and_hold_the_same() -> None:
    slots = placement_of([[[0], [1, 0], [0]]], 2)
    table = slots.slot_table.copy()
    table[table >= 0] *= 3
    sparse = Placement(table + (table >= 0), slots.homes, slots.rank_kinds, 7)

    dense = renumbered(sparse)

    assert np.array_equal(dense.slot_table, slots.slot_table)
    assert dense.epoch == 7


def test_small_steps_are_uneven_by_chance_too() -> None:
    placement = initial_placement(3, 8, 4)
    level = np.ones((3, 8))
    few, many = (max_over_mean(level, placement, "none", pairs) for pairs in (8, 8000))

    assert max_over_mean(level, placement, "none") == pytest.approx(1.0)
    assert 1.0 < many < 1.1 < 1.3 < few
    assert few == max_over_mean(5 * level, placement, "none", 8)
    assert max_over_mean(0 * level, placement, "none", 8) == few


def test_max_over_mean_is_that_of_the_route() -> None:
    placement = placement_of([[[0, 1], [1]]], 2)
    load = np.array([[6, 2]])

    assert max_over_mean(load, placement, "none") == pytest.approx(6 / 4)
    assert max_over_mean(load, placement, "even") == pytest.approx(5 / 4)
    assert max_over_mean(load, placement, "waterfill") == pytest.approx(1.0)
