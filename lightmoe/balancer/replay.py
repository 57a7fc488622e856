"""A recorded routing over again, without a model: what each route makes of plans from past steps.

Before the first step every expert counts alike. Plans are made after the steps 1, 2, 4 ... up to
`replan_every`, then each `replan_every` steps: the first loads tell most.

Shapes: S steps, L layers, E experts, W ranks; N problems, one a layer and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightmoe.balancer.batched_routes import (
    copy_table,
    even_loads,
    home_loads,
    least_maximum,
    waterfill_loads,
)
from lightmoe.balancer.planner import plan
from lightmoe.balancer.trace import RoutingTrace
from lightmoe.balancer.window import LoadWindow
from lightmoe.moe.placement import Placement

LoadsOfRoute = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""tokens [N, E], copies [N, E, C], number of ranks -> every rank's pairs [N, W]."""

MaximumOfRoute = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""tokens [N, E], copies [N, E, C], number of ranks -> the fullest rank's pairs [N]."""

ROUTES: dict[str, MaximumOfRoute] = {
    "none": lambda *problem: home_loads(*problem).max(axis=1),
    "even": lambda *problem: even_loads(*problem).max(axis=1),
    "waterfill": lambda *problem: waterfill_loads(*problem).max(axis=1),
    "lp": least_maximum,
}

DEFAULT_REPLAN_EVERY = 8

_PROBLEMS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the trace is replayed: slots of each rank for all layers, and how many are spares."""

    slots_per_rank: tuple[int, ...]
    num_spares: int

    @property
    def num_ranks(self) -> int:
        """Spares included."""
        return len(self.slots_per_rank)


def homes_and_spares(
    num_layers: int, num_experts: int, num_ranks: int, num_spares: int, slots_per_spare: int
) -> Ranks:
    """`--placement spare`: spares with so many slots a layer, homes with one slot per expert.

    The homes share theirs as evenly as the numbers allow.
    """
    homes = _evenly(num_layers * num_experts, num_ranks - num_spares)
    return Ranks((*homes, *[num_layers * slots_per_spare] * num_spares), num_spares)


def spread_ranks(num_layers: int, num_experts: int, num_ranks: int, replica_slots: int) -> Ranks:
    """`--placement spread`: a slot per expert and so many more a layer, over all ranks alike."""
    return Ranks(_evenly(num_layers * (num_experts + replica_slots), num_ranks), 0)


def _evenly(total: int, parts: int) -> tuple[int, ...]:
    each, rest = divmod(total, parts)
    return tuple(each + (part < rest) for part in range(parts))


@dataclass
class Replay:
    """What came out, step by step.

    | field | meaning |
    |---|---|
    | max_pairs {route: float64 [S, L]} | (token, expert) pairs of the fullest rank |
    | mean_pairs float64 [S, L] | of all ranks |
    | planned_after | the steps, counted from 1, after which a plan was made |
    | moved_copies | copies that each of these plans brought to other ranks |
    """

    max_pairs: dict[str, np.ndarray]
    mean_pairs: np.ndarray
    planned_after: list[int] = field(default_factory=list)
    moved_copies: list[int] = field(default_factory=list)

    def max_over_mean(self, route: str) -> np.ndarray:
        """[S, L]."""
        return np.asarray(self.max_pairs[route] / self.mean_pairs)


def replay(
    trace: RoutingTrace,
    ranks: Ranks,
    routes: Sequence[str],
    replan_every: int = DEFAULT_REPLAN_EVERY,
    *,
    placement: Placement | None = None,
) -> Replay:
    """Route every step of the trace; with a `placement` by that one throughout.

    UsageError where a route cannot do so many ranks, PlacementError where the slots are too few.
    """
    shape = (trace.num_steps, trace.num_layers)
    result = Replay({route: np.zeros(shape) for route in routes}, np.zeros(shape))
    waiting: list[_Segment] = []
    for segment in _segments(trace, ranks, replan_every, placement, result):
        waiting.append(segment)
        if sum(map(len, waiting)) >= _PROBLEMS_AT_ONCE:
            _route(waiting, ranks.num_ranks, result)
            waiting = []
    _route(waiting, ranks.num_ranks, result)
    return result


def replay_loads(
    trace: RoutingTrace,
    ranks: Ranks,
    loads_of: LoadsOfRoute,
    replan_every: int = DEFAULT_REPLAN_EVERY,
    *,
    placement: Placement | None = None,
) -> tuple[np.ndarray, Placement]:
    """Every rank's pairs by one route, int64 [S, L, W], and the last placement; as `replay`."""
    plans = Replay({}, np.zeros((trace.num_steps, trace.num_layers)))
    parts, last = [], placement
    for segment in _segments(trace, ranks, replan_every, placement, plans):
        last = segment.placement
        table = copy_table(last.slot_table >= 0, last.homes)
        tokens = segment.counts.reshape(-1, trace.num_experts)
        copies = np.tile(table, (len(segment.counts), 1, 1))
        loads = loads_of(tokens, copies, ranks.num_ranks)
        parts.append(loads.reshape(len(segment.counts), -1, ranks.num_ranks))
    assert last is not None, "a trace has a step"
    return np.concatenate(parts), last


