"""The port between the engine and the ranks. worker/ has the adapters: Ray, and threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.moe.placement import Placement


class WorkerGroup(Protocol):
    """All ranks, started, with their weights loaded."""

    ranks: Sequence[RankInfo]
    placement: Placement
    block_size: int

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step on every rank, behind the one that may be under way: two at most.

        RankError names a rank that died or is late.
        """
        ...

    def finish(self) -> list[StepResult]:
        """Wait for the first of the steps under way; raises as `begin`."""
        ...

    def check(self) -> None:
        """RankError if a rank has gone while nothing was asked of it."""
        ...

    def close(self) -> None:
        """Stop every rank; may be called twice."""
        ...
