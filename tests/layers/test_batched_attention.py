"""Attention in groups gives what attention sequence by sequence gives, up to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightmoe.layers.attention import AttendOneByOne, KVCache, view_sequence
from lightmoe.layers.batched_attention import AttendTogether, group_queries
from tests.kernels.rows import random_rows

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_KV_HEADS, NUM_HEADS, WIDTH, NUM_BLOCKS = 8, 2, 6, 16, 20

DECODES = [(12, [3, 7]), (0, [11]), (20, [2, 9, 4]), (15, [8, 13])]
"""(position, blocks) of sequences with one query each."""


def new_cache() -> KVCache:
    """A cache full of rows; block 1 is another request's that came out wrong."""
    cache = KVCache(1, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, WIDTH, WIDTH, torch.float32, CPU)
    for seed, pages in enumerate((cache.keys, cache.values)):
        rows = random_rows(NUM_BLOCKS * BLOCK_SIZE * NUM_KV_HEADS, WIDTH, seed=seed)
        pages[0, :-1] = rows.view(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, WIDTH)
        pages[0, 1] = float("nan")
    return cache


def random_queries(num_tokens: int) -> Tensor:
    return random_rows(num_tokens * NUM_HEADS, WIDTH, seed=5).view(num_tokens, NUM_HEADS, WIDTH)


def one_by_one(cache: KVCache, parts: list[tuple[int, int, list[int]]], query: Tensor) -> Tensor:
    """Over (number of queries, last position, blocks) of each sequence."""
    begin, views = 0, []
    for num_queries, position, blocks in parts:
        end = begin + num_queries
        views.append(view_sequence(begin, end, position + 1, torch.tensor(blocks), torch.float32))
        begin = end
    return AttendOneByOne(tuple(views))(query, cache.keys[0], cache.values[0])


def padded(tables: list[list[int]]) -> Tensor:
    """Block tables padded with the block that holds NaN."""
    longest = max(map(len, tables))
    return torch.tensor([[*table, *[1] * (longest - len(table))] for table in tables])


def test_sequences_that_decode_run_together() -> None:
    cache, query = new_cache(), random_queries(len(DECODES))
    # The page of the last position goes on with rows of nobody.
    cache.keys[0, 7, 5:], cache.values[0, 7, 5:] = float("nan"), float("nan")
    positions = torch.tensor([[position] for position, _ in DECODES])

    group = group_queries(
        slice(0, len(DECODES)), positions, padded([blocks for _, blocks in DECODES]), cache
    )
    attended = AttendTogether((group,))(query, cache.keys[0], cache.values[0])

    wanted = one_by_one(cache, [(1, position, blocks) for position, blocks in DECODES], query)
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 3, 8])
def test_a_piece_of_a_prompt_runs_by_itself_between_others(first: int) -> None:
    cache, query = new_cache(), random_queries(9)
    last = first + 6
    blocks = [5, 10, 6][: last // BLOCK_SIZE + 1]
    groups = (
        group_queries(slice(0, 1), torch.tensor([[12]]), torch.tensor([[3, 7]]), cache),
        group_queries(
            slice(1, 8), torch.arange(first, last + 1)[None], torch.tensor([blocks]), cache
        ),
        group_queries(slice(8, 9), torch.tensor([[2]]), torch.tensor([[14]]), cache),
    )

    attended = AttendTogether(groups)(query, cache.keys[0], cache.values[0])

    wanted = one_by_one(cache, [(1, 12, [3, 7]), (7, last, blocks), (1, 2, [14])], query)
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)


def test_values_may_be_the_keys_and_the_scale_another() -> None:
    cache, query = new_cache(), random_queries(1)
    group = group_queries(slice(0, 1), torch.tensor([[3]]), torch.tensor([[4]]), cache)

    attended = AttendTogether((group,))(query, cache.keys[0], cache.keys[0], scale=0.5)

    past = cache.keys[0, 4, :4]  # [M, KV heads, width]
    for head in range(NUM_HEADS):
        rows = past[:, head // (NUM_HEADS // NUM_KV_HEADS)]
        weights = (0.5 * rows @ query[0, head]).softmax(dim=0)
        torch.testing.assert_close(attended[0, head], weights @ rows, rtol=1e-5, atol=1e-5)
    assert not math.isnan(float(attended.sum()))