@dataclass(frozen=True, slots=True)
class _Segment:
    """Steps from `begin` on under one placement: counts int64 [S, L, E]."""

    begin: int
    counts: np.ndarray
    placement: Placement

    def __len__(self) -> int:
        return int(self.counts.shape[0] * self.counts.shape[1])


def _segments(
    trace: RoutingTrace,
    ranks: Ranks,
    replan_every: int,
    placement: Placement | None,
    result: Replay,
) -> Iterator[_Segment]:
    """The trace from plan to plan; writes the plans into the result."""
    window = LoadWindow(trace.num_layers, trace.num_experts)
    now = placement
    if now is None:
        alike = np.ones((trace.num_layers, trace.num_experts))
        now = plan(alike, ranks.slots_per_rank, num_spares=ranks.num_spares)
    begin = 0
    while begin < trace.num_steps:
        end = min(_next_plan(begin, replan_every), trace.num_steps)
        counts = trace.counts(begin, end)
        yield _Segment(begin, counts, now)
        for step_counts in counts:
            window.add(step_counts)
        if placement is None and end < trace.num_steps:
            before = now
            now = plan(
                window.load(), ranks.slots_per_rank, num_spares=ranks.num_spares, previous=before
            )
            result.planned_after.append(end)
            result.moved_copies.append(num_moved(before, now))
        begin = end


def _next_plan(step: int, replan_every: int) -> int:
    """The number of steps after which the first plan behind `step` is made."""
    doubled = max(1, 2 * step)
    if doubled < replan_every:
        return doubled
    return (step // replan_every + 1) * replan_every


def num_moved(before: Placement, after: Placement) -> int:
    """Copies that are on a rank now and were not."""
    return int(((after.slot_table >= 0) & (before.slot_table < 0)).sum())


def _route(segments: list[_Segment], num_ranks: int, result: Replay) -> None:
    """Route these steps by every route of the result."""
    if not segments:
        return
    tables = [
        copy_table(segment.placement.slot_table >= 0, segment.placement.homes)
        for segment in segments
    ]
    width = max(table.shape[2] for table in tables)
    copies = np.concatenate(
        [
            np.tile(_widened(table, width, num_ranks), (len(segment.counts), 1, 1))
            for table, segment in zip(tables, segments, strict=True)
        ]
    )
    counts = np.concatenate([segment.counts for segment in segments])
    tokens = counts.reshape(-1, counts.shape[2])
    steps = slice(segments[0].begin, segments[0].begin + len(counts))
    result.mean_pairs[steps] = counts.sum(axis=2) / num_ranks
    for route, max_pairs in result.max_pairs.items():
        max_pairs[steps] = ROUTES[route](tokens, copies, num_ranks).reshape(len(counts), -1)


def _widened(table: np.ndarray, width: int, num_ranks: int) -> np.ndarray:
    missing = width - table.shape[2]
    return np.pad(table, ((0, 0), (0, 0), (0, missing)), constant_values=num_ranks)
