"""Pairs that a rank computed in each layer, where only its device knows how many."""

from __future__ import annotations

import torch
from torch import Tensor


class PairCounter:
    """Counts int32 [L] on the device, of layers that have experts."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_layers, dtype=torch.int32, device=device)
        self._noted: list[tuple[int, Tensor]] = []

    def note(self, layer: int, offsets: Tensor) -> None:
        """int32 [G + 1], of groups of one of this step's chunks: the last is how many pairs."""
        self._noted.append((layer, offsets))

    def count(self) -> None:
        """Add up what was noted; part of the step, so also of its graph."""
        noted, self._noted = self._noted, []
        if noted:
            layers = [layer for layer, _ in noted]
            offsets = torch.cat([offsets for _, offsets in noted])
            counts = offsets.view(len(noted), -1)[:, -1]
            num_layers = len(self._counts)
            num_chunks = len(noted) // num_layers
            if layers == [layer for layer in range(num_layers) for _ in range(num_chunks)]:
                if num_chunks > 1:
                    counts = counts.view(num_layers, num_chunks).sum(1, dtype=torch.int32)
                self._counts.add_(counts)
            else:
                for layer, count in zip(layers, counts, strict=True):
                    self._counts[layer].add_(count)

    def move(self) -> Tensor:
        """Pairs computed here since last asked, int32 [L], on the device: nothing waits for it."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts
