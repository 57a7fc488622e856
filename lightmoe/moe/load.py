"""Tokens that each expert received from this rank's own tokens, since the count was last taken."""

from __future__ import annotations

import numpy as np
import torch

from lightmoe.moe.gate import Choice


class LoadCounter:
    """Counts [L, E], kept where the choices are made so that counting never waits for a device.

    L counts the layers that have experts.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def add(self, layer: int, choice: Choice) -> None:
        """Add one layer's choice."""
        experts = choice.experts.flatten()
        # Not bincount, which waits for a GPU.
        self._counts[layer].index_add_(0, experts, self._one.expand(len(experts)))

    def take(self) -> np.ndarray:
        """The counts int32 [L, E] since the last call, which starts the next window."""
        counts = self._counts.cpu().numpy().copy()
        self._counts.zero_()
        return counts
