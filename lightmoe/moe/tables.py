"""Where the copies of every expert are at this moment, as dispatchers read it at each step.

The tensors stay where they are when a placement changes: a CUDA graph that reads them sees the new
entries, and what runs before the change in stream order sees the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightmoe.moe.placement import Placement
from lightmoe.moe.route import Nearness

_RING_BUFFERS, _RING_NUMBERS = 8, 4096

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
    | nearness int32 [N, W], device | which ranks are near each other; None where all are alike |
    """

    def __init__(
        self, placement: Placement, rank: int, device: torch.device, nearness: Nearness = ()
    ) -> None:
        self.placement = placement
        self.nearness = torch.tensor(nearness, dtype=torch.int32).to(device) if nearness else None
        self.copies: list[Copies] = list(placement.copies)
        self._rank = rank
        num_layers, num_experts, num_ranks = placement.slot_table.shape
        rows = [self._row(layer, expert) for layer, expert in np.ndindex(num_layers, num_experts)]
        self.copy_ranks = torch.tensor(rows, dtype=torch.int32).to(device)
        self.copy_ranks = self.copy_ranks.view(num_layers, num_experts, num_ranks)
        self.num_held = [self._count_held(layer) for layer in range(num_layers)]
        slots = np.ascontiguousarray(placement.slot_table[:, :, rank])
        self.slots = torch.from_numpy(slots).to(device, copy=True)
        self._staging = _Staging() if device.type == "cuda" else None
        self._put([(0, 0)])  # loads the kernels of `adopt`, which may stop a device

    def _row(self, layer: int, expert: int) -> list[int]:
        ranks = self.copies[layer][expert]
        return [*ranks, *[-1] * (self.placement.num_ranks - len(ranks))]

    def _count_held(self, layer: int) -> int:
        return int(np.count_nonzero(self.placement.slot_table[layer, :, self._rank] >= 0))

    def adopt(self, placement: Placement) -> None:
        """Change the entries that differ, in place, without waiting for the device."""
        before, self.placement = self.placement, placement
        changed = _changed(before, placement)
        if not changed:
            return
        for layer, expert in changed:
            copies = list(self.copies[layer])
            copies[expert] = placement.ranks_of(layer, expert)
            self.copies[layer] = tuple(copies)
        for layer in {layer for layer, _ in changed}:
            self.num_held[layer] = self._count_held(layer)
        at_once = _RING_NUMBERS // (2 + placement.num_ranks)
        for first in range(0, len(changed), at_once):
            self._put(changed[first : first + at_once])

    def _put(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Write what the placement says of these (layer, expert)."""
        placement, entries = self.placement, []
        for layer, expert in pairs:
            slot = int(placement.slot_table[layer, expert, self._rank])
            place = layer * placement.num_experts + expert
            entries.append([place, slot, *self._row(layer, expert)])
        numbers = self._send(torch.tensor(entries))  # in one copy: a step waits behind this
        places = numbers[:, 0]
        self.slots.view(-1).index_copy_(0, places, numbers[:, 1].int())
        copy_ranks = self.copy_ranks.view(-1, placement.num_ranks)
        copy_ranks.index_copy_(0, places, numbers[:, 2:].int())

    def put_slots(self, layer: int, slots: Sequence[int]) -> None:
        """The slots [E] of one layer's experts, where these change without a new placement."""
        self.slots[layer].copy_(self._send(torch.tensor(slots, dtype=torch.int32)))

    def _send(self, values: Tensor) -> Tensor:
        if self._staging is None:
            return values
        return self._staging.send(values, self.slots.device)


class _Staging:
    """Pinned memory for numbers on their way to a card, in turn.

    To pin more of it between two steps may stop the device for a hundred milliseconds.
    """

    def __init__(self) -> None:
        shape = (_RING_BUFFERS, _RING_NUMBERS)
        self._buffers = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self._sent = [torch.cuda.Event() for _ in range(_RING_BUFFERS)]
        self._turn = 0

    def send(self, values: Tensor, device: torch.device) -> Tensor:
        """These, on the device, behind what its current stream has; the host goes on at once."""
        buffer, sent = self._buffers[self._turn], self._sent[self._turn]
        num_bytes = values.numel() * values.element_size()
        assert num_bytes <= buffer.numel() * buffer.element_size(), "the caller sends parts"
        self._turn = (self._turn + 1) % _RING_BUFFERS
        sent.synchronize()
        staged = buffer.view(torch.uint8)[:num_bytes].view(values.dtype).view(values.shape)
        staged.copy_(values)
        there = staged.to(device, non_blocking=True)
        sent.record()
        return there


def _changed(before: Placement, after: Placement) -> list[tuple[int, int]]:
    """(layer, expert) of all that differ in their slots or their home."""
    slots = np.flatnonzero(after.slot_table.ravel() != before.slot_table.ravel())
    homes = np.flatnonzero(after.homes.ravel() != before.homes.ravel())
    places = {*(slots // after.num_ranks).tolist(), *homes.tolist()}
    return [divmod(place, after.num_experts) for place in sorted(places)]
