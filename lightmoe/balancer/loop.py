"""The balancer of a running server: load in, orders for the ranks out, at most one move at a time.

Every `interval_steps` the window's load goes to a planner on a thread of its own. A plan that is
worth its bytes becomes a migration, whose orders ride on the steps. If anything here fails, the
balancer has died and says so; the ranks serve on with the placement that is in force.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightmoe.balancer.gain import Gain, predict, renumbered
from lightmoe.balancer.migration import Costs, Migration
from lightmoe.core import BalanceEvent, BalanceReport, Orders, SlotChange, StepResult
from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement

logger = logging.getLogger("lightmoe.balancer")

Plan = Callable[[np.ndarray, Placement], Placement]
"""The goal for a load [L, E], from the placement in force."""

HEARTBEAT_SECONDS = 1.0
WATCHDOG_SECONDS = 60.0
"""A planner that is silent for so long has died."""

MAX_EVENTS = 64
_FEWEST_TOKENS = 4
"""An expert's mean load in the window, below which a plan would follow noise."""
_FIRST_BYTES_PER_SECOND = 1e9
"""Assumed until pieces have been timed."""


class Window(Protocol):
    """The load of the last steps."""

    def add(self, expert_tokens: np.ndarray) -> None:
        """One step's load [L, E]."""
        ...

    def load(self) -> np.ndarray:
        """The window's load [L, E]."""
        ...


@dataclass(slots=True)
class _Task:
    """What the planner's thread is asked."""

    load: np.ndarray
    placement: Placement
    route: str
    pairs_per_step: int
    step_seconds: float
    bytes_per_second: float
    next_transfer: int


@dataclass(slots=True)
class _Proposal:
    """What it answers: a migration that is worth it, from the placement of that epoch."""

    epoch: int
    migration: Migration
    gain: Gain


@dataclass(slots=True)
class _Measured:
    """Steps since it was made: pairs of the fullest rank and of the mean one, all layers.

    A rank's pairs count over its speed [W].
    """

    rank_speeds: np.ndarray
    most: float = 0.0
    mean: float = 0.0
    seconds: float = 0.0
    num_steps: int = 0

    def add(self, results: Sequence[StepResult]) -> None:
        """One step."""
        pairs = np.stack([result.layer_pairs for result in results])  # [W, L]
        self.most += float((pairs / self.rank_speeds[:, None]).max(axis=0).sum())
        self.mean += float(pairs.mean(axis=0).sum())
        self.seconds += max(result.seconds for result in results)
        self.num_steps += 1

    @property
    def max_over_mean(self) -> float:
        """Of the steps in it."""
        return self.most / self.mean if self.mean else 1.0


