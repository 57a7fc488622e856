"""The route: the kernel, run on the host, and the C++ of CPU ranks give the reference's integers,
and whoever follows the reference's segments puts every pair into a place of its own.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe import kernels
from lightmoe.errors import UsageError
from lightmoe.kernels import host_route, route_reference
from lightmoe.kernels.route import ROUTE_NUMBERS, route_split
from lightmoe.kernels.route_reference import ROUTES, assign, share_tokens
from tests.kernels.drivers import HERE, KERNELS
from tests.kernels.route_cases import RouteCase, assert_same_split, compile_host, emulate
from tests.moe.cases import random_nearness
from tests.moe.test_route import rank_loads

SEEDS = st.integers(0, 2**32 - 1)
SIZES = [(1, 5), (16, 64), (32, 40), (64, 24)]


def of_examples(number: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=number)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulated")
    return ctypes.CDLL(str(compile_host(HERE / "emulator/route.cpp", folder / "route.so")))


@pytest.fixture(scope="module")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host-route")
    return compile_host(KERNELS / "cpu/route.cpp", folder / "_light_route.so")


def test_every_route_has_a_number() -> None:
    assert set(ROUTE_NUMBERS) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("most_ranks", "most_experts"), SIZES)
def test_the_kernel_splits_like_the_reference(
    emulated: ctypes.CDLL, route: str, most_ranks: int, most_experts: int
) -> None:
    @of_examples(12)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        case = RouteCase.random(seed, most_ranks, most_experts)
        wanted = route_reference.route_split(
            *case.arguments,
            route=route,
            rank=case.rank,
            sweeps=case.sweeps,
            nearness=case.levels,
        )
        found, active = emulate(emulated, case, route, seed % 1000)
        assert_same_split(found, wanted, case.copy_ranks)
        shares = share_tokens(case.counts, case.copies, route, case.sweeps)
        experts = [[int(tokens > 0) for tokens in share] for share in shares]
        assert active.tolist() == rank_loads(experts, case.copies, len(case.counts))

    check()


def test_the_kernel_splits_the_most_experts(emulated: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    num_ranks, num_experts = 64, 512
    copies = [generator.permutation(num_ranks).tolist() for _ in range(num_experts)]
    case = RouteCase(
        generator.integers(200, size=(num_ranks, num_experts)),
        copies,
        torch.tensor(copies).int(),
        tokens_per_tile=64,
        rank=63,
        sweeps=1,
        nearness=random_nearness(generator, num_ranks),
    )
    wanted = route_reference.route_split(
        *case.arguments,
        route="waterfill",
        rank=case.rank,
        sweeps=case.sweeps,
        nearness=case.levels,
    )
    assert_same_split(emulate(emulated, case, "waterfill")[0], wanted, case.copy_ranks)


@pytest.mark.parametrize("route", ROUTES)
def test_cpu_ranks_split_like_the_reference(host_library: Path, route: str) -> None:
    @of_examples(100)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        case = RouteCase.random(seed, 24, 64)
        shares = share_tokens(case.counts, case.copies, route, case.sweeps)
        wanted = assign(case.counts, case.copies, shares, case.nearness)
        table = case.copy_ranks.numpy()
        found = host_route.assign(
            case.counts, table, route, case.sweeps, host_library, case.nearness
        )
        assert (found[:, :, : wanted.shape[2]] == wanted).all()
        assert not found[:, :, wanted.shape[2] :].any()

    check()


@pytest.mark.parametrize(
    "copy_ranks",
    [[[2, 0]], [[-1, 0]], [[0, 0]], [[0, -2]]],
    ids=["no rank", "no home", "twice", "-2"],
)
def test_copies_that_make_no_sense(host_library: Path, copy_ranks: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="copies are not ranks of 0 to 1, once an expert"):
        host_route.assign(
            np.ones((2, 1)), np.array(copy_ranks, dtype=np.int32), "none", 1, host_library
        )


def test_copies_of_other_experts_or_an_unknown_route(host_library: Path) -> None:
    one = np.zeros((1, 1), dtype=np.int32)
    with pytest.raises(UsageError, match="copies of 1 experts for 2 experts"):
        host_route.assign(np.ones((1, 2)), one, "none", 1, host_library)
    with pytest.raises(UsageError, match="route 'best' is unknown"):
        host_route.assign(np.ones((1, 1)), one, "best", 1, host_library)


def test_nearness_of_other_ranks(host_library: Path) -> None:
    one = np.zeros((1, 1), dtype=np.int32)
    with pytest.raises(UsageError, match="nearness of 2 ranks for 1 ranks"):
        host_route.assign(np.ones((1, 1)), one, "none", 1, host_library, [[0, 0]])


@pytest.mark.parametrize("route", ROUTES)
@of_examples(25)
@given(seed=SEEDS)
def test_segments_lead_every_pair_to_a_place_of_its_own(route: str, seed: int) -> None:
    case = RouteCase.random(seed, 6, 12)
    if case.counts.sum() > 2000:
        return
    offsets, copy_ranks, slots, tokens_per_tile, most_pairs = case.arguments
    splits = [
        kernels.route_chunks(
            offsets.unsqueeze(0),
            copy_ranks,
            slots,
            [(route, tokens_per_tile, most_pairs)],
            rank=rank,
            nearness=case.levels,
        )[0]
        for rank in range(len(case.counts))
    ]
    segments = splits[0].segments.numpy()
    taken: list[list[tuple[int, int, int, int]]] = [[] for _ in splits]  # place, then whose
    for (source, expert), count in np.ndenumerate(case.counts):
        for position in range(count):
            copy = int((segments[source, expert, :, 0] <= position).sum())
            begin = segments[source, expert, copy - 1, 0] if copy else 0
            place = segments[source, expert, copy, 1] + position - begin
            taken[case.copies[expert][copy]].append((int(place), expert, source, position))
    for rank, (split, pairs) in enumerate(zip(splits, taken, strict=True)):
        assert torch.equal(split.segments, splits[0].segments)
        assert [pair[0] for pair in sorted(pairs)] == list(range(len(pairs)))
        assert [pair[1:] for pair in sorted(pairs)] == sorted(pair[1:] for pair in pairs)
        assert int(split.rank_pairs[rank]) == len(pairs)
        experts = np.array([expert for _, expert, _, _ in pairs], dtype=np.int64)
        per_expert = np.bincount(experts, minlength=len(case.copies))
        assert split.groups.offsets.diff().tolist() == per_expert.tolist()
        tiles = -(-per_expert // case.tokens_per_tile)
        assert split.groups.tile_groups.tolist() == np.arange(len(tiles)).repeat(tiles).tolist()
        assert split.groups.tile_offsets.diff().tolist() == tiles.tolist()


def test_what_the_wrapper_refuses() -> None:
    offsets = torch.zeros(4, 9, dtype=torch.int32)
    given = {
        "source_offsets": offsets,
        "copy_ranks": torch.zeros(8, 2, dtype=torch.int32),
        "slots": torch.zeros(8, dtype=torch.int32),
        "tokens_per_tile": 16,
        "max_pairs": 100,
        "route": "waterfill",
        "rank": 0,
    }
    refused = [
        ({"source_offsets": offsets[0]}, "source_offsets has 1 dimensions"),
        ({"source_offsets": offsets.long()}, "source_offsets is torch.int64"),
        ({"copy_ranks": torch.zeros(9, 2, dtype=torch.int32)}, "copy_ranks has size 9"),
        ({"slots": torch.zeros(9, dtype=torch.int32)}, "slots has size 9"),
        ({"copy_ranks": torch.zeros(8, 5, dtype=torch.int32)}, "5 copies on 4 ranks"),
        ({"copy_ranks": torch.zeros(2, 8, dtype=torch.int32).t()}, "have gaps; give a copy"),
        ({"source_offsets": torch.zeros(65, 9, dtype=torch.int32)}, "rank 0 of 65; it takes 1 to"),
        ({"rank": 4}, "rank 4 of 4"),
        ({"max_pairs": 2**26}, "max_pairs 67108864; it takes fewer"),
        ({"nearness": torch.zeros(1, 5, dtype=torch.int32)}, "nearness has size 5"),
        ({"nearness": torch.zeros(1, 4)}, "nearness is torch.float32"),
        ({"nearness": torch.zeros(4, 4, dtype=torch.int32)}, "nearness of 4 levels; it takes 1"),
        ({"nearness": torch.zeros(0, 4, dtype=torch.int32)}, "nearness of 0 levels; it takes 1"),
        ({"route": "best"}, "route 'best' is unknown; give one of"),
        ({"sweeps": -1}, "sweeps -1"),
        ({"tokens_per_tile": 12}, "tokens_per_tile 12; it takes multiples of 8"),
        ({}, "source_offsets is on cpu; it needs a CUDA device"),
    ]
    for change, said in refused:
        with pytest.raises(UsageError, match=f"route_split: .*{said}"):
            route_split(**given | change)
