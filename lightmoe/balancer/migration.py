"""From one placement to the next, one expert's blob at a time; every expert has a live copy always.

A copy is written into a slot that no placement names, and named only once its rank has said that
the last byte is there. A copy goes only while another one is live and nothing reads it. So a
migration may end at any step: what is in force serves.

It cannot get stuck if the goal leaves every rank a free slot. Take the ranks that are full and have
no copy that may go: each copy too many there is the last one of its expert, and if it cannot move,
all its goals are among these ranks. So there would be at most as many copies too many on them as
copies missing; but a full rank has at least one more of the former than of the latter.

Shapes: L layers, E experts, W ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightmoe.core import HOST_COPY, Piece, SlotChange
from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement


@dataclass(slots=True)
class Transfer:
    """One copy on its way; `num_sent` bytes of it have been ordered."""

    number: int
    layer: int
    expert: int
    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int
    num_sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What moving takes: bytes of one expert, bytes that a rank may send or get in one step."""

    expert_bytes: int
    bytes_per_step: int
    from_host: bool = False


class Migration:
    """The state of one migration. `orders` once a step, `arrived` with what ranks have said.

    `num_slots` [W] are the ranks' whole pools; `load` [L, E] puts hot experts first. Of the goal it
    matters who holds what and which copies are homes, not the slots' numbers. `transfers_before` is
    the number of the first transfer, so that no two of a server's life share one.
    """

    def __init__(
        self,
        start: Placement,
        goal: Placement,
        num_slots: Sequence[int],
        costs: Costs,
        load: np.ndarray | None = None,
        transfers_before: int = 0,
    ) -> None:
        self._costs = costs
        self._slots = start.slot_table.copy()
        self._homes = start.homes.copy()
        self._goal_homes = goal.homes
        self._wanted = goal.slot_table >= 0
        held = self._slots >= 0
        self._live = _pairs(held)
        self._missing = _pairs(self._wanted & ~held)
        self._leftover = _pairs(held & ~self._wanted)
        order = np.zeros(self._homes.shape) if load is None else -np.asarray(load, dtype=np.float64)
        hot_first = sorted(self._missing, key=lambda pair: (order[pair], pair))
        ranks = range(start.num_ranks)
        self._queues = [[pair for pair in hot_first if r in self._missing[pair]] for r in ranks]
        self._leaving = [
            dict.fromkeys(pair for pair in self._leftover if r in self._leftover[pair])
            for r in ranks
        ]
        self._free = [_free_slots(start, rank, count) for rank, count in enumerate(num_slots)]
        self._under_way: dict[int, Transfer] = {}
        self._landed: list[Transfer] = []
        self._next_number = transfers_before
        self._check_room(num_slots)
        self.num_copies = sum(map(len, self._queues))

    @property
    def is_done(self) -> bool:
        """Whether the goal is in force."""
        return not (self._missing or self._leftover) and np.array_equal(
            self._homes, self._goal_homes
        )

    @property
    def num_transfers(self) -> int:
        """The number that the next transfer would get."""
        return self._next_number

    def arrived(self, transfers: Iterable[int]) -> None:
        """Ranks have said that these are in their slots; numbers of others are not ours."""
        for number in transfers:
            transfer = self._under_way.pop(number, None)
            if transfer is not None:
                self._landed.append(transfer)

    def orders(self) -> tuple[tuple[SlotChange, ...], tuple[Piece, ...]]:
        """What changes at the begin of the next step, and the pieces that travel beside it.

        PlacementError if nothing can go on: the goal needs slots that there are not.
        """
        changes = list(self._land())
        changes += self._make_room()
        self._start_transfers()
        if not self._missing:
            changes += self._finish()
        elif not self._under_way and not changes:
            raise PlacementError(
                f"{sum(map(len, self._queues))} copies of experts find no slot;"
                " give more --free-slots"
            )
        return tuple(changes), tuple(self._pieces())

    def _land(self) -> Iterator[SlotChange]:
        """The copies that have come are named; each lets one copy of its expert go, if any must."""
        for transfer in self._landed:
            pair, rank = (transfer.layer, transfer.expert), transfer.target_rank
            self._slots[*pair, rank] = transfer.target_slot
            self._live[pair].add(rank)
            yield self._change(pair, rank, is_home=self._goal_homes[pair] == rank)
            _discard(self._missing, pair, rank)
            leaving = sorted(self._leftover.get(pair, ()))
            for other in leaving if pair not in self._missing else leaving[:1]:
                if self._may_go(pair, other):
                    yield from self._drop(pair, other)
        self._landed = []

    def _make_room(self) -> Iterator[SlotChange]:
        """A rank without a free slot that still gets copies lets one go."""
        for rank, queue in enumerate(self._queues):
            if queue and not self._free[rank]:
                pair = self._may_leave(rank)
                if pair is not None:
                    yield from self._drop(pair, rank)

    def _finish(self) -> Iterator[SlotChange]:
        """All copies are there: what is too many goes, and homes are called homes."""
        for pair in zip(*np.nonzero(self._homes != self._goal_homes), strict=True):
            yield self._change(pair, int(self._goal_homes[pair]), is_home=True)
        for pair, ranks in list(self._leftover.items()):
            for rank in sorted(ranks):
                yield from self._drop(pair, rank)

    def _change(self, pair: tuple[int, int], rank: int, is_home: bool) -> SlotChange:
        if is_home:
            self._homes[pair] = rank
        layer, expert = (int(index) for index in pair)
        return SlotChange(layer, expert, int(rank), int(self._slots[*pair, rank]), bool(is_home))

    def _drop(self, pair: tuple[int, int], rank: int) -> Iterator[SlotChange]:
        slot = int(self._slots[*pair, rank])
        self._slots[*pair, rank] = -1
        self._live[pair].discard(rank)
        _discard(self._leftover, pair, rank)
        del self._leaving[rank][pair]
        heapq.heappush(self._free[rank], slot)
        if self._homes[pair] == rank:
            others = self._live[pair]
            goal = int(self._goal_homes[pair])
            yield self._change(pair, goal if goal in others else min(others), is_home=True)
        yield SlotChange(int(pair[0]), int(pair[1]), rank, -1)

    def _may_go(self, pair: tuple[int, int], rank: int) -> bool:
        return len(self._live[pair]) > 1 and not any(
            (one.layer, one.expert, one.source_rank) == (*pair, rank)
            for one in self._under_way.values()
        )

    def _may_leave(self, rank: int) -> tuple[int, int] | None:
        """A copy on that rank which the goal does not have, and which may go now."""
        return next((pair for pair in self._leaving[rank] if self._may_go(pair, rank)), None)

    def _start_transfers(self) -> None:
        """As many as have ranks that are idle: one transfer to a rank, one from a rank."""
        targets = {transfer.target_rank for transfer in self._under_way.values()}
        busy = {transfer.source_rank for transfer in self._under_way.values()}
        for rank, queue in enumerate(self._queues):
            if queue and self._free[rank] and rank not in targets:
                self._start_one(rank, queue, busy)

    def _start_one(self, rank: int, queue: list[tuple[int, int]], busy: set[int]) -> None:
        """The hottest expert that has a source which is not busy, to that rank."""
        for pair in queue:
            source = self._source(pair, busy)
            if source is not None:
                busy.add(source[0])
                queue.remove(pair)
                slot = heapq.heappop(self._free[rank])
                transfer = Transfer(self._next_number, *pair, *source, rank, slot)
                self._under_way[self._next_number] = transfer
                self._next_number += 1
                return

    def _source(self, pair: tuple[int, int], busy: set[int]) -> tuple[int, int] | None:
        """The host's copy, or a live one whose rank sends nothing else now; the home first."""
        if self._costs.from_host:
            return HOST_COPY, -1
        idle = self._live[pair] - busy
        if not idle:
            return None
        home = int(self._homes[pair])
        rank = home if home in idle else min(idle)
        return rank, int(self._slots[*pair, rank])

    def _pieces(self) -> Iterator[Piece]:
        size = self._costs.expert_bytes
        for transfer in self._under_way.values():
            begin = transfer.num_sent
            if begin == size:
                continue
            end = transfer.num_sent = min(size, begin + self._costs.bytes_per_step)
            yield Piece(
                transfer.number,
                transfer.layer,
                transfer.expert,
                transfer.source_rank,
                transfer.source_slot,
                transfer.target_rank,
                transfer.target_slot,
                begin,
                end,
                end == size,
            )

    def _check_room(self, num_slots: Sequence[int]) -> None:
        for rank, count in enumerate(num_slots):
            wanted = int(self._wanted[:, :, rank].sum())
            if wanted > count:
                raise PlacementError(f"rank {rank} has {count} slots; {wanted} experts do not fit")


def _pairs(which: np.ndarray) -> dict[tuple[int, int], set[int]]:
    """Where `which` [L, E, W] is true: the ranks of each (layer, expert)."""
    pairs: dict[tuple[int, int], set[int]] = {}
    for layer, expert, rank in np.argwhere(which).tolist():
        pairs.setdefault((layer, expert), set()).add(rank)
    return pairs


def _discard(pairs: dict[tuple[int, int], set[int]], pair: tuple[int, int], rank: int) -> None:
    pairs[pair].discard(rank)
    if not pairs[pair]:
        del pairs[pair]


def _free_slots(placement: Placement, rank: int, count: int) -> list[int]:
    used = {slot for _, _, slot in placement.hosted(rank)}
    return [slot for slot in range(count) if slot not in used]
