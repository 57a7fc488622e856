"""What the planner reads: recent loads, averaged as far back as has predicted the next step best.

A long average hides a shift of the domain, a short one is mostly noise. So several are kept, each
forgetting at its own pace, and each is scored by how well it foretold every step's counts.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HALF_LIVES_IN_STEPS = (4, 16, 64, 256)
"""Steps after which an average has forgotten half."""

_SCORE_HALF_LIFE_IN_STEPS = 32
_LEAST_SHARE_OF_MEAN = 0.05


class LoadWindow:
    """Averages of counts [L, E] over a window that slides with the steps; memory does not grow."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        half_lives_in_steps: Sequence[float] = HALF_LIVES_IN_STEPS,
    ) -> None:
        self._decays = 0.5 ** (1 / np.asarray(half_lives_in_steps, dtype=np.float64))
        self._sums = np.zeros((len(self._decays), num_layers, num_experts))
        self._scores = np.zeros(len(self._decays))
        self.num_steps = 0

    def add(self, counts: np.ndarray) -> None:
        """One step's tokens per expert, [L, E]; a step without tokens changes nothing."""
        num_tokens = counts.sum()
        if not num_tokens:
            return
        if self.num_steps:
            # Nats a token; the averages are compared, so what they share need not be there.
            surprise = -(counts * np.log(self._foretold())).sum(axis=(1, 2)) / num_tokens
            decay = 0.5 ** (1 / _SCORE_HALF_LIFE_IN_STEPS)
            self._scores = decay * self._scores + surprise
        self._sums = self._decays[:, None, None] * self._sums + counts
        self.num_steps += 1

    def _foretold(self) -> np.ndarray:
        """The shares that each average expects."""
        mean = self._sums.mean(axis=2, keepdims=True)
        expected = self._sums + _LEAST_SHARE_OF_MEAN * mean + np.finfo(np.float64).tiny
        return np.asarray(expected / expected.sum(axis=2, keepdims=True))

    def load(self) -> np.ndarray:
        """Tokens per expert, float64 [L, E]: zeros before the first step."""
        return np.asarray(self._sums[int(self._scores.argmin())].copy())
