"""YaRN (Peng et al. 2023): rotary positions for more context than a model was first trained on.

Plain arithmetic without torch: config.json is read before any rank starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """How far to stretch, under the names of Hugging Face's config.json.

    Pairs that turn more than `beta_fast` times within the original context keep their frequency,
    those that turn less than `beta_slow` times have it divided by `factor`; between lies a ramp.
    `table_scale` multiplies cos and sin; `mscale_all_dim` (0: no effect) scales the scores further.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    table_scale: float
    mscale_all_dim: float

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied with beside 1 / sqrt(width)."""
        return magnitude(self.factor, self.mscale_all_dim) ** 2

    def stretch(self, rotary_dim: int, theta: float) -> list[float]:
        """What each of the `rotary_dim` / 2 frequencies is multiplied with: 1 .. 1 / factor."""
        first = self._pair_that_turns(self.beta_fast, rotary_dim, theta)
        last = self._pair_that_turns(self.beta_slow, rotary_dim, theta)
        low, high = max(math.floor(first), 0), min(math.ceil(last), rotary_dim - 1)
        # One and the same pair: a step in place of a ramp.
        width = max(high - low, 0.001)
        ramp = (min(max((pair - low) / width, 0.0), 1.0) for pair in range(rotary_dim // 2))
        return [1.0 - share + share / self.factor for share in ramp]

    def _pair_that_turns(self, num_turns: float, rotary_dim: int, theta: float) -> float:
        """Index of the frequency with that many turns in the original context, as a fraction."""
        radians_per_position = 2 * math.pi * num_turns / self.original_max_position_embeddings
        return -rotary_dim * math.log(radians_per_position) / (2 * math.log(theta))


def magnitude(factor: float, mscale: float) -> float:
    """YaRN's temperature: how much longer vectors get when the context is stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
