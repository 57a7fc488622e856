"""Many problems at once give what move by move the routes of the runtime give, and the optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightmoe.balancer.batched_routes import (
    copy_table,
    even_loads,
    home_loads,
    least_maximum,
    waterfill_loads,
)
from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import homes_and_spares, spread_ranks
from lightmoe.errors import UsageError
from lightmoe.moe.placement import Placement
from lightmoe.moe.route import Copies, Shares, route_even, route_home, route_waterfill
from tests.moe.cases import placement_of, random_copies, zipf_tokens

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Placement]:
    """Tokens [N, E] and a placement of N layers: any sizes, any skew, replicas anywhere."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts, num_ranks = draw(st.integers(1, 30)), draw(st.integers(1, 11))
    num_problems, num_replicas = draw(st.integers(1, 6)), draw(st.integers(0, 60))
    copies = [
        random_copies(generator, num_experts, num_ranks, num_replicas) for _ in range(num_problems)
    ]
    tokens = [
        zipf_tokens(generator, num_experts, draw(st.integers(0, 5000)), draw(st.floats(0.0, 2.0)))
        for _ in range(num_problems)
    ]
    return np.array(tokens), placement_of(copies, num_ranks)


def table_of(placement: Placement) -> np.ndarray:
    return copy_table(placement.slot_table >= 0, placement.homes)


def rank_loads(shares: Shares, copies: Copies, num_ranks: int) -> list[int]:
    loads = [0] * num_ranks
    for share, ranks in zip(shares, copies, strict=True):
        for rank, tokens in zip(ranks, share, strict=True):
            loads[rank] += tokens
    return loads


def linear_program(tokens: np.ndarray, copies: Copies, speeds: np.ndarray) -> float:
    """The lowest maximum of loads over speeds, by linear program over the shares."""
    places = [(expert, rank) for expert, ranks in enumerate(copies) for rank in ranks]
    all_tokens_go = np.zeros((len(copies), len(places) + 1))
    no_rank_above = np.zeros((len(speeds), len(places) + 1))
    no_rank_above[:, -1] = -speeds
    for column, (expert, rank) in enumerate(places):
        all_tokens_go[expert, column] = 1.0
        no_rank_above[rank, column] = 1.0
    answer = linprog(
        c=[0.0] * len(places) + [1.0],
        A_ub=no_rank_above,
        b_ub=np.zeros(len(speeds)),
        A_eq=all_tokens_go,
        b_eq=tokens,
    )
    assert answer.success
    return float(answer.fun)


@EXAMPLES
@given(problem=problems())
def test_a_table_names_the_copies_home_first(problem: tuple[np.ndarray, Placement]) -> None:
    _, placement = problem

    named = [
        [tuple(ranks[ranks < placement.num_ranks].tolist()) for ranks in layer]
        for layer in table_of(placement)
    ]

    assert named == [list(layer) for layer in placement.copies]


@pytest.mark.parametrize(
    ("batched", "single"),
    [(home_loads, route_home), (even_loads, route_even), (waterfill_loads, route_waterfill)],
)
@EXAMPLES
@given(problem=problems())
def test_loads_equal_the_runtimes_route(
    batched: object, single: object, problem: tuple[np.ndarray, Placement]
) -> None:
    tokens, placement = problem
    num_ranks = placement.num_ranks

    loads = batched(tokens, table_of(placement), num_ranks)  # type: ignore[operator]

    for layer, of_layer in enumerate(tokens.tolist()):
        copies = placement.copies[layer]
        shares = single(of_layer, copies, num_ranks)  # type: ignore[operator]
        assert loads[layer].tolist() == rank_loads(shares, copies, num_ranks)


@pytest.mark.parametrize("num_spares", [2, 0])
@pytest.mark.parametrize(("num_experts", "skew", "replica_slots"), [(64, 1.0, 32), (8, 0.6, 6)])
@pytest.mark.parametrize("num_pairs", [8_000, 80_000])
def test_the_sweeps_made_reach_the_optimum_under_drift(
    num_spares: int, num_experts: int, skew: float, replica_slots: int, num_pairs: int
) -> None:
    """Loads that have drifted by lognormal(0.5) since the plan, ten ranks."""
    generator = np.random.default_rng(1)
    ranks = (
        homes_and_spares(1, num_experts, 10, num_spares, replica_slots // num_spares)
        if num_spares
        else spread_ranks(1, num_experts, 10, replica_slots)
    )
    load = generator.permutation(1.0 / np.arange(1, num_experts + 1) ** skew)
    placement = plan(load[None], ranks.slots_per_rank, num_spares=num_spares)
    drifted = load * generator.lognormal(0, 0.5, (200, num_experts))
    tokens = (num_pairs * drifted / drifted.sum(axis=1, keepdims=True)).astype(int)
    table = np.tile(table_of(placement), (len(tokens), 1, 1))

    poured = waterfill_loads(tokens, table, 10).max(axis=1)

    assert poured.mean() <= 1.002 * least_maximum(tokens, table, 10).mean()


@EXAMPLES
@given(problem=problems(), seed=st.integers(0, 100))
def test_the_least_maximum_is_the_linear_programs(
    problem: tuple[np.ndarray, Placement], seed: int
) -> None:
    tokens, placement = problem
    num_ranks = placement.num_ranks
    uneven = np.random.default_rng(seed).uniform(0.5, 2.0, num_ranks)

    alike = least_maximum(tokens, table_of(placement), num_ranks)
    by_speed = least_maximum(tokens, table_of(placement), num_ranks, uneven)

    for layer, copies in enumerate(placement.copies):
        for found, speeds in ((alike, np.ones(num_ranks)), (by_speed, uneven)):
            assert found[layer] == pytest.approx(
                linear_program(tokens[layer], copies, speeds), abs=1e-4
            )


def test_more_problems_than_a_block_are_put_together() -> None:
    copies = [[[0], [1, 0], [2]]] * 300
    placement = placement_of(copies, num_ranks=10)
    tokens = np.arange(900).reshape(300, 3)

    whole = least_maximum(tokens, table_of(placement), 10)

    table = table_of(placement)
    one_by_one = [least_maximum(tokens[[n]], table[[n]], 10)[0] for n in range(300)]
    assert whole.tolist() == one_by_one


def test_the_optimum_of_many_ranks_is_refused() -> None:
    placement = placement_of([[[0], [16]]], num_ranks=17)

    with pytest.raises(UsageError, match="16 ranks at most, not 17; leave the route lp out"):
        least_maximum(np.array([[3, 4]]), table_of(placement), 17)
