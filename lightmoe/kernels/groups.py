"""Pairs sorted into groups, as the matrix products take them: the pairs of a group share a slot.

On a GPU the numbers stay in its memory: which groups are empty is not known to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class PairGroups:
    """Where each group's pairs begin, and which tile of `tokens_per_tile` pairs is whose.

    | field | meaning |
    |---|---|
    | slots int32 [G] | slot whose weight the group's pairs meet |
    | offsets int32 [G + 1] | first pair of each group; a group may be empty |
    | tile_offsets int32 [G + 1] | first tile of each group; tile_offsets[G] tiles in all |
    | tile_groups int32 [most tiles] | group of each tile |
    | tokens_per_tile | pairs in a tile; 0 where no tiles were made |
    | num_pairs | P |

    The tile table is None where nothing on a GPU reads it.
    """

    slots: Tensor
    offsets: Tensor
    tile_offsets: Tensor | None
    tile_groups: Tensor | None
    tokens_per_tile: int
    num_pairs: int

    @classmethod
    def from_counts(cls, slots: Sequence[int], pairs_per_slot: Sequence[int]) -> PairGroups:
        """Groups in the host's memory, from the number of pairs of each of these slots."""
        assert len(slots) == len(pairs_per_slot), "every group has one slot and one count"
        counts = torch.tensor([0, *pairs_per_slot], dtype=torch.int32)
        return cls(
            slots=torch.tensor(slots, dtype=torch.int32),
            offsets=counts.cumsum(0, dtype=torch.int32),
            tile_offsets=None,
            tile_groups=None,
            tokens_per_tile=0,
            num_pairs=sum(pairs_per_slot),
        )

    @classmethod
    def of_equal_size(
        cls, num_groups: int, pairs_per_group: int, tokens_per_tile: int, device: torch.device
    ) -> PairGroups:
        """Groups of as many pairs each, group g with slot g, on any device."""
        tiles_per_group = -(-pairs_per_group // tokens_per_tile)
        order = torch.arange(num_groups + 1, dtype=torch.int32, device=device)
        return cls(
            slots=order[:-1],
            offsets=order * pairs_per_group,
            tile_offsets=order * tiles_per_group,
            tile_groups=order[:-1].repeat_interleave(tiles_per_group),
            tokens_per_tile=tokens_per_tile,
            num_pairs=num_groups * pairs_per_group,
        )
