"""Pairs sorted by expert, and the table of tiles that the products follow."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe import kernels
from lightmoe.kernels.sort_pairs import TOKENS_PER_TILE
from tests.kernels.layouts.host import compile_library
from tests.kernels.rows import random_rows

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
