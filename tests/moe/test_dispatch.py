"""Dispatch and combine over real gloo: every pair is computed once, where its expert is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import Dispatcher, ExpertGroup, make_dispatcher
from lightmoe.moe.gate import Choice
from lightmoe.moe.overlap_model import chunk_of
from lightmoe.moe.placement import Placement
from lightmoe.moe.route import ROUTES
from tests.moe.cases import placement_of, random_copies, random_nearness, zipf_choice
from tests.ranks import RankThreadsCache

WIDTH = 5
TOKENS_PER_TILE = 4


@dataclass(frozen=True)
class Case:
    """What all ranks chose in one step. `tokens_per_rank` may have zeros."""

    placement: Placement
    tokens_per_rank: tuple[int, ...]
    experts: np.ndarray
    route: str
    num_chunks: int
    nearness: Sequence[Sequence[int]] = ()

    @property
    def num_ranks(self) -> int:
        return len(self.tokens_per_rank)

    def of_rank(self, rank: int) -> slice:
        first = sum(self.tokens_per_rank[:rank])
        return slice(first, first + self.tokens_per_rank[rank])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.sampled_from([1, 2, 3, 5]))
    num_experts = draw(st.integers(1, 12))
    num_replicas = draw(st.integers(0, 20))
    tokens_per_rank = draw(st.lists(st.integers(0, 9), min_size=num_ranks, max_size=num_ranks))
    return Case(
        placement=placement_of(
            [random_copies(generator, num_experts, num_ranks, num_replicas)], num_ranks
        ),
        tokens_per_rank=tuple(tokens_per_rank),
        experts=zipf_choice(
            generator,
            sum(tokens_per_rank),
            num_experts,
            draw(st.integers(1, min(3, num_experts))),
            skew=draw(st.sampled_from([0.0, 1.0, 8.0])),
        ),
        route=draw(st.sampled_from(sorted(ROUTES))),
        num_chunks=draw(st.integers(1, 4)),
        nearness=random_nearness(generator, num_ranks) if draw(st.booleans()) else (),
    )


def one_expert(tokens_per_rank: tuple[int, ...], num_chunks: int = 1) -> Case:
    """All tokens choose the same expert, which two ranks hold."""
    return Case(
        placement=placement_of([[[0], [2, 1], [1]]], num_ranks=3),
        tokens_per_rank=tokens_per_rank,
        experts=np.full((sum(tokens_per_rank), 1), 1),
        route="waterfill",
        num_chunks=num_chunks,
    )


def on_every_rank(ranks: RankThreadsCache, case: Case, task: object) -> list[object]:
    """Run task(dispatcher, group, choice) on every rank; one rank alone has no communicator."""

    def run(communicator: Communicator | None, rank: int) -> object:
        group = ExpertGroup(
            rank=rank,
            placement=case.placement,
            communicator=communicator,
            route=case.route,
            layer_pairs=np.zeros(1, dtype=np.int64),
            tokens_per_rank=case.tokens_per_rank,
            nearness=case.nearness,
        )
        experts = torch.from_numpy(case.experts[case.of_rank(rank)].copy())
        dispatcher = make_dispatcher(group, 0, torch.device("cpu"), lambda *_: TOKENS_PER_TILE)
        return task(dispatcher, group, Choice(experts, halves(experts)))

    if case.num_ranks == 1:
        return [run(None, 0)]
    return ranks.run(case.num_ranks, lambda communicator: run(communicator, communicator.rank))


def halves(experts: Tensor) -> Tensor:
    """Weights 1/2, 1/4, 1/4: they sum to one without rounding."""
    num_per_token = experts.shape[1]
    powers = [min(k + 1, num_per_token - 1) for k in range(num_per_token)]
    return (0.5 ** torch.tensor(powers, dtype=torch.float32)).expand(experts.shape)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(case=cases())
@example(one_expert((4, 0, 3)))
@example(one_expert((0, 1, 0)))
@example(one_expert((0, 0, 1), num_chunks=3))
@example(one_expert((0, 0, 0)))
def test_identity_experts_give_back_what_was_dispatched(
    ranks: RankThreadsCache, case: Case
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-99, 99, (sum(case.tokens_per_rank), WIDTH), generator=generator).float()

    def task(dispatcher: Dispatcher, group: ExpertGroup, choice: Choice) -> Tensor:
        mine = hidden[case.of_rank(group.rank)]
        output = torch.full_like(mine, float("nan"))
        for receipt in dispatcher.route(choice, case.num_chunks):
            rows = dispatcher.dispatch(mine, receipt)
            pairs = rows[receipt.pair_row]
            output[receipt.tokens] = dispatcher.combine(pairs, choice.weights, receipt)
        return output

    assert torch.equal(torch.cat(on_every_rank(ranks, case, task)), hidden)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(case=cases())
@example(one_expert((4, 0, 3)))
def test_every_pair_is_computed_once_by_a_holder_of_its_expert(
    ranks: RankThreadsCache, case: Case
) -> None:
    """Rows carry their token's number, slots name their expert: the pairs say who met whom."""
    num_tokens = sum(case.tokens_per_rank)
    numbered = torch.arange(num_tokens).float()[:, None]
    expert_of_slot = {
        (rank, slot): expert
        for rank in range(case.num_ranks)
        for _, expert, slot in case.placement.hosted(rank)
    }

    def task(
        dispatcher: Dispatcher, group: ExpertGroup, choice: Choice
    ) -> tuple[list[tuple[int, int]], list[int], int]:
        met, rows_here = [], []
        for receipt in dispatcher.route(choice, case.num_chunks):
            rows = dispatcher.dispatch(numbered[case.of_rank(group.rank)], receipt)
            rows_here += rows[:, 0].int().tolist()
            groups = receipt.groups
            assert len(set(groups.slots.tolist())) == len(groups.slots)
            assert groups.num_pairs == len(receipt.pair_row)
            slots = groups.slots.repeat_interleave(groups.offsets.diff()).tolist()
            for row, slot in zip(receipt.pair_row.tolist(), slots, strict=True):
                met.append((int(rows[row, 0]), expert_of_slot[group.rank, slot]))
            dispatcher.combine(rows[receipt.pair_row], choice.weights, receipt)
        return met, rows_here, int(group.layer_pairs[0])

    results = on_every_rank(ranks, case, task)

    wanted = [
        (token, int(expert)) for token, chosen in enumerate(case.experts) for expert in chosen
    ]
    assert sorted(pair for met, _, _ in results for pair in met) == sorted(wanted)
    assert sum(num_pairs for _, _, num_pairs in results) == num_tokens * case.experts.shape[1]
    for met, rows_here, num_pairs in results:
        # One row per (token, rank), however many of its experts are there.
        assert len(rows_here) == len(set(rows_here))
        if case.num_ranks > 1:
            assert set(rows_here) == {token for token, _ in met}
        assert num_pairs == len(met)


@given(num_tokens=st.integers(0, 100), num_chunks=st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_chunks_cover_all_tokens_and_the_outer_ones_are_half_as_large(
    num_tokens: int, num_chunks: int
) -> None:
    spans = [chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks)]

    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(num_tokens))
    weights = [
        1 if num_chunks < 3 or chunk in (0, num_chunks - 1) else 2 for chunk in range(num_chunks)
    ]
    for span, weight in zip(spans, weights, strict=True):
        assert abs(span.stop - span.start - num_tokens * weight / sum(weights)) <= 1