class Balancer:
    """A StepBalancer. `num_slots` [W] are the ranks' pools, free slots included.

    `rank_speeds` [W] are relative, all alike where none are given.
    """

    def __init__(
        self,
        plan: Plan,
        window: Window,
        num_slots: Sequence[int],
        costs: Costs,
        interval_steps: int,
        rank_speeds: Sequence[float] | None = None,
    ) -> None:
        self._plan = plan
        self._window = window
        self._num_slots = list(num_slots)
        self._costs = costs
        self._interval_steps = interval_steps
        self._num_steps = 0
        self._migration: Migration | None = None
        self._gain: Gain | None = None
        self._began: tuple[int, int] = (0, 0)  # epoch and step of the migration's begin
        self._waits_for_result = False
        self._realised_before = 1.0
        speeds = [1.0] * len(num_slots) if rank_speeds is None else rank_speeds
        self._rank_speeds = np.asarray(speeds, dtype=np.float64)
        self._measured = self._new_measured()
        self._next_transfer = 0
        self._num_migrations = 0
        self._num_moved = 0
        self._waited_seconds = 0.0
        self._timed_bytes = 0
        self._error: str | None = None
        self._epoch = 0
        self._events: deque[BalanceEvent] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._task: _Task | None = None
        self._proposal: _Proposal | None = None
        self._is_closed = False
        self._beat = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lightmoe-balancer", daemon=True)
        self._thread.start()

    # The engine's thread.

    def orders(self, placement: Placement, route: str) -> tuple[Orders, Placement] | None:
        """What the ranks do beside the next step, and the placement then; None for nothing."""
        self._watch()
        if self._error is not None:
            return None
        try:
            return self._orders(placement, route)
        except Exception as error:
            self._die(error)
            return None

    def observe(self, expert_tokens: np.ndarray, results: Sequence[StepResult]) -> None:
        """Count a step, and hear what has arrived."""
        if self._error is not None:
            return
        try:
            self._observe(expert_tokens, results)
        except Exception as error:
            self._die(error)

    def _orders(self, placement: Placement, route: str) -> tuple[Orders, Placement] | None:
        self._epoch = placement.epoch
        if self._migration is None:
            self._look_at_the_clock(placement, route)
            self._begin(placement, route)
        if self._migration is None:
            return None
        changes, pieces = self._migration.orders()
        if changes:
            placement = placement.changed(changes, placement.epoch + 1)
            for change in changes:
                self._say(placement.epoch, _change_text(change))
        if self._migration.is_done:
            self._end(placement.epoch)
        if not changes and not pieces:
            return None
        return Orders(placement.epoch, changes, pieces), placement

    def _observe(self, expert_tokens: np.ndarray, results: Sequence[StepResult]) -> None:
        self._num_steps += 1
        self._window.add(expert_tokens)
        self._measured.add(results)
        arrivals = [result.arrivals for result in results if result.arrivals is not None]
        for arrival in arrivals:
            if arrival.error is not None:
                raise PlacementError(f"an expert did not arrive: {arrival.error}")
        self._waited_seconds += max((arrival.waited_seconds for arrival in arrivals), default=0.0)
        if self._migration is not None:
            here = [number for arrival in arrivals for number in arrival.transfers]
            self._migration.arrived(here)
            self._num_moved += len(here)
            self._timed_bytes += len(here) * self._costs.expert_bytes

    def _look_at_the_clock(self, placement: Placement, route: str) -> None:
        """Every interval: say what the last migration brought, and ask for a plan."""
        if self._measured.num_steps < self._interval_steps:
            return
        measured, self._measured = self._measured, self._new_measured()
        if self._waits_for_result:
            self._waits_for_result = False
            assert self._gain is not None
            text = (
                f"migration {self._num_migrations} realised max/mean {self._realised_before:.2f} ->"
                f" {measured.max_over_mean:.2f} (predicted {self._gain.before:.2f} ->"
                f" {self._gain.after:.2f})"
            )
            logger.info(text)
            self._say(placement.epoch, text)
        self._realised_before = measured.max_over_mean
        load = self._window.load()
        if load.sum() < _FEWEST_TOKENS * load.size:
            return
        speed = self._timed_bytes / self._waited_seconds if self._waited_seconds else np.inf
        task = _Task(
            load,
            placement,
            route,
            max(1, round(measured.mean * placement.num_ranks / len(load) / measured.num_steps)),
            measured.seconds / measured.num_steps,
            min(speed, _FIRST_BYTES_PER_SECOND),
            self._next_transfer,
        )
        with self._changed:
            self._task = task
            self._changed.notify()

    def _begin(self, placement: Placement, route: str) -> None:
        with self._changed:
            proposal, self._proposal = self._proposal, None
        if proposal is None or proposal.epoch != placement.epoch:
            return
        migration = self._migration = proposal.migration
        self._gain = proposal.gain
        self._began = placement.epoch, self._num_steps
        num_bytes = migration.num_copies * self._costs.expert_bytes
        text = (
            f"migration {self._num_migrations + 1} begins at epoch {placement.epoch}:"
            f" {migration.num_copies} experts, {num_bytes / 2**20:.1f} MiB; predicted max/mean"
            f" {proposal.gain.before:.2f} -> {proposal.gain.after:.2f}, route {route}; saves"
            f" {proposal.gain.saved_seconds:.2f} s for {proposal.gain.cost_seconds:.2f} s"
        )
        logger.info(text)
        self._say(placement.epoch, text)

    def _end(self, epoch: int) -> None:
        assert self._migration is not None
        self._next_transfer = self._migration.num_transfers
        self._migration = None
        self._num_migrations += 1
        self._measured = self._new_measured()
        self._waits_for_result = True
        first, begun = self._began
        self._say(
            epoch,
            f"migration {self._num_migrations} is done: epochs {first + 1} to {epoch},"
            f" {self._num_steps - begun} steps",
        )

    def _new_measured(self) -> _Measured:
        return _Measured(self._rank_speeds)

    # The planner's thread.

    def _run(self) -> None:
        try:
            while (task := self._next_task()) is not None or not self._is_closed:
                if task is not None:
                    self._propose(task)
        except Exception as error:
            self._die(error)

    def _next_task(self) -> _Task | None:
        with self._changed:
            if self._task is None and not self._is_closed:
                self._changed.wait(HEARTBEAT_SECONDS)
            self._beat = time.monotonic()
            task, self._task = self._task, None
            return None if self._is_closed else task

    def _propose(self, task: _Task) -> None:
        now = renumbered(task.placement)
        goal = self._plan(task.load, now)
        gain = predict(
            task.load,
            now,
            goal,
            task.route,
            pairs_per_step=task.pairs_per_step,
            step_seconds=task.step_seconds,
            horizon_steps=self._interval_steps,
            expert_bytes=self._costs.expert_bytes,
            bytes_per_second=task.bytes_per_second,
            rank_speeds=self._rank_speeds,
        )
        if not gain.is_worth_it:
            return
        migration = Migration(
            task.placement, goal, self._num_slots, self._costs, task.load, task.next_transfer
        )
        with self._changed:
            self._proposal = _Proposal(task.placement.epoch, migration, gain)

    # Any thread.

    def report(self) -> BalanceReport:
        """How it is."""
        self._watch()
        with self._changed:
            events = tuple(self._events)
        return BalanceReport(
            num_migrations=self._num_migrations,
            num_moved_experts=self._num_moved,
            moved_bytes=self._num_moved * self._costs.expert_bytes,
            waited_seconds=self._waited_seconds,
            heartbeat_age_seconds=time.monotonic() - self._beat,
            error=self._error,
            events=events,
            num_events=self._num_events,
        )

    def close(self) -> None:
        """End the planner's thread; may be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _watch(self) -> None:
        """The watchdog: whoever comes by looks whether the planner still lives."""
        silent = time.monotonic() - self._beat
        if self._error is None and not self._is_closed and silent > WATCHDOG_SECONDS:
            self._die(TimeoutError(f"its planner has been silent for {silent:.0f} s"))

    def _die(self, error: Exception) -> None:
        with self._changed:
            if self._error is not None:
                return
            self._error = f"{type(error).__name__}: {error}"
        text = f"the balancer has died ({self._error}); placement {self._epoch} stays"
        logger.error(text, exc_info=error)
        self._say(self._epoch, text)

    def _say(self, epoch: int, text: str) -> None:
        with self._changed:
            self._events.append(BalanceEvent(epoch, text))
            self._num_events += 1


def _change_text(change: SlotChange) -> str:
    where = "leaves" if change.slot < 0 else "is home on" if change.is_home else "is on"
    return f"layer {change.layer}: expert {change.expert} {where} rank {change.rank}"
