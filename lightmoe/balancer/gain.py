"""Is a migration worth its bytes? Predicted from the load, the route and both placements.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightmoe.balancer.batched_routes import copy_table, even_loads, home_loads, waterfill_loads
from lightmoe.moe.placement import Placement

EXPERT_SHARE = 0.5
"""Of a step, what the slowest rank's experts take: assumed, for the driver cannot see it."""

LEAST_GAIN = 0.02
"""A migration that promises less is noise."""

_NUM_DRAWS = 4
"""Steps drawn from the load for a prediction."""

_TOKENS_OF_A_LAYER = 1 << 16
_LOADS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "waterfill": waterfill_loads,
    "even": even_loads,
    "none": home_loads,
}


@dataclass(frozen=True, slots=True)
class Gain:
    """max/mean over ranks before and after, seconds saved over the horizon, seconds it costs."""

    before: float
    after: float
    saved_seconds: float
    cost_seconds: float

    @property
    def is_worth_it(self) -> bool:
        """Whether to migrate."""
        gains = self.after <= (1 - LEAST_GAIN) * self.before
        return gains and self.saved_seconds > self.cost_seconds


def max_over_mean(
    load: np.ndarray,
    placement: Placement,
    route: str,
    pairs_per_step: int | None = None,
    rank_speeds: Sequence[float] | np.ndarray | None = None,
) -> float:
    """The fullest rank over the mean one, over all layers, if this load [L, E] came again.

    With `pairs_per_step` in steps of so many pairs a layer, drawn from the load: small steps are
    uneven by chance too. Layers follow each other and each waits for its fullest rank, so maxima
    are summed over layers before they are divided. A rank's load counts over its relative speed
    [W], one where none are given.
    """
    copies = copy_table(placement.slot_table >= 0, placement.homes)
    shares = _shares(load)
    if pairs_per_step is None:
        counts = np.rint(shares * _TOKENS_OF_A_LAYER).astype(np.int64)
    else:
        generator = np.random.default_rng(0)  # the same steps for every placement
        drawn = generator.multinomial(pairs_per_step, shares, size=(_NUM_DRAWS, len(shares)))
        counts, copies = drawn.reshape(-1, shares.shape[1]), np.tile(copies, (_NUM_DRAWS, 1, 1))
    ranks = _LOADS[route](counts, copies, placement.num_ranks)
    mean = ranks.mean(axis=1).sum()
    fullest = (ranks if rank_speeds is None else ranks / np.asarray(rank_speeds)).max(axis=1).sum()
    return float(fullest / mean) if mean else 1.0


def _shares(load: np.ndarray) -> np.ndarray:
    """Each expert's part of its layer's load; equal parts of none."""
    totals = load.sum(axis=1, keepdims=True, dtype=np.float64)
    even = np.full(load.shape, 1 / load.shape[1])
    return np.asarray(np.divide(load, totals, out=even, where=totals > 0))


def predict(
    load: np.ndarray,
    now: Placement,
    then: Placement,
    route: str,
    *,
    pairs_per_step: int,
    step_seconds: float,
    horizon_steps: int,
    expert_bytes: int,
    bytes_per_second: float,
    rank_speeds: Sequence[float] | np.ndarray | None = None,
) -> Gain:
    """What going from one placement to another would bring, and take from the busiest rank."""
    before, after = (
        max_over_mean(load, placement, route, pairs_per_step, rank_speeds)
        for placement in (now, then)
    )
    new = (then.slot_table >= 0) & (now.slot_table < 0)
    bytes_in = int(new.sum(axis=(0, 1)).max(initial=0)) * expert_bytes
    saved = (1 - after / before) * EXPERT_SHARE * step_seconds * horizon_steps
    return Gain(before, after, saved, bytes_in / bytes_per_second)


def renumbered(placement: Placement) -> Placement:
    """The same copies in slots 0, 1, ... of each rank, as if nobody had free ones."""
    slot_table = np.full_like(placement.slot_table, -1)
    for rank in range(placement.num_ranks):
        slots = placement.slot_table[:, :, rank]
        held = slots >= 0
        slot_table[:, :, rank][held] = np.argsort(np.argsort(slots[held]))
    return Placement(slot_table, placement.homes, placement.rank_kinds, placement.epoch)
