"""The route's kernel gives the reference's integers, in a graph too; needs `make kernels`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import RouteSplit, route_reference
from lightmoe.kernels.route import route_chunks, route_split
from lightmoe.kernels.route_reference import ROUTES
from tests.kernels.route_cases import RouteCase, assert_same_split

pytestmark = pytest.mark.gpu
SIZES = [(4, 8), (10, 128), (16, 256), (32, 64), (64, 96)]


def on_gpu(case: RouteCase) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """The arguments on the GPU; offsets stay rows of a longer table."""
    offsets, copy_ranks, slots, tokens_per_tile, num_pairs = case.arguments
    assert offsets.storage_offset() == 0
    table = offsets.as_strided((len(offsets), offsets.stride(0)), offsets.stride()).cuda()
    return (
        table[:, : offsets.shape[1]],
        copy_ranks.cuda(),
        slots.cuda(),
        tokens_per_tile,
        num_pairs,
    )


def wanted_of(case: RouteCase, route: str) -> RouteSplit:
    return route_reference.route_split(
        *case.arguments, route=route, rank=case.rank, sweeps=case.sweeps, nearness=case.levels
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("most_ranks", "most_experts"), SIZES)
def test_the_split_is_the_reference(road, route: str, most_ranks: int, most_experts: int) -> None:
    for seed in range(25):
        case = RouteCase.random(seed, most_ranks, most_experts)
        levels = None if case.levels is None else case.levels.cuda()
        options = {"rank": case.rank, "sweeps": case.sweeps, "nearness": levels}
        found = route_split(*on_gpu(case), route=route, **options)
        assert_same_split(found, wanted_of(case, route), case.copy_ranks)


@pytest.mark.parametrize("num_chunks", [1, 3, 8])
def test_chunks_are_split_at_once(road, num_chunks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    case = replace(RouteCase.random(3, 10, 64), nearness=[])
    counts = [
        torch.randint(2000, case.counts.shape, generator=generator) for _ in range(num_chunks)
    ]
    counts[-1].zero_()
    tiles = [8 + 8 * (number % 8) for number in range(num_chunks)]
    cases = [
        replace(case, counts=count.numpy(), tokens_per_tile=tile)
        for count, tile in zip(counts, tiles, strict=True)
    ]
    routes = [list(ROUTES)[number % len(ROUTES)] for number in range(num_chunks)]
    offsets = torch.stack([one.arguments[0] for one in cases]).cuda()
    found = route_chunks(
        offsets,
        case.copy_ranks.cuda(),
        case.arguments[2].cuda(),
        [
            (route, one.tokens_per_tile, one.arguments[-1])
            for route, one in zip(routes, cases, strict=True)
        ],
        rank=case.rank,
        sweeps=case.sweeps,
    )
    for split, one, route in zip(found, cases, routes, strict=True):
        assert split.segments.data_ptr() % 8 == 0, "a segment is read at once"
        assert_same_split(split, wanted_of(one, route), case.copy_ranks)


@pytest.mark.parametrize("route", ROUTES)
def test_a_graph_splits_by_the_counts_and_copies_of_its_replay(route: str) -> None:
    cases = [RouteCase.random(seed, 10, 64) for seed in range(400)]
    shapes = [(case.counts.shape, case.copy_ranks.shape, case.tokens_per_tile) for case in cases]
    first = cases[0]
    alike = [case for case, shape in zip(cases, shapes, strict=True) if shape == shapes[0]]
    for seed in range(3):  # at the least these: the same sizes, other counts
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(2000, first.counts.shape, generator=generator).numpy()
        alike.append(
            RouteCase(counts, first.copies, first.copy_ranks, first.tokens_per_tile, first.rank, 4)
        )
    most_pairs = max(int(case.counts.sum()) for case in alike)
    offsets, copy_ranks, slots, tokens_per_tile, _ = on_gpu(first)
    arguments = (offsets, copy_ranks, slots, tokens_per_tile, most_pairs)
    options = {"route": route, "rank": first.rank, "sweeps": 4}
    route_split(*arguments, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = route_split(*arguments, **options)
    for case in alike:
        offsets.copy_(case.source_offsets.cuda())
        copy_ranks.copy_(case.copy_ranks.cuda())
        graph.replay()
        wanted = route_reference.route_split(*case.arguments, **options)
        assert_same_split(found, wanted, case.copy_ranks)


def test_it_waits_for_the_kernel_in_front() -> None:
    case = replace(RouteCase.random(3, 10, 64), nearness=[])
    offsets, *others = on_gpu(case)
    table = torch.zeros_like(offsets)
    right = offsets.clone()
    for _ in range(20):
        table.zero_()
        torch.cuda._sleep(200_000)
        table.copy_(right)
        found = route_split(table, *others, route="waterfill", rank=case.rank, sweeps=case.sweeps)
        assert_same_split(found, wanted_of(case, "waterfill"), case.copy_ranks)
