"""Routes: nothing is lost, pouring is level, the loads are as even as a linear program says, and
the active experts as few as a search through all choices finds.
"""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightmoe.kernels import host_route
from lightmoe.moe import route as route_module
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.route import (
    NUM_SWEEPS,
    ROUTES,
    Copies,
    Shares,
    assign,
    choose_objective,
    pair_ranks,
    pour,
    route_even,
    route_fewest,
    route_home,
    route_waterfill,
    share_tokens,
    split_over_copies,
)
from tests.moe.cases import random_copies, zipf_choice, zipf_tokens

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=100)
SEEDS = st.integers(0, 2**32 - 1)


def rank_loads(shares: Shares, copies: Copies, num_ranks: int) -> list[int]:
    loads = [0] * num_ranks
    for share, ranks in zip(shares, copies, strict=True):
        for rank, tokens in zip(ranks, share, strict=True):
            loads[rank] += tokens
    return loads


def least_maximum(expert_tokens: list[int], copies: Copies, num_ranks: int) -> float:
    """The lowest maximum load of any split, by linear program over shares and the maximum."""
    places = [(expert, rank) for expert, ranks in enumerate(copies) for rank in ranks]
    all_tokens_go = np.zeros((len(copies), len(places) + 1))
    no_rank_above = np.zeros((num_ranks, len(places) + 1))
    no_rank_above[:, -1] = -1.0
    for column, (expert, rank) in enumerate(places):
        all_tokens_go[expert, column] = 1.0
        no_rank_above[rank, column] = 1.0
    answer = linprog(
        c=[0.0] * len(places) + [1.0],
        A_ub=no_rank_above,
        b_ub=np.zeros(num_ranks),
        A_eq=all_tokens_go,
        b_eq=expert_tokens,
    )
    assert answer.success
    return float(answer.fun)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    """Tokens per expert, copies, number of ranks: any sizes, any skew, replicas anywhere."""
    generator = np.random.default_rng(draw(SEEDS))
    num_experts, num_ranks = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    copies = random_copies(generator, num_experts, num_ranks, draw(st.integers(0, 60)))
    num_tokens, skew = draw(st.integers(0, 5000)), draw(st.floats(0.0, 2.0))
    return zipf_tokens(generator, num_experts, num_tokens, skew), copies, num_ranks


@EXAMPLES
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(0, 1000))
def test_pouring_is_level_to_one_token(base: list[int], tokens: int) -> None:
    share = pour(base, tokens)

    assert sum(share) == tokens
    assert min(share) >= 0
    filled = [ground + poured for ground, poured in zip(base, share, strict=True)]
    one_by_one = list(base)
    for _ in range(tokens):
        one_by_one[one_by_one.index(min(one_by_one))] += 1
    assert sorted(filled) == sorted(one_by_one)


def test_the_first_vessels_have_what_is_left_over() -> None:
    assert pour([5, 5, 5], 4) == [2, 1, 1]
    assert pour([5, 0, 5], 1) == [0, 1, 0]
    assert pour([5, 0, 9], 8) == [2, 6, 0]


@pytest.mark.parametrize("route", ROUTES)
@EXAMPLES
@given(case=cases())
def test_every_route_conserves_tokens(
    route: str, case: tuple[list[int], list[list[int]], int]
) -> None:
    expert_tokens, copies, num_ranks = case

    shares = ROUTES[route](expert_tokens, copies, num_ranks)

    assert [len(share) for share in shares] == [len(ranks) for ranks in copies]
    assert [sum(share) for share in shares] == expert_tokens
    assert all(tokens >= 0 for share in shares for tokens in share)


def test_even_and_none_split_as_they_say() -> None:
    copies = [[0, 1, 2], [1]]
    assert route_even([8, 3], copies, 3) == [[3, 3, 2], [3]]
    assert route_home([8, 3], copies, 3) == [[8, 0, 0], [3]]


@EXAMPLES
@given(case=cases())
def test_waterfill_swept_to_convergence_reaches_the_optimum(
    case: tuple[list[int], list[list[int]], int],
) -> None:
    expert_tokens, copies, num_ranks = case

    loads = rank_loads(
        route_waterfill(expert_tokens, copies, num_ranks, sweeps=64), copies, num_ranks
    )

    optimum = least_maximum(expert_tokens, copies, num_ranks)
    assert optimum - 1e-6 <= max(loads) <= optimum + num_ranks


@EXAMPLES
@given(case=cases(), sweeps=st.integers(1, 6))
def test_no_sweep_makes_the_fullest_rank_fuller(
    case: tuple[list[int], list[list[int]], int], sweeps: int
) -> None:
    expert_tokens, copies, num_ranks = case

    def fullest(sweeps: int) -> int:
        shares = route_waterfill(expert_tokens, copies, num_ranks, sweeps=sweeps)
        return max(rank_loads(shares, copies, num_ranks))

    assert fullest(sweeps + 1) <= fullest(sweeps)
    assert fullest(0) == fullest(1), "the first sweep gives the tokens their places"


