"""Tokens that each expert received from this rank's own tokens, since the count was last taken."""

from __future__ import annotations

import numpy as np
import torch

from lightmoe.moe.gate import Choice


class LoadCounter:
    """Counts [L, E], kept where the choices are made so that counting never waits for a device.

    L counts the layers that have experts. `counted` int32 [T x K] is 1 for pairs that count and 0
    for others, where rows are padded; None: all count.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_layers, num_experts, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        self.counted: torch.Tensor | None = None
        self._recorded: torch.Tensor | None = None

    def add(self, layer: int, choice: Choice) -> None:
        """Add one layer's choice."""
        self.keep(layer, choice)
        experts = choice.experts.flatten()
        # Not bincount, which waits for a GPU.
        ones = self._one.expand(len(experts)) if self.counted is None else self.counted
        self._counts[layer].index_add_(0, experts, ones)

    def row(self, layer: int) -> torch.Tensor:
        """One layer's counts, int32 [E], for whoever adds to them; there for good."""
        return self._counts[layer]

    def keep(self, layer: int, choice: Choice) -> None:
        """Where choices are recorded, this is what runs.

        What an overflow moves elsewhere is still counted as the gate chose it: from that the
        balancer sees where copies are missing.
        """
        if self._recorded is not None:
            kept = choice.experts[: self._recorded.shape[1]]  # a graph's step may be padded
            self._recorded[layer, : len(kept)].copy_(kept)

    def take(self) -> np.ndarray:
        """The counts int32 [L, E] since the last call, which starts the next window."""
        counts: np.ndarray = self.move().cpu().numpy()
        return counts

    def move(self) -> torch.Tensor:
        """As `take`, but the counts stay on their device, and nothing waits for it."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts

    def record(self, max_tokens: int, num_experts_per_token: int) -> None:
        """Also keep the choices themselves from now on, of up to so many tokens a step."""
        shape = (len(self._counts), max_tokens, num_experts_per_token)
        self._recorded = torch.zeros(shape, dtype=torch.int16, device=self._counts.device)

    def take_routing(self, num_tokens: int) -> np.ndarray:
        """The experts uint16 [T, L, K] of the last step's tokens, the first of each choice."""
        assert self._recorded is not None, "record first"
        routing = self._recorded[:, :num_tokens].transpose(0, 1).contiguous()
        return routing.cpu().numpy().view(np.uint16)
