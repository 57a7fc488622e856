"""Placements: nothing has to divide anything, and what cannot be is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.errors import PlacementError
from lightmoe.moe.placement import Placement, initial_placement
from tests.moe.cases import placement_of


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    num_layers=st.integers(1, 4),
    num_experts=st.integers(1, 40),
    num_ranks=st.integers(1, 13),
    num_spares=st.integers(0, 5),
    replicas_per_layer=st.integers(0, 60),
)
def test_any_numbers_give_a_sound_placement(
    num_layers: int, num_experts: int, num_ranks: int, num_spares: int, replicas_per_layer: int
) -> None:
    num_spares = min(num_spares, num_ranks - 1)
    num_homes = num_ranks - num_spares

    placement = initial_placement(
        num_layers,
        num_experts,
        num_ranks,
        num_spares=num_spares,
        replicas_per_layer=replicas_per_layer,
    )

    assert (placement.num_layers, placement.num_experts, placement.num_ranks) == (
        num_layers,
        num_experts,
        num_ranks,
    )
    assert placement.rank_kinds == ("home",) * num_homes + ("spare",) * num_spares
    most_replicas = num_experts * (num_spares or num_homes - 1)
    for layer, copies in enumerate(placement.copies):
        homes = [ranks[0] for ranks in copies]
        assert homes == placement.homes[layer].tolist()
        assert max(homes) < num_homes
        per_home = np.bincount(homes, minlength=num_homes)
        assert per_home.max() - per_home.min() <= 1
        assert sum(len(ranks) - 1 for ranks in copies) == min(replicas_per_layer, most_replicas)
        sizes = sorted(len(ranks) for ranks in copies)
        assert sizes[-1] - sizes[0] <= 1
        if num_spares:
            assert all(rank >= num_homes for ranks in copies for rank in ranks[1:])
    if num_spares or not replicas_per_layer:  # else replicas count too when ranks are levelled
        homes_in_all = np.bincount(placement.homes.ravel(), minlength=num_homes)
        assert homes_in_all.max() - homes_in_all.min() <= 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 11), st.integers(0, 3), st.integers(0, 40)
)
def test_slots_have_no_holes_and_one_expert_each(
    num_layers: int, num_experts: int, num_ranks: int, num_spares: int, replicas: int
) -> None:
    placement = initial_placement(
        num_layers,
        num_experts,
        num_ranks,
        num_spares=min(num_spares, num_ranks - 1),
        replicas_per_layer=replicas,
    )

    for rank in range(num_ranks):
        hosted = list(placement.hosted(rank))
        assert sorted(slot for _, _, slot in hosted) == list(range(placement.num_slots(rank)))
        assert len({(layer, expert) for layer, expert, _ in hosted}) == len(hosted)
        for layer, expert, _ in hosted:
            assert rank in placement.copies[layer][expert]


def test_the_reference_box_has_eight_homes_and_two_spares() -> None:
    placement = initial_placement(4, 8, 10, num_spares=2, replicas_per_layer=8)

    assert [placement.num_slots(rank) for rank in range(10)] == [4] * 8 + [16] * 2
    assert [ranks[0] for ranks in placement.copies[0]] == list(range(8))
    assert {ranks[1] for ranks in placement.copies[0]} == {8, 9}


def test_numbers_that_divide_nothing() -> None:
    placement = initial_placement(2, 7, 10, num_spares=3, replicas_per_layer=5)

    assert [placement.num_slots(rank) for rank in range(10)] == [2] * 7 + [4, 3, 3]
    assert sum(len(ranks) for ranks in placement.copies[1]) == 7 + 5


def test_more_ranks_than_experts_leaves_ranks_with_nothing() -> None:
    placement = initial_placement(1, 2, 5)

    assert [placement.num_slots(rank) for rank in range(5)] == [1, 1, 0, 0, 0]
    assert list(placement.hosted(4)) == []


def test_a_placement_names_copies_home_first() -> None:
    placement = placement_of([[[2, 0, 1], [1]]], num_ranks=3)

    assert placement.copies == (((2, 0, 1), (1,)),)
    assert placement.epoch == 0


@pytest.mark.parametrize("num_spares", [3, 4])
def test_spares_that_leave_no_home_are_refused(num_spares: int) -> None:
    with pytest.raises(PlacementError, match=f"{num_spares} spares of 3 ranks leave no home"):
        initial_placement(1, 4, 3, num_spares=num_spares)


def test_an_expert_without_a_slot_on_its_home_is_refused() -> None:
    slot_table = np.array([[[0, -1], [-1, 0]]], dtype=np.int32)
    homes = np.array([[0, 0]], dtype=np.int32)

    with pytest.raises(PlacementError, match="expert 1 of layer 0 has no slot on its home rank"):
        Placement(slot_table, homes, ("home", "home"))


def test_two_experts_in_one_slot_are_refused() -> None:
    slot_table = np.array([[[0, -1], [0, -1]]], dtype=np.int32)
    homes = np.zeros((1, 2), dtype=np.int32)

    with pytest.raises(PlacementError, match="two experts share a slot on rank 0"):
        Placement(slot_table, homes, ("home", "home"))