@pytest.mark.parametrize(("num_experts", "num_spares"), [(8, 2), (64, 2), (128, 2), (64, 0)])
def test_the_sweeps_made_come_close_to_convergence(num_experts: int, num_spares: int) -> None:
    num_ranks, made, converged = 10, [], []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        placement = initial_placement(
            1, num_experts, num_ranks, num_spares=num_spares, replicas_per_layer=num_experts
        )
        copies = placement.copies[0]
        expert_tokens = zipf_tokens(generator, num_experts, 4000, skew=1.0)
        for sweeps, ratios in ((NUM_SWEEPS, made), (64, converged)):
            loads = rank_loads(
                route_waterfill(expert_tokens, copies, num_ranks, sweeps), copies, num_ranks
            )
            ratios.append(max(loads) / np.mean(loads))
    assert np.mean(made) <= 1.002 * np.mean(converged)


@EXAMPLES
@given(seed=SEEDS)
def test_a_pool_leaves_as_many_tokens_where_they_are_as_its_ranks_get(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_ranks, num_experts = int(generator.integers(2, 6)), int(generator.integers(1, 20))
    copies = random_copies(generator, num_experts, num_ranks, 2 * num_experts)
    counts = generator.integers(generator.integers(1, 50), size=(num_ranks, num_experts))

    shares = share_tokens(counts, copies, "waterfill", NUM_SWEEPS)

    of_sets: dict[frozenset[int], list[int]] = {}
    for expert, ranks in enumerate(copies):
        of_sets.setdefault(frozenset(ranks), []).append(expert)
    for ranks, experts in of_sets.items():
        for rank in ranks if len(ranks) > 1 else ():
            given = [shares[expert][copies[expert].index(rank)] for expert in experts]
            own = counts[rank, experts]
            assert np.minimum(given, own).sum() == min(sum(given), own.sum())


def test_experts_of_the_same_ranks_are_poured_as_one() -> None:
    copies = [[0, 1], [2], [1, 0], [0, 1]]
    counts = np.array([[4, 0, 0, 1], [0, 0, 2, 0], [0, 9, 3, 4]])

    shares = share_tokens(counts, copies, "waterfill", NUM_SWEEPS)

    assert rank_loads(shares, copies, 3) == [7, 7, 9]
    # Four, one and two stay; rank 0 has room for two more, the rest is rank 1's.
    assert shares == [[4, 0], [9], [3, 2], [1, 4]]


@st.composite
def choices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]], int]:
    """Experts [T, K], the rank of each token, copies, number of ranks."""
    generator = np.random.default_rng(draw(SEEDS))
    num_experts, num_ranks = draw(st.integers(1, 16)), draw(st.integers(1, 7))
    copies = random_copies(generator, num_experts, num_ranks, draw(st.integers(0, 30)))
    num_per_token = draw(st.integers(1, min(3, num_experts)))
    num_tokens, skew = draw(st.integers(0, 200)), draw(st.floats(0.0, 6.0))
    experts = zipf_choice(generator, num_tokens, num_experts, num_per_token, skew)
    # Some ranks have no tokens: only the first few are drawn from.
    source = np.sort(generator.integers(draw(st.integers(1, num_ranks)), size=num_tokens))
    return experts, source, copies, num_ranks


def counts_of(
    experts: np.ndarray, source: np.ndarray, num_experts: int, num_ranks: int
) -> np.ndarray:
    counts = np.zeros((num_ranks, num_experts), dtype=np.int64)
    for rank, chosen in zip(source, experts, strict=True):
        counts[rank, chosen] += 1
    return counts


@pytest.mark.parametrize("route", ROUTES)
@EXAMPLES
@given(case=choices())
def test_assign_fills_every_share_and_keeps_tokens_at_home_first(
    route: str, case: tuple[np.ndarray, np.ndarray, list[list[int]], int]
) -> None:
    experts, source, copies, num_ranks = case
    counts = counts_of(experts, source, len(copies), num_ranks)
    shares = share_tokens(counts, copies, route, NUM_SWEEPS)

    assigned = assign(counts, copies, shares)

    assert (assigned >= 0).all()
    assert (assigned.sum(axis=2) == counts).all()
    for expert, ranks in enumerate(copies):
        assert assigned[:, expert, : len(ranks)].sum(axis=0).tolist() == shares[expert]
        for copy, rank in enumerate(ranks):
            here = min(counts[rank, expert], shares[expert][copy])
            assert assigned[rank, expert, copy] == here


