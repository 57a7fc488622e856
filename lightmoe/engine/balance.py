"""The port between the engine and the balancer; balancer/loop.py has the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lightmoe.core import BalanceReport, Orders, StepResult
from lightmoe.moe.placement import Placement


class StepBalancer(Protocol):
    """Gives orders before a step and sees the results after it. It never raises."""

    def orders(self, placement: Placement, route: str) -> tuple[Orders, Placement] | None:
        """What the ranks do beside the next step from that placement on, and the one they reach."""
        ...

    def observe(self, expert_tokens: np.ndarray, results: Sequence[StepResult]) -> None:
        """The step's load of all ranks [L, E], and what each rank returned."""
        ...

    def report(self) -> BalanceReport:
        """How it is. Any thread."""
        ...

    def close(self) -> None:
        """End it; the placement stays as it is."""
        ...


class RoutingRecorder(Protocol):
    """Keeps what every rank's tokens chose."""

    def add(self, results: Sequence[StepResult]) -> None:
        """One step."""
        ...

    def close(self) -> None:
        """Finish the file; may be called twice."""
        ...
