"""Migrations as one sees them from the orders alone: legal at every step, and they end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.balancer.migration import Costs, Migration
from lightmoe.core import HOST_COPY, Piece
from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement
from tests.moe.cases import placement_of, random_copies

EXPERT_BYTES = 10


def random_placement(generator: np.random.Generator, shape: tuple[int, int, int]) -> Placement:
    num_layers, num_experts, num_ranks = shape
    return placement_of(
        [
            random_copies(generator, num_experts, num_ranks, int(generator.integers(8)))
            for _ in range(num_layers)
        ],
        num_ranks,
    )


def holders(placement: Placement) -> np.ndarray:
    return placement.slot_table >= 0


class Ranks:
    """What the ranks' slots hold, as the orders have them: (layer, expert), bytes so far."""

    def __init__(self, placement: Placement, num_slots: list[int]) -> None:
        self.placement = placement
        self.slots: list[list[tuple[int, int] | None]] = [[None] * count for count in num_slots]
        self.num_bytes: dict[tuple[int, int], int] = {}
        for rank in range(placement.num_ranks):
            for layer, expert, slot in placement.hosted(rank):
                self.slots[rank][slot] = (layer, expert)

    def carry(self, piece: Piece, bytes_per_step: int) -> int | None:
        """Do one piece; the transfer's number if it was the last."""
        named = self.placement.slot_table[:, :, piece.target_rank]
        assert not (named == piece.target_slot).any(), "a slot in use was written"
        if piece.source_rank != HOST_COPY:
            source = self.placement.slot_table[piece.layer, piece.expert, piece.source_rank]
            assert source == piece.source_slot >= 0, "the source is no live copy"
        place = (piece.target_rank, piece.target_slot)
        assert piece.begin == (self.num_bytes.get(place, 0) if piece.begin else 0)
        assert 0 < piece.end - piece.begin <= bytes_per_step
        self.num_bytes[place] = piece.end
        self.slots[piece.target_rank][piece.target_slot] = None
        if not piece.is_last:
            return None
        assert piece.end == EXPERT_BYTES
        self.slots[piece.target_rank][piece.target_slot] = (piece.layer, piece.expert)
        return piece.transfer

    def check(self) -> None:
        """Every name leads to a whole expert. That no expert is lost, Placement itself checks."""
        for rank in range(self.placement.num_ranks):
            for layer, expert, slot in self.placement.hosted(rank):
                assert self.slots[rank][slot] == (layer, expert)


def run(
    start: Placement,
    goal: Placement,
    num_slots: list[int],
    generator: np.random.Generator,
    bytes_per_step: int,
    from_host: bool = False,
    stop_after: int = 10_000,
) -> tuple[Placement, int]:
    """Step until done, arrivals late by chance; the placement reached and the copies moved."""
    costs = Costs(expert_bytes=EXPERT_BYTES, bytes_per_step=bytes_per_step, from_host=from_host)
    migration = Migration(start, goal, num_slots, costs)
    ranks = Ranks(start, num_slots)
    late: list[int] = []
    num_moved = 0
    for _ in range(stop_after):
        if migration.is_done:
            break
        here = [number for number in late if generator.random() < 0.6]
        late = [number for number in late if number not in here]
        migration.arrived(here)
        changes, pieces = migration.orders()
        if changes:
            ranks.placement = ranks.placement.changed(changes, ranks.placement.epoch + 1)
        for end in ("source_rank", "target_rank"):
            ends = [getattr(piece, end) for piece in pieces if getattr(piece, end) != HOST_COPY]
            assert len(set(ends)) == len(ends), "a rank has more than one piece each way"
        for piece in pieces:
            number = ranks.carry(piece, bytes_per_step)
            if number is not None:
                late.append(number)
                num_moved += 1
        ranks.check()
    else:
        assert stop_after < 10_000, "the migration does not end"
    return ranks.placement, num_moved


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7)),
    num_free=st.integers(1, 2),
    bytes_per_step=st.sampled_from([3, 10, 64]),
    from_host=st.booleans(),
)
def test_a_goal_that_leaves_every_rank_a_free_slot_is_reached(
    seed: int,
    shape: tuple[int, int, int],
    num_free: int,
    bytes_per_step: int,
    from_host: bool,
) -> None:
    generator = np.random.default_rng(seed)
    start, goal = random_placement(generator, shape), random_placement(generator, shape)
    num_slots = [
        max(start.num_slots(rank), goal.num_slots(rank) + num_free) for rank in range(shape[2])
    ]

    reached, num_moved = run(start, goal, num_slots, generator, bytes_per_step, from_host)

    assert np.array_equal(holders(reached), holders(goal))
    assert np.array_equal(reached.homes, goal.homes)
    assert num_moved == (holders(goal) & ~holders(start)).sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_ranks=st.integers(2, 6))
