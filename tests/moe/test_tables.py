"""The tables follow the placement in place, and a changed placement is checked like any other."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import SlotChange
from lightmoe.errors import PlacementError
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.placement import Placement
from lightmoe.moe.tables import PlacementTables, _Staging
from tests.moe.cases import placement_of, random_copies

CPU = torch.device("cpu")


def random_placement(seed: int, num_experts: int = 6, num_ranks: int = 5) -> Placement:
    generator = np.random.default_rng(seed)
    copies = [random_copies(generator, num_experts, num_ranks, 7) for _ in range(3)]
    return placement_of(copies, num_ranks)


@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32), min_size=2, max_size=4), rank=st.integers(0, 4))
def test_adopting_changes_the_same_tensors_to_what_new_ones_would_be(
    seeds: list[int], rank: int
) -> None:
    group = ExpertGroup(rank, random_placement(seeds[0]), None, "even", np.zeros(3, np.int64))
    tables = group.tables_on(CPU)
    places = tables.copy_ranks.data_ptr(), tables.slots.data_ptr()

    for seed in seeds[1:]:
        placement = random_placement(seed)
        group.adopt(placement)

        fresh = PlacementTables(placement, rank, CPU)
        assert group.placement is tables.placement is placement
        assert group.tables_on(CPU) is tables
        assert torch.equal(tables.copy_ranks, fresh.copy_ranks)
        assert torch.equal(tables.slots, fresh.slots)
        assert tables.num_held == fresh.num_held
        assert tables.copies == list(placement.copies)
    assert (tables.copy_ranks.data_ptr(), tables.slots.data_ptr()) == places


def test_rows_are_home_first_and_padded() -> None:
    tables = PlacementTables(placement_of([[[2, 0], [1]]], 3), 0, CPU)

    assert tables.copy_ranks.tolist() == [[[2, 0, -1], [1, -1, -1]]]
    assert tables.slots.tolist() == [[0, -1]]
    assert (tables.copy_ranks.dtype, tables.slots.dtype) == (torch.int32, torch.int32)


def test_a_group_that_adopts_before_anyone_asks_has_the_new_tables() -> None:
    group = ExpertGroup(0, random_placement(1), None, "even", np.zeros(3, np.int64))
    group.adopt(random_placement(2))

    assert group.tables_on(CPU).copies == list(random_placement(2).copies)


def test_changes_make_the_next_epoch() -> None:
    start = placement_of([[[0], [1]]], 2)

    then = start.changed([SlotChange(0, 0, 1, 3, True), SlotChange(0, 0, 0, -1)], 1)

    assert then.copies == (((1,), (1,)),)
    assert then.slot_table[0, 0].tolist() == [-1, 3]
    assert (start.epoch, then.epoch) == (0, 1)
    assert start.copies == (((0,), (1,)),)


@pytest.mark.parametrize(
    ("changes", "epoch", "message"),
    [
        ([], 2, "epoch 2 does not follow epoch 0"),
        ([SlotChange(0, 0, 0, -1)], 1, "expert 0 of layer 0 has no slot on its home rank"),
        ([SlotChange(0, 0, 1, 0)], 1, "two experts share a slot on rank 1"),
        ([SlotChange(0, 0, 1, -1, True)], 1, "expert 0 of layer 0 has no slot on its home rank"),
    ],
)
def test_what_would_lose_an_expert_is_refused(
    changes: list[SlotChange], epoch: int, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        placement_of([[[0], [1]]], 2).changed(changes, epoch)


def test_staged_numbers_wait_for_those_that_had_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[mock.Mock] = []

    def new_event() -> mock.Mock:
        events.append(mock.Mock())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", new_event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    staging, cpu = _Staging(), torch.device("cpu")

    for number in range(2 * len(events) + 1):
        values = torch.arange(12, dtype=torch.int32).view(3, 4) + number
        assert torch.equal(staging.send(values, cpu), values)
        one = events[number % len(events)]
        assert [call[0] for call in one.method_calls[-2:]] == ["synchronize", "record"]

    assert all(one.record.call_count >= 2 for one in events)
