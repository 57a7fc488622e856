"""Where the copies of every expert are at this moment, as dispatchers read it at each step.

The tensors stay where they are when a placement changes: a CUDA graph that reads them sees the new
entries, and what runs before the change in stream order sees the old ones.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightmoe.moe.placement import Placement

Copies = tuple[tuple[int, ...], ...]
"""copies[expert]: the ranks that hold it, home first, then ascending."""


class PlacementTables:
    """The placement of this moment, as one rank needs it.

    | field | meaning |
    |---|---|
    | copy_ranks int32 [L, E, W], device | the ranks of each expert's copies, home first, then -1 |
    | slots int32 [L, E], device | the slot of this rank that holds the expert, -1 for none |
    | copies [L] | copy_ranks on the host |
    | num_held [L] | experts of the layer that this rank has |
    | placement | what all of it says |
    """

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        self.placement = placement
        self.copies: list[Copies] = list(placement.copies)
        self._rank = rank
        num_layers, num_experts, num_ranks = placement.slot_table.shape
        rows = [self._row(layer, expert) for layer, expert in np.ndindex(num_layers, num_experts)]
        self.copy_ranks = torch.tensor(rows, dtype=torch.int32).to(device)
        self.copy_ranks = self.copy_ranks.view(num_layers, num_experts, num_ranks)
        self.num_held = self._count_held()
        slots = np.ascontiguousarray(placement.slot_table[:, :, rank])
        self.slots = torch.from_numpy(slots).to(device, copy=True)

    def _row(self, layer: int, expert: int) -> list[int]:
        ranks = self.copies[layer][expert]
        return [*ranks, *[-1] * (self.placement.num_ranks - len(ranks))]

    def _count_held(self) -> list[int]:
        held: list[int] = (self.placement.slot_table[:, :, self._rank] >= 0).sum(axis=1).tolist()
        return held

    def adopt(self, placement: Placement) -> None:
        """Change the entries that differ, in place, without waiting for the device."""
        before, self.placement = self.placement, placement
        moved = (placement.slot_table != before.slot_table).any(axis=2)
        moved |= placement.homes != before.homes
        layers, experts = np.nonzero(moved)
        changed = list(zip(layers.tolist(), experts.tolist(), strict=True))
        if not changed:
            return
        for layer, expert in changed:
            copies = list(self.copies[layer])
            copies[expert] = placement.ranks_of(layer, expert)
            self.copies[layer] = tuple(copies)
        self.num_held = self._count_held()
        num_experts = placement.num_experts
        flat = [layer * num_experts + expert for layer, expert in changed]
        rows = [self._row(layer, expert) for layer, expert in changed]
        slots = [int(placement.slot_table[*pair, self._rank]) for pair in changed]
        place = self._send(torch.tensor(flat, dtype=torch.int64))
        ranks = self._send(torch.tensor(rows, dtype=torch.int32))
        self.copy_ranks.view(-1, placement.num_ranks).index_copy_(0, place, ranks)
        self.slots.view(-1).index_copy_(0, place, self._send(torch.tensor(slots).int()))

    def _send(self, values: Tensor) -> Tensor:
        if not self.slots.is_cuda:
            return values
        return values.pin_memory().to(self.slots.device, non_blocking=True)
