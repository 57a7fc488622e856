"""The tile scheduler: every (group, token tile, weight block) once, whatever the groups hold."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.layouts.host import compile_library

BAND_TILES = 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_library("tile_scheduler.cpp", tmp_path_factory.mktemp("tile_scheduler"))


def schedule(library: ctypes.CDLL, tiles: list[int], num_blocks: int) -> list[tuple[int, ...]]:
    """(group, token tile, weight block) of each unit of work, found as work_queue.cuh finds it."""
    tile_offsets = np.cumsum([0, *tiles]).tolist()
    tile_groups = [group for group, count in enumerate(tiles) for _ in range(count)]
    out = (ctypes.c_int * 2)()
    units = []
    for work in range(tile_offsets[-1] * num_blocks):
        group = tile_groups[work // num_blocks]
        first = tile_offsets[group]
        library.tile_work(work - first * num_blocks, tiles[group], num_blocks, out)
        units.append((group, *out))
    return units


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    pairs=st.lists(st.one_of(st.just(0), st.integers(0, 700)), max_size=9),
    tokens_per_tile=st.sampled_from([8, 16, 64, 128]),
    num_blocks=st.integers(1, 12),
)
@example(pairs=[], tokens_per_tile=8, num_blocks=1)
@example(pairs=[0, 0], tokens_per_tile=8, num_blocks=3)
@example(pairs=[0, 16 * 8, 0, 17 * 8, 15 * 8 + 1], tokens_per_tile=8, num_blocks=3)
def test_every_tile_is_visited_once(
    library: ctypes.CDLL, pairs: list[int], tokens_per_tile: int, num_blocks: int
) -> None:
    tiles = [-(-count // tokens_per_tile) for count in pairs]

    units = schedule(library, tiles, num_blocks)

    assert sorted(units) == [
        (group, tile, block)
        for group, count in enumerate(tiles)
        for tile in range(count)
        for block in range(num_blocks)
    ]


def test_a_block_of_weights_is_read_once_in_each_band(library: ctypes.CDLL) -> None:
    units = schedule(library, [BAND_TILES + 3, 2], 4)

    reads = 1 + sum(before[::2] != after[::2] for before, after in pairwise(units))
    assert reads == 4 * 3
    assert max(tile for _, tile, _ in units[: BAND_TILES * 4]) == BAND_TILES - 1
