"""Which rank takes a request, and so keeps its KV cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from lightmoe.engine.scheduler import Scheduler


class Router:
    """The rank with the fewest sequences; among equals the one that was chosen longest ago."""

    def __init__(self, num_ranks: int) -> None:
        self._last_chosen = [0] * num_ranks
        self._num_chosen = 0

    def choose(self, schedulers: Seq[Scheduler]) -> int:
        """A rank for the next request."""
        rank = min(
            range(len(schedulers)),
            key=lambda rank: (schedulers[rank].num_sequences, self._last_chosen[rank], rank),
        )
        self._num_chosen += 1
        self._last_chosen[rank] = self._num_chosen
        return rank
