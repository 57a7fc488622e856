"""What one call of the planner is asked, checked; and its answer as a placement with slot numbers.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement, RankKind

_LEAST_SHARE_OF_MEAN = 0.02


@dataclass(frozen=True)
class PlanningTask:
    """shares float64 [L, E] sum to one per layer; pools int64 [W] are slots of all layers."""

    shares: np.ndarray
    pools: np.ndarray
    num_spares: int
    previous: Placement | None
    rank_speeds: np.ndarray
    rank_nodes: np.ndarray

    @classmethod
    def of(
        cls,
        load: np.ndarray,
        slots_per_rank: Sequence[int],
        num_spares: int,
        previous: Placement | None,
        rank_speeds: Sequence[float] | None,
        rank_nodes: Sequence[int] | None,
    ) -> PlanningTask:
        """The arguments of `plan`; PlacementError where no placement can be."""
        num_ranks = len(slots_per_rank)
        task = cls(
            _shares(load),
            # More slots than there are experts serve nobody: no rank takes two copies.
            np.minimum(np.asarray(slots_per_rank, dtype=np.int64), load.size),
            num_spares,
            previous,
            np.asarray([1.0] * num_ranks if rank_speeds is None else rank_speeds, np.float64),
            np.asarray([0] * num_ranks if rank_nodes is None else rank_nodes, np.int64),
        )
        task._check_ranks()
        task._check_room()
        return task

    def _check_ranks(self) -> None:
        num_ranks = len(self.pools)
        if not 0 <= self.num_spares < num_ranks:
            raise PlacementError(
                f"{self.num_spares} spares of {num_ranks} ranks leave no home; give fewer spares"
            )
        if (self.pools < 0).any():
            raise PlacementError(f"a rank has {self.pools.min()} slots; give none or more")
        if self.rank_speeds.shape != (num_ranks,) or not (self.rank_speeds > 0).all():
            raise PlacementError(
                f"the speeds {self.rank_speeds.tolist()} are not {num_ranks} positive numbers"
            )
        if self.rank_nodes.shape != (num_ranks,):
            raise PlacementError(
                f"nodes are given for {len(self.rank_nodes)} ranks; give {num_ranks} numbers"
            )

    def _check_room(self) -> None:
        shape = (*self.shares.shape, len(self.pools))
        if self.previous is not None and self.previous.slot_table.shape != shape:
            raise PlacementError(
                f"the previous placement has {self.previous.slot_table.shape} layers, experts and"
                f" ranks, the load and the slots {shape}; give no previous one"
            )
        home_slots = int(self.pools[~self.is_spare].sum())
        if home_slots < self.shares.size:
            raise PlacementError(
                f"{self.shares.size} experts of all layers need a home and the home ranks have"
                f" {home_slots} slots; give more ranks or more memory"
            )

    @cached_property
    def is_spare(self) -> np.ndarray:
        """Which ranks hold replicas only: bool [W]."""
        return np.arange(len(self.pools)) >= len(self.pools) - self.num_spares

    @cached_property
    def takes_replicas(self) -> np.ndarray:
        """Which ranks replicas may go to: bool [W]."""
        return self.is_spare if self.num_spares else ~self.is_spare

    @cached_property
    def num_replica_slots(self) -> int:
        """Slots of the ranks that replicas may go to; without spares the homes need some."""
        return int(self.pools[self.takes_replicas].sum())

    @cached_property
    def held_before(self) -> np.ndarray:
        """Who held what: bool [L, E, W]."""
        if self.previous is None:
            return np.zeros((*self.shares.shape, len(self.pools)), dtype=bool)
        return self.previous.slot_table >= 0

    @cached_property
    def homes_before(self) -> np.ndarray:
        """The homes until now: int32 [L, E]."""
        if self.previous is None:
            return np.zeros(self.shares.shape, dtype=np.int32)
        return self.previous.homes

    @cached_property
    def fits_before(self) -> bool:
        """Whether the previous placement is possible on these ranks."""
        if self.previous is None:
            return False
        replicas = self.held_before.copy()
        np.put_along_axis(replicas, self.homes_before[:, :, None].astype(np.int64), False, axis=2)
        num_used = self.previous.slot_table.max(axis=(0, 1)) + 1
        return bool(
            (num_used <= self.pools).all()
            and not self.is_spare[self.homes_before].any()
            and not replicas[:, :, ~self.takes_replicas].any()
        )

    def rank_loads(self, loads: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """What experts of these loads [L, E] on these ranks [L, E] cost them: float64 [L, W]."""
        carried = np.zeros((len(loads), len(self.pools)))
        np.add.at(carried, (np.arange(len(loads))[:, None], ranks), loads)
        return np.asarray(carried / self.rank_speeds)

    def placement(self, held: np.ndarray, homes: np.ndarray) -> Placement:
        """Copies bool [L, E, W] with slot numbers: one that stays keeps its own."""
        slot_table = np.full(held.shape, -1, dtype=np.int32)
        if self.previous is not None:
            stays = held & self.held_before & (self.previous.slot_table < self.pools)
            slot_table[stays] = self.previous.slot_table[stays]
        for rank in range(len(self.pools)):
            self._number(slot_table[:, :, rank], held[:, :, rank], rank)
        kinds: tuple[RankKind, ...] = tuple("spare" if spare else "home" for spare in self.is_spare)
        epoch = 0 if self.previous is None else self.previous.epoch + 1
        return Placement(slot_table, homes, kinds, epoch)

    def _number(self, slots: np.ndarray, held: np.ndarray, rank: int) -> None:
        """Slots [L, E] for what is new on a rank; first those that held nothing before."""
        new = held & (slots < 0)
        is_free = np.ones(int(self.pools[rank]), dtype=bool)
        is_free[slots[slots >= 0]] = False
        free = np.flatnonzero(is_free)
        if self.previous is not None:
            was_used = np.isin(free, self.previous.slot_table[:, :, rank])
            free = np.concatenate((free[~was_used], free[was_used]))
        slots[new] = free[: int(new.sum())]


def _shares(load: np.ndarray) -> np.ndarray:
    """Each expert's share of its layer's load; an idle one counts a little, it may wake up."""
    if load.ndim != 2 or not load.size:
        raise PlacementError(f"the load has shape {load.shape}; give [layers, experts]")
    load = np.asarray(load, dtype=np.float64)
    if not np.isfinite(load).all() or (load < 0).any():
        raise PlacementError("a load is negative or no number; give counts of tokens")
    mean = load.mean(axis=1, keepdims=True)
    load = np.where(mean > 0, load + _LEAST_SHARE_OF_MEAN * mean, 1.0)
    return np.asarray(load / load.sum(axis=1, keepdims=True))
