"""Is a migration worth its bytes? Predicted from the load, the route and both placements.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightmoe.balancer.batched_routes import copy_table, even_loads, home_loads, waterfill_loads
from lightmoe.moe.placement import Placement

EXPERT_SHARE = 0.5
"""Of a step, what the slowest rank's experts take: assumed, for the driver cannot see it."""

LEAST_GAIN = 0.02
"""A migration that promises less is noise."""

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


def max_over_mean(load: np.ndarray, placement: Placement, route: str) -> float:
    """The fullest rank over the mean one, over all layers, if this load [L, E] came again.

    Layers follow each other and each waits for its fullest rank, so maxima are summed over layers
    before they are divided.
    """
    copies = copy_table(placement.slot_table >= 0, placement.homes)
    totals = load.sum(axis=1, keepdims=True)
    scaled = load * np.divide(
        _TOKENS_OF_A_LAYER, totals, out=np.zeros_like(totals, dtype=np.float64), where=totals > 0
    )
    ranks = _LOADS[route](np.rint(scaled).astype(np.int64), copies, placement.num_ranks)
    mean = ranks.mean(axis=1).sum()
    return float(ranks.max(axis=1).sum() / mean) if mean else 1.0


def predict(
    load: np.ndarray,
    now: Placement,
    then: Placement,
    route: str,
    *,
    step_seconds: float,
    horizon_steps: int,
    expert_bytes: int,
    bytes_per_second: float,
) -> Gain:
    """What going from one placement to another would bring, and take from the busiest rank."""
    before, after = (max_over_mean(load, placement, route) for placement in (now, then))
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
