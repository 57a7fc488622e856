"""Attention of all sequences together gives what attention one by one gives, up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.layers.attention import AttendOneByOne, KVCache, view_sequence
from lightmoe.layers.batched_attention import AttendTogether
from tests.kernels.rows import random_rows

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_KV_HEADS, NUM_HEADS, WIDTH, NUM_BLOCKS = 8, 2, 6, 16, 20

Part = tuple[int, int, list[int]]
"""How many queries, the position of the last one, and blocks of a sequence."""

DECODES: list[Part] = [(1, 12, [3, 7]), (1, 0, [11]), (1, 20, [2, 9, 4]), (1, 15, [8, 13])]


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


def one_by_one(parts: list[Part]) -> AttendOneByOne:
    begin, views = 0, []
    for num_queries, position, blocks in parts:
        end = begin + num_queries
        views.append(view_sequence(begin, end, position + 1, torch.tensor(blocks), torch.float32))
        begin = end
    return AttendOneByOne(tuple(views))


def together(parts: list[Part]) -> AttendTogether:
    """Block tables are padded with the block that holds NaN."""
    longest = max(len(blocks) for _, _, blocks in parts)
    tables = [[*blocks, *[1] * (longest - len(blocks))] for _, _, blocks in parts]
    sizes = torch.tensor([0, *(num_queries for num_queries, _, _ in parts)])
    return AttendTogether(
        torch.tensor(tables, dtype=torch.int32),
        sizes.cumsum(0).int(),
        torch.tensor([position + 1 for _, position, _ in parts], dtype=torch.int32),
        int(sizes.max()),
    )


def test_sequences_that_decode() -> None:
    cache, query = new_cache(), random_queries(len(DECODES))
    # The page of the last position goes on with rows of nobody.
    cache.keys[0, 7, 5:], cache.values[0, 7, 5:] = float("nan"), float("nan")

    attended = together(DECODES)(query, cache.keys[0], cache.values[0])

    wanted = one_by_one(DECODES)(query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)


def test_pieces_of_prompts_between_others() -> None:
    cache, query = new_cache(), random_queries(18)
    parts = [(1, 12, [3, 7]), (7, 6, [5]), (7, 14, [10, 6]), (1, 2, [14]), (2, 9, [0, 2])]

    attended = together(parts)(query, cache.keys[0], cache.values[0])

    wanted = one_by_one(parts)(query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)


def test_values_may_be_the_keys_and_the_scale_another() -> None:
    cache, query = new_cache(), random_queries(1)

    attended = together([(1, 3, [4])])(query, cache.keys[0], cache.keys[0], scale=0.5)

    past = cache.keys[0, 4, :4]  # [M, KV heads, width]
    for head in range(NUM_HEADS):
        rows = past[:, head // (NUM_HEADS // NUM_KV_HEADS)]
        weights = (0.5 * rows @ query[0, head]).softmax(dim=0)
        torch.testing.assert_close(attended[0, head], weights @ rows, rtol=1e-5, atol=1e-5)


def test_tensors_may_change_in_place() -> None:
    cache, query = new_cache(), random_queries(len(DECODES))
    attend, others = together(DECODES), [(1, 9, [9, 4]), *DECODES[1:]]
    attend.block_tables[0, :2] = torch.tensor([9, 4])
    attend.lengths[0] = 10

    attended = attend(query, cache.keys[0], cache.values[0])

    wanted = one_by_one(others)(query, cache.keys[0], cache.values[0])
    torch.testing.assert_close(attended, wanted, rtol=1e-5, atol=1e-5)
