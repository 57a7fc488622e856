"""Which card each rank gets, and how much of its memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.config import LaunchConfig
from lightmoe.errors import MachineError
from lightmoe.machine import Driver, Gpu
from lightmoe.worker.devices import card_of_rank, gpu_bytes_per_rank

GIB = 1 << 30


def driver(*free_gib: int) -> Driver:
    """Cards with so much free memory."""
    return Driver(
        version="580.65.06",
        gpus=tuple(
            Gpu(name="card", compute_capability=(9, 0), memory_bytes=99 * GIB, free_bytes=gib * GIB)
            for gib in free_gib
        ),
    )


def config(**values: object) -> LaunchConfig:
    return LaunchConfig(**{"model": "mixtral-lite", "gpus": 1} | values)


@given(num_ranks=st.integers(1, 64), num_cards=st.integers(1, 16))
def test_ranks_are_spread_evenly_and_in_order(num_ranks: int, num_cards: int) -> None:
    cards = [card_of_rank(rank, num_ranks, num_cards) for rank in range(num_ranks)]

    assert cards == sorted(cards)
    on_each = Counter(cards)
    assert len(on_each) == min(num_ranks, num_cards)
    assert max(on_each) < num_cards
    assert max(on_each.values()) - min(on_each.values()) <= 1


def test_a_rank_alone_on_its_card_gets_the_share_that_was_asked_for() -> None:
    assert gpu_bytes_per_rank(config(), (0,), driver(10)) == 9 * GIB
    half = config(gpu_memory_utilization=0.5)
    assert gpu_bytes_per_rank(half, (0, 1), driver(10, 10)) == 5 * GIB


def test_the_fullest_card_decides_for_all() -> None:
    assert gpu_bytes_per_rank(config(gpus=3), (0, 1, 2), driver(80, 20, 80)) == 18 * GIB


def test_ranks_that_share_a_card_share_its_memory() -> None:
    cards = tuple(card_of_rank(rank, 10, 1) for rank in range(10))

    share = gpu_bytes_per_rank(config(gpus=10, oversubscribe=True), cards, driver(80))

    assert share == int(80 * GIB * 0.9) // 10 - GIB


def test_ranks_that_do_not_fit_a_card_are_refused() -> None:
    with pytest.raises(MachineError, match=r"GPU 0 has 9\.0 GiB for 10 ranks"):
        gpu_bytes_per_rank(config(gpus=10, oversubscribe=True), (0,) * 10, driver(10))
