"""Experts that take turns in slots: what a layer needs is there while it runs, in any case."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import HostTierCounts
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.residency import Key, Residency, SlotCache
from lightmoe.moe.tables import PlacementTables

NUM_LAYERS, NUM_EXPERTS = 3, 5
ELEMENTS = 64
BLOB_BYTES = ELEMENTS * 4


class Slow(Residency):
    """Its copies take random times, with the slot half written for as long."""

    pace: random.Random | None = None

    def _copy(self, slot: int, row: int, free: torch.cuda.Event | None) -> None:
        if self.pace is not None:
            self._blobs[slot].fill_(-1.0)
            time.sleep(self.pace.choice((0.0, 0.0005, 0.002)))
        super()._copy(slot, row, free)


def new_residency(num_slots: int, num_ranks: int = 1, rank: int = 0) -> tuple[Slow, Tables]:
    placement = initial_placement(NUM_LAYERS, NUM_EXPERTS, num_ranks)
    rows = placement.slot_table[:, :, rank]
    tables = PlacementTables(placement, rank, torch.device("cpu"))
    num_held = int((rows >= 0).sum())
    host = torch.arange(1, num_held + 1).float()[:, None].expand(-1, ELEMENTS).contiguous()
    blobs = torch.zeros(num_slots, ELEMENTS)
    return Slow(blobs, host, rows, tables), (rows, tables, blobs)


Tables = tuple[np.ndarray, PlacementTables, torch.Tensor]

choices = st.lists(st.integers(-1, NUM_EXPERTS - 1), max_size=4)


def check(layer: int, needed: set[int], there: Tables) -> None:
    """Each expert that the layer needs is whole in a slot of its own, where the table says."""
    rows, tables, blobs = there
    slots = {expert: int(tables.slots[layer, expert]) for expert in needed}
    assert len(set(slots.values())) == len(needed)
    for expert, slot in slots.items():
        assert slot >= 0
        assert blobs[slot].eq(float(rows[layer, expert] + 1)).all(), (layer, expert)


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.lists(st.tuples(choices, choices), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
        min_size=1,
        max_size=8,
    ),
    spare_slots=st.integers(0, 6),
    ranks=st.sampled_from([(1, 0), (2, 0), (2, 1)]),
    seed=st.integers(0, 9),
)
def test_what_a_layer_needs_is_there_until_it_has_run(
    steps: list[list[tuple[list[int], list[int]]]],
    spare_slots: int,
    ranks: tuple[int, int],
    seed: int,
) -> None:
    """Right and wrong guesses, with copies that are late, and as few slots as may be."""
    num_ranks, rank = ranks
    num_slots = -(-NUM_EXPERTS // num_ranks) + spare_slots
    residency, there = new_residency(num_slots, num_ranks, rank)
    residency.pace = random.Random(seed)
    held = there[0] >= 0
    num_needed, told = 0, HostTierCounts()
    for step in steps:
        for layer, (chosen, guessed) in enumerate(step):
            width = max(len(chosen), len(guessed), 1)
            columns = [part + [-1] * (width - len(part)) for part in (chosen, guessed)]
            residency.enter(layer, torch.tensor([columns[0] + columns[1]]), width)
            needed = {expert for expert in chosen if expert >= 0 and held[layer, expert]}
            num_needed += len(needed)
            check(layer, needed, there)
            time.sleep(0.0005)  # the layer runs, and what was guessed arrives beside it
            check(layer, needed, there)
        told += residency.take_counts()
    assert told.num_hits + told.num_misses == num_needed
    assert told.num_prefetched <= told.num_hits
    assert told.fetched_bytes % BLOB_BYTES == 0
    assert told.num_misses * BLOB_BYTES <= told.fetched_bytes


keys = st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1))


@given(
    num_slots=st.integers(1, 6),
    asked=st.lists(st.tuples(keys, st.sets(keys, max_size=4), st.booleans()), max_size=40),
)
def test_a_slot_has_one_expert_and_none_that_is_kept_goes(
    num_slots: int, asked: list[tuple[Key, set[Key], bool]]
) -> None:
    cache = SlotCache(num_slots, NUM_LAYERS)
    there: dict[Key, int] = {}
    for key, keep, takes_back in asked:
        if key in there:
            cache.use([key])
            continue
        before = dict(there)
        found, displaced = cache.put(key, key[0], keep)
        assert found == (len(there) < num_slots or not there.keys() <= keep)
        if not found:
            continue
        assert (displaced is None) == (len(before) < num_slots)
        if displaced is not None:
            assert displaced not in keep
            assert cache.slot(key) == there.pop(displaced)
        there[key] = cache.slot(key)
        if takes_back:
            cache.put_back(key, displaced)
            there = before
        assert len(set(there.values())) == len(there) <= num_slots
        assert all(cache.slot(one) == slot for one, slot in there.items())


def test_who_goes_is_of_the_layer_that_is_furthest_ahead() -> None:
    cache = SlotCache(4, 3)
    for key in ((0, 0), (0, 1), (1, 0), (2, 0)):
        cache.put(key, 0, ())
        cache.use([key])
    cache.use([(0, 0)])

    # While layer 1 runs, layer 2 comes next, then 0, then 1 again: of 1 there is nobody to go.
    displaced = [cache.put((2, number), 1, {(1, 0)})[1] for number in (1, 2)]

    assert displaced == [(0, 1), (0, 0)]


def enter(residency: Residency, layer: int, chosen: Sequence[int], guessed: Sequence[int]) -> None:
    residency.enter(layer, torch.tensor([[*chosen, *guessed]]), len(chosen))


def arrived(residency: Residency) -> None:
    residency._settle(wait=True)


def test_hits_misses_and_what_was_fetched_ahead() -> None:
    residency, _ = new_residency(num_slots=6)
    enter(residency, 0, [0, 1], [2, 3])
    arrived(residency)
    assert residency.take_counts().num_misses == 2
    enter(residency, 1, [2, 4], [0, 0])
    arrived(residency)

    counts = residency.take_counts()
    assert (counts.num_hits, counts.num_prefetched, counts.num_misses) == (1, 1, 1)
    assert counts.fetched_bytes == 2 * BLOB_BYTES  # the miss, and the guess for layer 2
    assert counts.waited_seconds > 0
    enter(residency, 2, [0, 0], [])
    arrived(residency)

    # The first layer again, for which there is no gate: what it needed in the step before is there.
    residency.take_counts()
    enter(residency, 0, [0, 1], [2, 3])
    again = residency.take_counts()
    assert (again.num_hits, again.num_misses) == (2, 0)
    assert again.hit_rate == 1.0


def test_a_wrong_guess_that_has_not_begun_costs_nobody_a_slot() -> None:
    residency, (rows, _, blobs) = new_residency(num_slots=6)
    for layer in range(2):
        enter(residency, layer, [0, 1, 2], [])
        arrived(residency)
    held_up = threading.Event()
    residency._thread.submit(held_up.wait)
    residency.take_counts()

    enter(residency, 1, [0, 1, 2], [3, 4])
    assert residency._cache.slot((2, 3)) >= 0
    assert [residency._cache.slot((0, expert)) >= 0 for expert in range(3)] == [False, False, True]
    threading.Timer(0.05, held_up.set).start()
    enter(residency, 2, [0, 0], [])
    arrived(residency)

    assert residency._cache.slot((2, 3)) < 0
    assert residency.take_counts().fetched_bytes == BLOB_BYTES
    for expert in range(3):
        slot = residency._cache.slot((0, expert))
        assert slot >= 0
        assert blobs[slot].eq(float(rows[0, expert] + 1)).all()


def test_a_copy_that_nobody_needs_any_more_is_waited_for_where_it_has_the_last_slot() -> None:
    residency, there = new_residency(num_slots=NUM_EXPERTS)
    enter(residency, 1, [0, 1, 2], [])
    arrived(residency)
    begun, held_up, copy = threading.Event(), threading.Event(), residency._copy

    def late(slot: int, row: int, free: torch.cuda.Event | None) -> None:
        if row == there[0][1, 4]:
            begun.set()
            held_up.wait()
        copy(slot, row, free)

    residency._copy = late  # type: ignore[method-assign]
    enter(residency, 0, [0, 0], [4, 4])
    begun.wait()
    enter(residency, 1, [0, 1, 2], [-1, -1, -1])
    threading.Timer(0.05, held_up.set).start()
    enter(residency, 2, [0, 1, 2, 3, 4], [])

    check(2, {0, 1, 2, 3, 4}, there)
    assert residency.take_counts().waited_seconds > 0.02


def test_what_goes_wrong_in_a_copy_is_raised_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    residency, _ = new_residency(num_slots=6)

    def fail(*_: object) -> None:
        raise RuntimeError("the copy failed")

    monkeypatch.setattr(residency, "_copy", fail)
    with pytest.raises(RuntimeError, match="the copy failed"):
        enter(residency, 0, [0, 1], [2, 3])
