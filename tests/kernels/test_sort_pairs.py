"""Pairs sorted by expert, and the table of tiles that the products follow."""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe import kernels
from lightmoe.kernels.sort_pairs import TOKENS_PER_TILE
from tests.kernels.layouts.host import compile_library
from tests.kernels.rows import random_rows

wrapper: Any = sys.modules["lightmoe.kernels.sort_pairs"]
"""The module: in the package its name is the operator's."""

MOST_PAIRS = 256 * 0x7FFF + 1
"""More than kMaxCtas x kMaxCount of the kernels."""


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_experts=st.integers(1, 12),
    num_per_token=st.integers(1, 3),
    num_tokens=st.integers(0, 40),
    tokens_per_tile=st.sampled_from([1, 8, 16, 24]),
    seed=st.integers(0, 1000),
)
def test_pairs_lie_by_expert_then_token_and_tiles_cover_them(
    num_experts: int, num_per_token: int, num_tokens: int, tokens_per_tile: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, min(num_per_token, num_experts))
    experts = torch.randint(num_experts, shape, generator=generator)
    slots = torch.randperm(num_experts, generator=generator).int()

    groups, pair_row, pair_index = kernels.sort_pairs(experts, num_experts, slots, tokens_per_tile)

    wanted = sorted(
        (expert, token, k)
        for token, row in enumerate(experts.tolist())
        for k, expert in enumerate(row)
    )
    assert pair_row.tolist() == [token for _, token, _ in wanted]
    places = {pair[1:]: place for place, pair in enumerate(wanted)}
    for token, row in enumerate(pair_index.tolist()):
        assert row == [places[token, k] for k in range(shape[1])]
    assert groups.num_pairs == len(wanted)
    assert torch.equal(groups.slots, slots)
    offsets, tile_offsets = groups.offsets.tolist(), groups.tile_offsets.tolist()
    counts = [sum(pair[0] == expert for pair in wanted) for expert in range(num_experts)]
    assert [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)] == counts
    tiles = [-(-count // tokens_per_tile) for count in counts]
    assert [
        end - first for first, end in zip(tile_offsets, tile_offsets[1:], strict=False)
    ] == tiles
    wanted_groups = [expert for expert, count in enumerate(tiles) for _ in range(count)]
    assert groups.tile_groups.tolist()[: sum(tiles)] == wanted_groups
    integers = (pair_row, pair_index, groups.offsets, groups.tile_offsets, groups.tile_groups)
    assert {tensor.dtype for tensor in integers} == {torch.int32}


CHUNKS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def spans_of(counts: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(counts=CHUNKS, num_experts=st.integers(2, 12), seed=st.integers(0, 1000))
def test_chunks_are_sorted_each_by_itself(counts: list[int], num_experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(num_experts, (sum(counts), 2), generator=generator)
    slots = torch.arange(num_experts, dtype=torch.int32)

    offsets, pair_index = kernels.sort_chunks(experts, num_experts, spans_of(counts))

    for chunk, span in enumerate(spans_of(counts)):
        groups, _, index = kernels.sort_pairs(experts[span], num_experts, slots, 16)
        assert torch.equal(offsets[chunk], groups.offsets)
        assert torch.equal(pair_index[span], index)


class SortingLibrary:
    """Sorts pairs where a launch says, in memory of the host."""

    def launch(self, stem: str, device: torch.device, **given: Any) -> None:
        """Run it now."""
        pair_row, index, weight, offsets, counts, tile_offsets, tile_groups, *sizes = given["sort"]
        assert (stem, weight, counts) == ("sort_pairs", 0, 0)
        _, _, tokens_per_tile, num_tokens, num_experts, per_token = sizes
        num_pairs = num_tokens * per_token
        experts = integers_at(given["experts"], num_pairs).view(num_tokens, per_token)
        slots = torch.arange(num_experts, dtype=torch.int32)
        groups, rows, places = kernels.sort_pairs(experts, num_experts, slots, tokens_per_tile)
        most_tiles = num_pairs // tokens_per_tile + min(num_experts, num_pairs)
        integers_at(tile_groups, most_tiles).fill_(-1)
        for address, made in (
            (pair_row, rows),
            (index, places),
            (offsets, groups.offsets),
            (tile_offsets, groups.tile_offsets),
        ):
            integers_at(address, made.numel()).copy_(made.flatten())


def integers_at(address: int, count: int) -> torch.Tensor:
    """Integers in memory of the host."""
    if not count:
        return torch.empty(0, dtype=torch.int32)
    return torch.frombuffer((ctypes.c_int * count).from_address(address), dtype=torch.int32)


@pytest.mark.parametrize("counts", [[7], [3, 0, 5], [0, 4], [200, 131]], ids=str)
def test_each_chunk_has_its_place_in_the_memory_of_all(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapper, "library", SortingLibrary)
    monkeypatch.setattr(wrapper, "require_cuda", lambda *_, **__: None)
    monkeypatch.setattr(wrapper, "workspace_of", lambda _: torch.zeros(16, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(3)
    experts = torch.randint(9, (sum(counts), 3), generator=generator, dtype=torch.int32)

    offsets, pair_index = wrapper.sort_chunks(experts, 9, spans_of(counts))

    wanted = kernels.sort_chunks(experts, 9, spans_of(counts))
    assert torch.equal(offsets, wanted[0])
    assert torch.equal(pair_index, wanted[1])


def test_the_kernels_count_tiles_of_any_size_without_a_division(tmp_path: Path) -> None:
    library = compile_library("tile_counts.cpp", tmp_path)
    library.is_tile.restype = bool

    assert [n for n in range(-8, 600) if library.is_tile(n)] == list(TOKENS_PER_TILE)
    for tokens_per_tile in TOKENS_PER_TILE:
        assert library.first_wrong(tokens_per_tile, 70_000, 1) == -1
        assert library.first_wrong(tokens_per_tile, MOST_PAIRS, 61) == -1


def test_routing_is_the_choice_and_its_sort() -> None:
    hidden, router = random_rows(20, 24), random_rows(7, 24, seed=1)
    slots = torch.arange(7, dtype=torch.int32).flip(0)

    experts, weights, groups, pair_row, pair_index = kernels.route_tokens(
        hidden, router, 3, slots=slots, tokens_per_tile=8, renormalize=True, scale=2.0
    )

    wanted = kernels.topk_gate(hidden, router, 3, renormalize=True, scale=2.0)
    assert torch.equal(experts, wanted[0])
    assert torch.equal(weights, wanted[1])
    sorted_groups, *indices = kernels.sort_pairs(experts, 7, slots, 8)
    assert torch.equal(pair_row, indices[0])
    assert torch.equal(pair_index, indices[1])
    assert torch.equal(groups.offsets, sorted_groups.offsets)
    assert torch.equal(groups.slots, slots)


def test_groups_of_equal_size_are_a_product_a_head() -> None:
    weights = random_rows(3 * 8, 12).view(3, 8, 12)
    rows = random_rows(3 * 5, 12, seed=1)

    groups = kernels.equal_groups(weights, 5)

    product = kernels.grouped_gemm(rows, weights, groups)
    for head in range(3):
        mine = slice(5 * head, 5 * head + 5)
        assert torch.equal(product[mine], kernels.matmul(rows[mine], weights[head]))
    tokens = groups.tokens_per_tile
    assert groups.tile_groups.tolist() == [g for g in range(3) for _ in range(-(-5 // tokens))]
    assert groups.tile_offsets.tolist() == [g * -(-5 // tokens) for g in range(4)]
