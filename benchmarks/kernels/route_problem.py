"""The route's problem: one layer planned for a skewed load, and the counts of a step after a drift.

Shapes: E experts, W ranks, C copies of the expert that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightmoe.balancer.planner import plan

NUM_RANKS = 10
NUM_SPARES = {"8+2": 2, "10": 0}
SKEW, DRIFT = 1.0, 0.5  # of Zipf; standard deviation of an expert's logarithm since the plan


@dataclass(frozen=True)
class RouteProblem:
    """Counts int64 [W, E], and the ranks of each expert's copies, home first."""

    counts: np.ndarray
    copies: tuple[tuple[int, ...], ...]

    @classmethod
    def random(
        cls, seed: int, layout: str, num_experts: int, num_replicas: int, pairs_per_rank: int
    ) -> RouteProblem:
        """`num_replicas` slots on the two spares of "8+2", or over all ranks of "10"."""
        generator = np.random.default_rng(seed)
        load = generator.permutation(1.0 / np.arange(1, num_experts + 1) ** SKEW)
        num_spares = NUM_SPARES[layout]
        num_homes = NUM_RANKS - num_spares
        if num_spares:
            slots = [-(-num_experts // num_homes)] * num_homes
            slots += [num_replicas // num_spares] * num_spares
        else:
            each, rest = divmod(num_experts + num_replicas, NUM_RANKS)
            slots = [each + (rank < rest) for rank in range(NUM_RANKS)]
        placement = plan(load[None], slots, num_spares=num_spares)
        now = load * np.exp(DRIFT * generator.standard_normal(num_experts))
        counts = generator.multinomial(pairs_per_rank, now / now.sum(), size=NUM_RANKS)
        return cls(counts, placement.copies[0])

    @property
    def copy_ranks(self) -> np.ndarray:
        """int32 [E, W]: the copies, then -1, as a rank's tables have them."""
        rows = [[*ranks, *[-1] * (NUM_RANKS - len(ranks))] for ranks in self.copies]
        return np.array(rows, dtype=np.int32)

    def max_over_mean(self, assigned: np.ndarray) -> float:
        """The fullest rank's pairs over the mean's, of what goes to each copy [W, E, C]."""
        loads = np.zeros(NUM_RANKS)
        for expert, ranks in enumerate(self.copies):
            loads[list(ranks)] += assigned[:, expert, : len(ranks)].sum(axis=0)
        return float(loads.max() / loads.mean())
