"""Which rank holds which experts: homes first, replicas after, numbered slots in one pool per rank.

A placement is immutable. The next one has the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np

from lightmoe.core import SlotChange
from lightmoe.errors import PlacementError

RankKind = Literal["home", "spare"]


@dataclass(frozen=True)
class Placement:
    """Slots -> experts, all layers that have experts: layer 0 here is the first of those.

    | field | meaning |
    |---|---|
    | slot_table int32 [L, E, W] | slot number of that expert's copy on that rank, -1 for none |
    | homes int32 [L, E] | the rank of the first copy |
    | rank_kinds [W] | "home" or "spare" |
    | epoch | counts placements since the start |

    One entry a rank: two copies of one expert on one rank cannot be written down.
    """

    slot_table: np.ndarray
    homes: np.ndarray
    rank_kinds: tuple[RankKind, ...]
    epoch: int = 0

    def __post_init__(self) -> None:
        held = self.slot_table >= 0
        home_held = np.take_along_axis(held, self.homes[:, :, None].astype(np.int64), axis=2)
        if not home_held.all():
            layer, expert = np.argwhere(~home_held[:, :, 0])[0]
            raise _no_home(int(layer), int(expert))
        for rank in range(self.num_ranks):
            slots = self.slot_table[:, :, rank][held[:, :, rank]]
            if len(np.unique(slots)) != len(slots):
                raise _shared_slot(rank)

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return int(self.slot_table.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts of one layer."""
        return int(self.slot_table.shape[1])

    @property
    def num_ranks(self) -> int:
        """Ranks, spares included."""
        return int(self.slot_table.shape[2])

    @cached_property
    def copies(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """copies[layer][expert]: the ranks that hold it, home first, then ascending."""
        return tuple(
            tuple(self.ranks_of(layer, expert) for expert in range(self.num_experts))
            for layer in range(self.num_layers)
        )

    def ranks_of(self, layer: int, expert: int) -> tuple[int, ...]:
        """The ranks that hold one expert, home first, then ascending."""
        home = int(self.homes[layer, expert])
        others = np.flatnonzero(self.slot_table[layer, expert] >= 0).tolist()
        return (home, *(rank for rank in others if rank != home))

    def changed(self, changes: Sequence[SlotChange], epoch: int) -> Placement:
        """The next placement; PlacementError where an expert has no home then, or slots clash."""
        if epoch != self.epoch + 1:
            raise PlacementError(f"epoch {epoch} does not follow epoch {self.epoch}")
        slot_table, homes = self.slot_table.copy(), self.homes.copy()
        for change in changes:
            slot_table[change.layer, change.expert, change.rank] = change.slot
            if change.is_home:
                homes[change.layer, change.expert] = change.rank
        # Only what changed can be wrong, and a step waits for this: no check of all the rest.
        for change in changes:
            pair = change.layer, change.expert
            if slot_table[*pair, homes[pair]] < 0:
                raise _no_home(*pair)
            slot = slot_table[*pair, change.rank]
            if slot >= 0 and np.count_nonzero(slot_table[:, :, change.rank] == slot) != 1:
                raise _shared_slot(change.rank)
        return self._with(slot_table=slot_table, homes=homes, epoch=epoch)

    def _with(self, **values: object) -> Placement:
        """This placement with other values, which nobody checks."""
        placement = object.__new__(Placement)
        for name in (item.name for item in fields(Placement)):
            object.__setattr__(placement, name, values.get(name, getattr(self, name)))
        return placement

    def num_slots(self, rank: int) -> int:
        """The slots of that rank's pool that this placement needs."""
        return int(self.slot_table[:, :, rank].max(initial=-1)) + 1

    def hosted(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """(layer, expert, slot) of everything that rank holds."""
        for layer, expert in np.argwhere(self.slot_table[:, :, rank] >= 0).tolist():
            yield layer, expert, int(self.slot_table[layer, expert, rank])


def _no_home(layer: int, expert: int) -> PlacementError:
    return PlacementError(f"expert {expert} of layer {layer} has no slot on its home rank")


def _shared_slot(rank: int) -> PlacementError:
    return PlacementError(f"two experts share a slot on rank {rank}")


def initial_placement(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    *,
    num_spares: int = 0,
    replicas_per_layer: int = 0,
) -> Placement:
    """The placement before any load is known: every expert counts alike.

    Homes are spread over the first `num_ranks - num_spares` ranks as evenly as the numbers allow.
    Then `replicas_per_layer` further copies go to the spares, or to all ranks when there are none,
    fewest copies first, so that no number has to divide another. Each copy goes to the rank with
    the fewest slots in this layer, then in all, then the lowest number.
    """
    num_homes = num_ranks - num_spares
    if num_homes < 1:
        raise PlacementError(
            f"{num_spares} spares of {num_ranks} ranks leave no home; give fewer spares"
        )
    home_ranks = range(num_homes)
    replica_ranks = range(num_homes, num_ranks) if num_spares else home_ranks
    slot_table = np.full((num_layers, num_experts, num_ranks), -1, dtype=np.int32)
    homes = np.zeros((num_layers, num_experts), dtype=np.int32)
    slots_in_all = [0] * num_ranks

    for layer in range(num_layers):
        slots_in_layer = [0] * num_ranks

        def give(
            expert: int,
            candidates: range,
            layer: int = layer,
            slots_in_layer: list[int] = slots_in_layer,
        ) -> int | None:
            free = [rank for rank in candidates if slot_table[layer, expert, rank] < 0]
            if not free:
                return None
            rank = min(free, key=lambda rank: (slots_in_layer[rank], slots_in_all[rank], rank))
            slot_table[layer, expert, rank] = slots_in_all[rank]
            slots_in_layer[rank] += 1
            slots_in_all[rank] += 1
            return rank

        for expert in range(num_experts):
            rank = give(expert, home_ranks)
            assert rank is not None
            homes[layer, expert] = rank
        for replica in range(replicas_per_layer):
            if give(replica % num_experts, replica_ranks) is None:
                break
    kinds: list[RankKind] = ["home"] * num_homes
    kinds += ["spare"] * num_spares
    return Placement(slot_table, homes, tuple(kinds))
