"""paged_attention on a GPU: near float64, the same bits however sequences are cut and batched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import paged_attention, reference
from tests.kernels.pairs import ROADS, Road, on_road

pytestmark = pytest.mark.gpu

MOST_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the norm of a row of outputs
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 511, 512, 513, 1000, 1025, 2049, 5000]
# (query heads, KV heads, width, block size)
SHAPES = [
    (8, 4, 32, 16),
    (4, 4, 64, 16),
    (32, 2, 64, 8),
    (32, 4, 128, 16),
    (6, 2, 96, 32),
    (10, 2, 80, 16),
    (4, 2, 8, 16),
    (16, 1, 128, 256),
    (8, 2, 256, 64),
    (3, 1, 176, 16),
    (16, 1, 576, 16),
    (40, 2, 64, 16),
    (5, 1, 320, 16),
]


@pytest.fixture(scope="module", params=ROADS, ids=str)
def road(request: pytest.FixtureRequest) -> Iterator[Road]:
    with on_road(request.param) as chosen:
        yield chosen


@dataclass
class Problem:
    """Queries, keys and values of all positions of some sequences, in shuffled pages."""

    queries: list[Tensor]  # [positions, H, width] of each sequence
    keys: Tensor
    values: Tensor
    block_tables: Tensor

    def step(self, parts: list[tuple[int, int, int]], max_queries: int | None = None) -> Tensor:
        """One launch over positions begin .. end of sequences, (sequence, begin, end) each."""
        rows, tables, starts, lengths = self.inputs(parts)
        most = max(end - begin for _, begin, end in parts)
        return paged_attention(
            rows, self.keys, self.values, tables, starts, lengths, max_queries=max_queries or most
        )

    def inputs(self, parts: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        rows = torch.cat([self.queries[one][begin:end] for one, begin, end in parts])
        sizes = torch.tensor([0] + [end - begin for _, begin, end in parts])
        index = torch.tensor([one for one, _, _ in parts], device="cuda")
        lengths = torch.tensor([end for _, _, end in parts], dtype=torch.int32, device="cuda")
        return rows, self.block_tables[index], sizes.cumsum(0).int().cuda(), lengths

    def wanted(self, one: int, begin: int, end: int) -> Tensor:
        """In float64."""
        rows, *tables = self.inputs([(one, begin, end)])
        cache = (self.keys.double(), self.values.double())
        return reference.paged_attention(rows.double(), *cache, *tables)


def new_problem(
    lengths: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> Problem:
    """Pages that are no sequence's, and rows beyond the last position, are NaN."""
    num_heads, num_kv_heads, width, block_size = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", generator=generator)

    blocks_of = [-(-length // block_size) for length in lengths]
    total = sum(blocks_of)
    order = torch.randperm(total + 1, device="cuda", generator=generator).int()
    poison = int(order[total])
    pages = [
        torch.full((total + 1, block_size, num_kv_heads, width), float("nan"), device="cuda")
        for _ in range(1 if width > 256 else 2)
    ]
    tables = torch.full((len(lengths), max(blocks_of)), poison, dtype=torch.int32, device="cuda")
    for one, length in enumerate(lengths):
        first = sum(blocks_of[:one])
        tables[one, : blocks_of[one]] = order[first : first + blocks_of[one]]
        for page in pages:
            rows = torch.full((blocks_of[one] * block_size, num_kv_heads, width), float("nan"))
            rows = rows.cuda()
            rows[:length] = random(length, num_kv_heads, width)
            page[tables[one, : blocks_of[one]].long()] = rows.unflatten(0, (-1, block_size))
    # Tokens lie apart, as slices of a product do.
    queries = [
        (2 * random(length, num_heads + num_kv_heads, width)).to(dtype)[:, :num_heads]
        for length in lengths
    ]
    pages = [page.to(dtype) for page in pages]
    return Problem(queries, pages[0], pages[-1], tables)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    error = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert not found.isnan().any()
    assert error.max() <= MOST_ERROR[found.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_positions_are_near_float64_and_decoding_has_the_bits_of_a_prompt(
    road: Road, shape: tuple[int, int, int, int]
) -> None:
    lengths = [1, 17, 64, 256, 257, 300, 700]
    problem = new_problem(lengths, shape, road.dtype)
    whole = [problem.step([(one, 0, length)]) for one, length in enumerate(lengths)]
    for one, length in enumerate(lengths):
        assert_near(whole[one], problem.wanted(one, 0, length))

    last = problem.step([(one, length - 1, length) for one, length in enumerate(lengths)])

    assert torch.equal(last, torch.stack([rows[-1] for rows in whole]))
    at = [min(length - 1, 270 + one) for one, length in enumerate(lengths)]
    middle = problem.step([(one, place, place + 1) for one, place in enumerate(at)])
    assert torch.equal(middle, torch.stack([whole[one][place] for one, place in enumerate(at)]))


@pytest.mark.parametrize("shape", [(32, 4, 128, 16), (16, 1, 576, 16)], ids=str)
def test_sequences_of_all_lengths_decode_together(
    road: Road, shape: tuple[int, int, int, int]
) -> None:
    problem = new_problem(LENGTHS, shape, road.dtype)

    found = problem.step([(one, length - 1, length) for one, length in enumerate(LENGTHS)])

    for one, length in enumerate(LENGTHS):
        assert_near(found[one : one + 1], problem.wanted(one, length - 1, length))
        alone = problem.step([(one, length - 1, length)])
        assert torch.equal(found[one], alone[0])
        # As the last of a few, which another kernel computes.
        begin = max(0, length - 7)
        assert torch.equal(found[one], problem.step([(one, begin, length)], 7)[-1])


@pytest.mark.parametrize("shape", [(8, 4, 32, 16), (32, 4, 128, 16), (16, 1, 576, 16)], ids=str)
def test_chunks_and_neighbours_change_no_bit(road: Road, shape: tuple[int, int, int, int]) -> None:
    length = 1100
    problem = new_problem([length, 40, 600], shape, road.dtype)
    whole = problem.step([(0, 0, length)])
    assert_near(whole, problem.wanted(0, 0, length))

    for borders in ([0, 1, 2, 250, 257, 700, 1100], [0, 511, 512, 1099, 1100], [0, 37, 1100]):
        for begin, end in zip(borders, borders[1:], strict=False):
            parts = [(1, 39, 40), (0, begin, end), (2, 5, 400), (1, 0, 40)]
            found = problem.step(parts)
            assert torch.equal(found[1 : 1 + end - begin], whole[begin:end])


def test_many_sequences(road: Road) -> None:
    """More than a warp looks through at once, with decodes between prompts, and empty ones."""
    lengths = [1 + 37 * one % 401 for one in range(75)]
    problem = new_problem(lengths, (8, 4, 32, 16), road.dtype)
    parts = [
        (one, 0 if one % 3 == 1 else length if one % 3 == 2 else length - 1, length)
        for one, length in enumerate(lengths)
    ]

    found = problem.step(parts)

    place = 0
    for one, begin, end in parts:
        if begin < end:
            rows = found[place : place + end - begin]
            assert torch.equal(rows, problem.step([(one, begin, end)]))
            assert_near(rows, problem.wanted(one, begin, end))
        place += end - begin


def test_a_scale_and_large_scores(road: Road) -> None:
    problem = new_problem([300], (8, 2, 64, 16), road.dtype)
    rows, *tables = problem.inputs([(0, 290, 300)])
    cache = (problem.keys, problem.values)

    found = paged_attention(rows, *cache, *tables, 3.0, max_queries=10)

    wanted = reference.paged_attention(
        rows.double(), *(pages.double() for pages in cache), *tables, 3.0
    )
    assert_near(found, wanted)


def test_rows_that_see_nothing_are_zeros(road: Road) -> None:
    problem = new_problem([300, 20], (8, 4, 32, 16), road.dtype)
    rows, tables, starts, _ = problem.inputs([(0, 0, 4), (1, 0, 1)])
    lengths = torch.tensor([2, 0], dtype=torch.int32, device="cuda")

    found = paged_attention(
        rows, problem.keys, problem.values, tables, starts, lengths, max_queries=4
    )

    assert not found[:2].any()
    assert found[2:4].any(dim=-1).all()
    assert not found[4].any()


@pytest.mark.parametrize("max_queries", [1, 12])
def test_a_graph_replays_with_other_lengths(road: Road, max_queries: int) -> None:
    problem = new_problem([900, 700, 1], (32, 4, 128, 16), road.dtype)
    first = [(0, 500, 501), (1, 699, 700), (2, 0, 1)]
    rows, tables, starts, lengths = problem.inputs(first)
    if max_queries > 1:
        rows = torch.cat([rows, problem.queries[0][: max_queries - 1]])
    cache = (problem.keys, problem.values)

    def enqueue() -> Tensor:
        return paged_attention(rows, *cache, tables, starts, lengths, max_queries=max_queries)

    enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = enqueue()

    several = [(1, 0, max_queries), (0, 899, 900), (2, 0, 1)]
    for parts in (first, several, [(2, 0, 1), (0, 255, 256), (1, 256, 257)]):
        new_rows, *new_tables = problem.inputs(parts)
        rows[: len(new_rows)] = new_rows
        for table, new in zip((tables, starts, lengths), new_tables, strict=True):
            table.copy_(new)
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found[: len(new_rows)], problem.step(parts))
