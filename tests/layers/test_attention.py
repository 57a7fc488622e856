"""Paged attention: equal to plain causal attention, and blind to the sequences beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import rotate
from lightmoe.layers.attention import (
    QUERY_ROWS,
    AttendOneByOne,
    Attention,
    AttentionStep,
    KVCache,
    view_sequence,
)
from lightmoe.layers.basic import Linear, RMSNorm, Rotary
from tests.kernels.rows import random_rows

CPU = torch.device("cpu")
WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 24, 4, 2, 8, 8


class Bench:
    """One attention layer, its cache, and sequences that are run in any pieces."""

    def __init__(self, *, qk_norm: bool = False) -> None:
        self.query = random_rows(NUM_HEADS * HEAD_DIM, WIDTH, seed=1)
        self.key = random_rows(NUM_KV_HEADS * HEAD_DIM, WIDTH, seed=2)
        self.value = random_rows(NUM_KV_HEADS * HEAD_DIM, WIDTH, seed=3)
        self.output = random_rows(WIDTH, NUM_HEADS * HEAD_DIM, seed=4)
        weights = random_rows(2, HEAD_DIM, seed=5)
        self.norms = (RMSNorm(weights[0], 1e-5), RMSNorm(weights[1], 1e-5))
        self.qk_norm = qk_norm
        self.rotary = Rotary(HEAD_DIM, 10000.0, 64, CPU)
        self.attention = Attention(
            0,
            Linear(torch.cat([self.query, self.key, self.value])),
            Linear(self.output),
            self.norms if qk_norm else None,
        )
        self.cache = KVCache(
            1, 20, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, torch.float32, CPU
        )
        # Blocks that hold anything else than what was written must not be seen.
        self.cache.keys[:, :-1] = float("nan")
        self.cache.values[:, :-1] = float("nan")

    def run(self, parts: list[tuple[Tensor, int, list[int]]]) -> list[Tensor]:
        """One step over (hidden, first position, block table) of each sequence."""
        begin, rows, positions, views = 0, [], [], []
        for hidden, start, blocks in parts:
            end, seen = begin + len(hidden), start + len(hidden)
            positions += range(start, seen)
            rows += [
                blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                for position in range(start, seen)
            ]
            views.append(view_sequence(begin, end, seen, torch.tensor(blocks), torch.float32))
            begin = end
        tables = self.rotary.tables(torch.tensor(positions), torch.float32)
        attend = AttendOneByOne(tuple(views))
        step = AttentionStep(self.cache, torch.tensor(rows), tables, attend)
        output = self.attention(torch.cat([hidden for hidden, _, _ in parts]), step)
        return list(output.split([len(hidden) for hidden, _, _ in parts]))

    def plain(self, hidden: Tensor) -> Tensor:
        """The definition, without pages."""
        tables = self.rotary.tables(torch.arange(len(hidden)), torch.float32)
        query, key, value = (
            (hidden @ weight.t()).unflatten(1, (-1, HEAD_DIM))
            for weight in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            query, key = self.norms[0](query), self.norms[1](key)
        query, key = rotate(query, tables), rotate(key, tables)
        heads = []
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            scores = query[:, head] @ key[:, kv_head].t() / HEAD_DIM**0.5
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(
                scores.masked_fill(later, float("-inf")).softmax(dim=1) @ value[:, kv_head]
            )
        return torch.cat(heads, dim=1) @ self.output.t()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [5, 1, 7], [4, 4, 5], [12, 1]], ids=str)
def test_any_pieces_give_plain_causal_attention(pieces: list[int], qk_norm: bool) -> None:
    bench, hidden = Bench(qk_norm=qk_norm), random_rows(13, WIDTH)

    start, outputs = 0, []
    for size in pieces:
        outputs += bench.run([(hidden[start : start + size], start, [7, 2, 11, 0])])
        start += size

    torch.testing.assert_close(torch.cat(outputs), bench.plain(hidden), rtol=1e-4, atol=1e-4)


def test_a_sequence_has_the_same_bits_alone_and_beside_others() -> None:
    hidden, other = random_rows(13, WIDTH), random_rows(9, WIDTH, seed=7)
    alone, together = Bench(), Bench()

    wanted = alone.run([(hidden[:12], 0, [7, 2, 11])]) + alone.run(
        [(hidden[12:], 12, [7, 2, 11, 0])]
    )
    _, first = together.run([(other[:8], 0, [1, 3]), (hidden[:12], 0, [9, 4, 5])])
    second, _ = together.run([(hidden[12:], 12, [9, 4, 5, 6]), (other[8:], 8, [1, 3, 8])])

    assert torch.equal(first, wanted[0])
    assert torch.equal(second, wanted[1])


@pytest.mark.parametrize("pieces", [[1] * 13, [5, 1, 7], [4, 4, 5], [12, 1], [3, 10]], ids=str)
def test_the_bits_of_a_position_do_not_depend_on_how_it_was_cut(pieces: list[int]) -> None:
    hidden = random_rows(13, WIDTH)
    (whole,) = Bench().run([(hidden, 0, [7, 2])])

    bench, start, outputs = Bench(), 0, []
    for size in pieces:
        outputs += bench.run([(hidden[start : start + size], start, [3, 12])])
        start += size

    assert torch.equal(torch.cat(outputs), whole)


def test_a_query_sees_itself_and_what_came_before() -> None:
    view = view_sequence(0, 2, 10, torch.tensor([0, 1]), torch.float32)

    (mask,) = view.masks
    assert mask.shape == (QUERY_ROWS, 16)
    for row in range(QUERY_ROWS):
        assert mask[row].tolist() == [0.0] * (9 + row) + [float("-inf")] * (7 - row)


def test_rows_that_cross_a_border_fall_into_two_groups() -> None:
    view = view_sequence(0, 4, 10, torch.tensor([0, 1]), torch.float32)

    assert [mask.shape[1] for mask in view.masks] == [8, 16]