@pytest.mark.parametrize("route", ROUTES)
@EXAMPLES
@given(case=choices())
def test_every_pair_goes_to_a_holder_and_every_holder_gets_its_share(
    route: str, case: tuple[np.ndarray, np.ndarray, list[list[int]], int]
) -> None:
    experts, source, copies, num_ranks = case

    target = pair_ranks(experts, source, copies, num_ranks, route)

    assert target.shape == experts.shape
    counts = counts_of(experts, source, len(copies), num_ranks)
    shares = share_tokens(counts, copies, route, NUM_SWEEPS)
    arrived = np.zeros((len(copies), num_ranks), dtype=np.int64)
    np.add.at(arrived, (experts.ravel(), target.ravel()), 1)
    for expert, ranks in enumerate(copies):
        assert arrived[expert, ranks].tolist() == shares[expert]
    assert arrived.sum() == experts.size


def most_active(shares: Shares, copies: Copies, num_ranks: int) -> int:
    """Experts with tokens on the rank that has most of them."""
    active = [[int(tokens > 0) for tokens in share] for share in shares]
    return max(rank_loads(active, copies, num_ranks))


def least_active(expert_tokens: list[int], copies: Copies, num_ranks: int) -> int:
    """The least that any choice of one copy for each active expert gives: all are tried."""
    holders = [ranks for ranks, tokens in zip(copies, expert_tokens, strict=True) if tokens]
    return min(
        max(np.bincount(np.array(choice, dtype=np.int64), minlength=num_ranks))
        for choice in itertools.product(*holders)
    )


@EXAMPLES
@given(seed=SEEDS)
def test_fewest_is_at_most_one_expert_from_the_optimum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_ranks, num_experts = int(generator.integers(1, 6)), int(generator.integers(1, 9))
    copies = random_copies(generator, num_experts, num_ranks, int(generator.integers(10)))
    tokens = generator.integers(3, size=num_experts).tolist()

    shares = route_fewest(tokens, copies, num_ranks)

    assert all(sum(share_tokens > 0 for share_tokens in share) <= 1 for share in shares)
    optimum = least_active(tokens, copies, num_ranks)
    assert optimum <= most_active(shares, copies, num_ranks) <= optimum + 1


def test_fewest_mostly_reaches_the_optimum_and_beats_level_tokens() -> None:
    num_ranks, above, poured = 5, 0, 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        copies = random_copies(generator, 8, num_ranks, 8)
        tokens = zipf_tokens(generator, 8, 30, skew=1.0)
        optimum = least_active(tokens, copies, num_ranks)
        above += most_active(route_fewest(tokens, copies, num_ranks), copies, num_ranks) - optimum
        level = route_waterfill(tokens, copies, num_ranks)
        poured += most_active(level, copies, num_ranks) - optimum
    assert above <= 10
    assert poured >= 50


def test_fewest_stays_with_most_of_its_tokens_then_with_the_first_copy() -> None:
    copies = [[0, 1, 2]]
    assert share_tokens(np.array([[1], [2], [5]]), copies, "fewest", 4) == [[0, 0, 8]]
    assert share_tokens(np.array([[1], [2], [2]]), copies, "fewest", 4) == [[0, 5, 0]]
    assert route_fewest([5], copies, 3) == [[5, 0, 0]]
    # The expert without a choice comes first, whatever has more tokens.
    assert route_fewest([9, 1], [[0, 1], [0]], 2) == [[0, 9], [1]]
    assert route_fewest([9, 0], [[0, 1], [0]], 2, sweeps=0) == [[9, 0], [0]]


def test_the_objective_follows_the_roofline() -> None:
    card = {"flops_per_second": 1e15, "bytes_per_second": 4e12}  # 250 tokens for two bytes

    few = choose_objective(240 * 8, 8, **card)
    many = choose_objective(260 * 8, 8, **card)

    assert (few.route, many.route) == ("fewest", "waterfill")
    assert few.reason == "240.0 tokens an active expert of 250.0: bound by memory"
    assert many.reason == "260.0 tokens an active expert of 250.0: bound by computing"
    assert choose_objective(100 * 8, 8, **card, bytes_per_weight=0.5).route == "waterfill"
    assert choose_objective(0, 0, **card).reason == "no tokens"


@pytest.mark.parametrize("route", ROUTES)
@EXAMPLES
@given(case=choices())
def test_the_split_is_the_reference_with_and_without_a_compiler(
    route: str, case: tuple[np.ndarray, np.ndarray, list[list[int]], int]
) -> None:
    experts, source, copies, num_ranks = case
    counts = counts_of(experts, source, len(copies), num_ranks)

    found = split_over_copies(counts, copies, route)

    assert (found == assign(counts, copies, share_tokens(counts, copies, route, NUM_SWEEPS))).all()


def test_without_a_compiled_route_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_route, "library_path", lambda: None)
    route_module._say_that_it_is_slow.cache_clear()
    counts = np.array([[3, 1], [0, 2]])

    with caplog.at_level(logging.WARNING, logger="lightmoe.route"):
        splits = [split_over_copies(counts, [[0, 1], [1]], "waterfill") for _ in range(3)]

    assert splits[0].sum() == 6
    (record,) = caplog.records
    assert "numpy computes it, slower; install a C++17 compiler" in record.getMessage()