def test_full_ranks_whose_experts_all_change_places_have_one_slot_to_turn_round_in(
    seed: int, num_ranks: int
) -> None:
    generator = np.random.default_rng(seed)
    homes = np.repeat(np.arange(num_ranks), 4)
    start, goal = (
        placement_of([[[int(rank)] for rank in generator.permutation(homes)]], num_ranks)
        for _ in range(2)
    )

    reached, _ = run(start, goal, [5] * num_ranks, generator, EXPERT_BYTES)

    assert np.array_equal(holders(reached), holders(goal))


def full_placement(generator: np.random.Generator, num_ranks: int, num_replicas: int) -> Placement:
    """Two homes and so many replicas on every rank, at random."""
    homes = generator.permutation(np.repeat(np.arange(num_ranks), 2))
    copies = [[int(rank)] for rank in homes]
    for rank in range(num_ranks):
        others = np.flatnonzero(homes != rank)
        for expert in generator.choice(others, num_replicas, replace=False):
            copies[expert].append(rank)
    return placement_of([copies], num_ranks)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), num_ranks=st.integers(2, 5), num_replicas=st.integers(0, 2))
def test_full_ranks_with_replicas_have_one_slot_to_turn_round_in(
    seed: int, num_ranks: int, num_replicas: int
) -> None:
    generator = np.random.default_rng(seed)
    start, goal = (full_placement(generator, num_ranks, num_replicas) for _ in range(2))

    reached, _ = run(start, goal, [2 + num_replicas + 1] * num_ranks, generator, EXPERT_BYTES)

    assert np.array_equal(holders(reached), holders(goal))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), stop_after=st.integers(0, 40))
def test_a_migration_that_stops_anywhere_leaves_a_start_for_another(
    seed: int, stop_after: int
) -> None:
    generator = np.random.default_rng(seed)
    start, middle, goal = (random_placement(generator, (2, 6, 5)) for _ in range(3))
    num_slots = [max(one.num_slots(rank) for one in (start, middle, goal)) + 1 for rank in range(5)]

    stopped, _ = run(start, middle, num_slots, generator, 4, stop_after=stop_after)
    reached, _ = run(stopped, goal, num_slots, generator, 4, from_host=True)

    assert np.array_equal(holders(reached), holders(goal))


def test_hot_experts_come_first() -> None:
    start = placement_of([[[0], [0], [0], [0]]], 2)
    goal = placement_of([[[0, 1], [0, 1], [0, 1], [0, 1]]], 2)
    costs = Costs(expert_bytes=1, bytes_per_step=1)

    migration = Migration(start, goal, [5, 5], costs, load=np.array([[3, 9, 1, 5]]))

    experts = []
    while not migration.is_done:
        _, pieces = migration.orders()
        experts += [piece.expert for piece in pieces]
        migration.arrived([piece.transfer for piece in pieces])
    assert experts == [1, 3, 0, 2]


def test_a_goal_that_does_not_fit_is_refused() -> None:
    start = placement_of([[[0], [0]]], 2)
    goal = placement_of([[[1], [1]]], 2)
    costs = Costs(expert_bytes=1, bytes_per_step=1)

    with pytest.raises(PlacementError, match="rank 1 has 1 slots; 2 experts do not fit"):
        Migration(start, goal, [2, 1], costs)


def test_without_a_slot_to_turn_round_in_two_experts_cannot_change_places() -> None:
    start, goal = placement_of([[[0], [1]]], 2), placement_of([[[1], [0]]], 2)
    migration = Migration(start, goal, [1, 1], Costs(expert_bytes=1, bytes_per_step=1))

    with pytest.raises(PlacementError, match="2 copies of experts find no slot; give more --free"):
        migration.orders()
