"""Pairs go to the nearest copy that has room: shares stay the same, nothing crosses in vain."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.moe.route import NUM_SWEEPS, ROUTES, Nearness, Shares, assign, share_tokens
from tests.moe.cases import random_copies, random_nearness

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=150)
Problem = tuple[np.ndarray, list[list[int]], Shares, list[list[int]]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Counts [W, E], copies, the shares of a route, nearness of ranks numbered anyhow."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_experts = draw(st.integers(2, 12)), draw(st.integers(1, 8))
    copies = random_copies(generator, num_experts, num_ranks, draw(st.integers(0, 40)))
    counts = generator.integers(draw(st.integers(1, 40)), size=(num_ranks, num_experts))
    shares = share_tokens(counts, copies, draw(st.sampled_from(sorted(ROUTES))), NUM_SWEEPS)
    return counts, copies, shares, random_nearness(generator, num_ranks)


def distance(nearness: Nearness, one: int, other: int) -> int:
    """0 within a rank, then the level at which they meet."""
    levels = [range(len(nearness[0])), *nearness]
    met = [level for level, groups in enumerate(levels) if groups[one] == groups[other]]
    return met[0] if met else len(levels)


@EXAMPLES
@given(problem=problems())
def test_shares_and_sources_are_what_they_were(problem: Problem) -> None:
    counts, copies, shares, nearness = problem

    near, anywhere = assign(counts, copies, shares, nearness), assign(counts, copies, shares)

    assert (near >= 0).all()
    assert (near.sum(axis=2) == counts).all()
    assert (near.sum(axis=0) == anywhere.sum(axis=0)).all()


@EXAMPLES
@given(problem=problems())
def test_no_two_pairs_gain_by_changing_places(problem: Problem) -> None:
    counts, copies, shares, nearness = problem
    assigned = assign(counts, copies, shares, nearness)

    for expert, ranks in enumerate(copies):
        going = [
            (source, ranks[copy]) for source, copy in np.argwhere(assigned[:, expert]).tolist()
        ]
        for source, rank in going:
            for other_source, other in going:
                now = [(source, rank), (other_source, other)]
                then = [(source, other), (other_source, rank)]
                farthest = [
                    sorted((distance(nearness, *pair) for pair in pairs), reverse=True)
                    for pairs in (now, then)
                ]
                assert farthest[0] <= farthest[1]


@EXAMPLES
@given(problem=problems())
def test_of_every_group_no_more_leaves_than_finds_no_place(problem: Problem) -> None:
    counts, copies, shares, nearness = problem
    assigned = assign(counts, copies, shares, nearness)

    for expert, ranks in enumerate(copies):
        for groups in ([*range(len(counts))], *nearness):
            for group in set(groups):
                sources = np.array(groups) == group
                there = [copy for copy, rank in enumerate(ranks) if groups[rank] == group]
                room = sum(shares[expert][copy] for copy in there)
                stays = assigned[sources][:, expert, there].sum()
                assert stays == min(counts[sources, expert].sum(), room)


@EXAMPLES
@given(problem=problems())
def test_one_group_is_none(problem: Problem) -> None:
    counts, copies, shares, _ = problem
    everyone, alone = [0] * len(counts), [*range(len(counts))]

    assert (
        assign(counts, copies, shares, [alone, everyone]) == assign(counts, copies, shares)
    ).all()


def test_a_source_takes_the_copy_below_its_switch() -> None:
    counts, copies, shares = np.array([[4], [0], [2], [0]]), [[3, 1]], [[2, 4]]

    assert assign(counts, copies, shares)[:, 0].tolist() == [[2, 2], [0, 0], [0, 2], [0, 0]]
    near = assign(counts, copies, shares, [(0, 0, 2, 2)])
    assert near[:, 0].tolist() == [[0, 4], [0, 0], [2, 0], [0, 0]]
