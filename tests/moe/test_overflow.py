"""No rank gets more than its capacity where another has room, and nobody else notices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.core import OverflowRule, StepOverflow
from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.moe.dispatch.host_receipt import HostReceiptWriter
from lightmoe.moe.dispatch.receipt import ReceiptWriter
from lightmoe.moe.gate import Choice, Gate
from lightmoe.moe.overflow import (
    Overflow,
    capacity_of,
    shares_of_excess,
    shares_of_room,
)
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.moe.route import pair_ranks
from lightmoe.moe.skew import RoutingSkew
from tests.moe.cases import LayerWeights, placement_of, random_copies
from tests.moe.test_receipt import plain
from tests.ranks import RankThreadsCache

WIDTH = 6
CPU = torch.device("cpu")
Mode = Literal["redirect", "drop"]
MODES: tuple[Mode, ...] = ("redirect", "drop")


@dataclass(frozen=True)
class Step:
    """One layer of one step of all ranks. The router leans to the experts of low number."""

    placement: Placement
    tokens_per_rank: tuple[int, ...]
    num_per_token: int
    route: str
    rule: OverflowRule
    lean: float
    seed: int
    renormalize: bool = True
    scale: float = 1.0

    @property
    def num_experts(self) -> int:
        return self.placement.num_experts

    @property
    def gate(self) -> Gate:
        generator = torch.Generator().manual_seed(self.seed)
        router = torch.randn(self.num_experts, WIDTH, generator=generator)
        router[:, 0] -= self.lean * torch.arange(self.num_experts)  # hidden states begin with 1
        return Gate(router, self.num_per_token, renormalize=self.renormalize, scale=self.scale)

    def hidden(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + self.seed + rank)
        hidden = torch.randn(self.tokens_per_rank[rank], WIDTH, generator=generator)
        hidden[:, 0] = 1
        return hidden

    def loads(self, choices: list[Choice]) -> np.ndarray:
        """Pairs of each rank [W], by the route that dispatchers take."""
        experts = np.concatenate([choice.experts.numpy() for choice in choices])
        sources = np.repeat(np.arange(len(choices)), self.tokens_per_rank)
        copies = self.placement.copies[0]
        ranks = pair_ranks(experts, sources, copies, len(choices), self.route)
        return np.bincount(ranks.ravel(), minlength=len(choices) + 1)[: len(choices)]


@dataclass(frozen=True)
class Outcome:
    """What the gate chose and what runs, of one rank."""

    before: Choice
    after: Choice
    step: StepOverflow


def decide(ranks: RankThreadsCache, step: Step, gate: Gate | None = None) -> list[Outcome]:
    """Every rank's decision."""
    gate = gate or step.gate

    def task(communicator: Communicator) -> Outcome:
        group = group_of(step, communicator.rank, communicator)
        overflow = Overflow(step.rule, group, communicator)
        hidden = step.hidden(communicator.rank)
        choice = gate(hidden)
        after = overflow(0, gate, hidden, choice)
        return Outcome(choice, after, overflow.take())

    return ranks.run(len(step.tokens_per_rank), task)


def group_of(step: Step, rank: int, communicator: Communicator | None = None) -> ExpertGroup:
    return ExpertGroup(
        rank=rank,
        placement=step.placement,
        communicator=communicator,
        route=step.route,
        layer_pairs=np.zeros(1, dtype=np.int64),
        tokens_per_rank=step.tokens_per_rank,
        deterministic=False,
    )


@st.composite
def steps(draw: st.DrawFn, modes: tuple[Mode, ...] = MODES) -> Step:
    """Any placement with replicas anywhere, any route."""
    seed = draw(st.integers(0, 2**31))
    generator = np.random.default_rng(seed)
    num_ranks = draw(st.sampled_from([2, 3, 5]))
    num_experts = draw(st.integers(2, 12))
    num_replicas = draw(st.integers(0, 12))
    copies = random_copies(generator, num_experts, num_ranks, num_replicas)
    return Step(
        placement=placement_of([copies], num_ranks),
        tokens_per_rank=tuple(
            draw(st.lists(st.integers(0, 30), min_size=num_ranks, max_size=num_ranks))
        ),
        num_per_token=draw(st.integers(1, min(3, num_experts))),
        route=draw(st.sampled_from(["none", "even", "waterfill"])),
        rule=OverflowRule(draw(st.sampled_from(modes)), draw(factors)),
        lean=draw(st.sampled_from([0.0, 0.3, 2.0])),
        seed=seed,
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


factors = st.sampled_from([1.0, 1.1, 1.25, 2.0])


def roomy(num_per_token: int, seed: int, factor: float, tokens: tuple[int, ...]) -> Step:
    """Every rank has K experts: so every token can go to any of them."""
    num_ranks = len(tokens)
    return Step(
        placement=initial_placement(1, num_per_token * num_ranks, num_ranks),
        tokens_per_rank=tokens,
        num_per_token=num_per_token,
        route="none",
        rule=OverflowRule("redirect", factor),
        lean=1.0,
        seed=seed,
    )


@settings(deadline=None, derandomize=True, max_examples=120)
@given(step=steps())
def test_tokens_keep_distinct_experts_and_the_fullest_rank_gets_no_fuller(
    ranks: RankThreadsCache, step: Step
) -> None:
    outcomes = decide(ranks, step)
    before = step.loads([one.before for one in outcomes])
    after = step.loads([one.after for one in outcomes])
    capacity = capacity_of(int(before.sum()), len(before), step.rule.capacity_factor)
    excess = (after - capacity).clip(min=0).sum()

    assert excess <= (before - capacity).clip(min=0).sum()
    assert {(one.step.num_layers, one.step.num_left) for one in outcomes} == {
        (int((before > capacity).any()), excess)
    }
    for one in outcomes:
        for experts in one.after.experts.tolist():
            kept = [expert for expert in experts if expert >= 0]
            assert kept
            assert len(set(kept)) == len(kept)
            assert step.rule.mode == "drop" or len(kept) == step.num_per_token
        moved = (one.after.experts != one.before.experts).sum(dim=1)
        assert one.step.moved_pairs.tolist() == moved.tolist()
        assert one.after.experts.dtype == one.before.experts.dtype
        same = moved == 0
        assert torch.equal(one.after.weights[same], one.before.weights[same])
        if not (before > capacity).any():
            assert one.after is one.before


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_per_token=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    factor=factors,
    tokens=st.lists(st.integers(0, 30), min_size=2, max_size=5).map(tuple),
)
def test_nobody_passes_the_capacity_where_every_rank_has_room_and_light_pairs_go_first(
    ranks: RankThreadsCache, num_per_token: int, seed: int, factor: float, tokens: tuple[int, ...]
) -> None:
    step = roomy(num_per_token, seed, factor, tokens)
    outcomes = decide(ranks, step)
    before = step.loads([one.before for one in outcomes])
    capacity = capacity_of(int(before.sum()), len(before), factor)

    after = step.loads([one.after for one in outcomes])
    assert after.max() <= capacity
    assert after.sum() == before.sum()
    assert sum(one.step.moved_pairs.sum() for one in outcomes) == (
        (before - capacity).clip(min=0).sum()
    )
    for one in outcomes:
        rank_of = torch.from_numpy(step.placement.homes[0])[one.before.experts]
        gone = one.after.experts != one.before.experts
        for rank in np.flatnonzero(before > capacity):
            here = rank_of == int(rank)
            left, stayed = one.before.weights[here & gone], one.before.weights[here & ~gone]
            if len(left) and len(stayed):
                assert left.max() <= stayed.min()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(step=steps())
def test_weights_are_those_that_the_gate_gives_such_experts(
    ranks: RankThreadsCache, step: Step
) -> None:
    for rank, one in enumerate(decide(ranks, step)):
        scores = (step.hidden(rank) @ step.gate.router_weight.t()).softmax(dim=1)
        if step.rule.mode == "drop":
            kept = one.after.experts >= 0
            assert torch.equal(one.after.weights, one.before.weights * kept)
            continue
        chosen = scores.gather(1, one.after.experts)
        if step.renormalize:
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        torch.testing.assert_close(one.after.weights, chosen * step.scale)


def test_the_next_best_expert_with_room_and_a_local_one_first(ranks: RankThreadsCache) -> None:
    """All tokens want expert 0 of rank 0; of what has room the best is taken, here if there is."""
    logits = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])  # order 0 2 4 3 1 5, two a rank
    gate = Gate(torch.cat([logits[:, None], torch.zeros(6, WIDTH - 1)], dim=1), 1, renormalize=True)
    step = Step(
        placement=placement_of([[[0], [0], [1], [1], [2], [2]]], 3),
        tokens_per_rank=(6, 6, 6),
        num_per_token=1,
        route="none",
        rule=OverflowRule("redirect", 2.0),
        lean=0.0,
        seed=0,
    )

    outcomes = decide(ranks, step, gate)

    counts = [np.bincount(one.after.experts.flatten(), minlength=6).tolist() for one in outcomes]
    assert counts == [[4, 0, 2, 0, 0, 0], [4, 0, 2, 0, 0, 0], [4, 0, 0, 0, 2, 0]]


@pytest.mark.parametrize("mode", MODES)
def test_a_made_up_gate_overflows_like_any(ranks: RankThreadsCache, mode: Mode) -> None:
    step = Step(
        placement=initial_placement(1, 8, 4),
        tokens_per_rank=(20, 0, 31, 9),
        num_per_token=2,
        route="none",
        rule=OverflowRule(mode, 1.0),
        lean=0.0,
        seed=0,
    )
    gate = RoutingSkew(2.0, seed=3).instead_of(step.gate, 0)

    outcomes = decide(ranks, step, gate)

    before = step.loads([one.before for one in outcomes])
    after = step.loads([one.after for one in outcomes])
    assert before.max() > 30 >= after.max()
    for one in outcomes:
        assert set(one.after.weights.flatten().tolist()) <= {0.0, 0.5}


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    num_ranks=st.integers(1, 6), factor=factors, seed=st.integers(0, 2**31), most=st.integers(0, 40)
)
def test_shares_add_up_and_nobody_gives_what_it_does_not_send(
    num_ranks: int, factor: float, seed: int, most: int
) -> None:
    pairs = np.random.default_rng(seed).integers(0, most + 1, (num_ranks, num_ranks))
    capacity = capacity_of(int(pairs.sum()), num_ranks, factor)
    load = pairs.sum(axis=0)

    excess = shares_of_excess(pairs, capacity)
    assert (excess.sum(axis=0) == (load - capacity).clip(min=0)).all()
    assert ((excess >= 0) & (excess <= pairs)).all()

    wanted = excess.sum(axis=1)
    room = shares_of_room(pairs, capacity, wanted)
    assert (room >= 0).all()
    assert (room.sum(axis=0) == (capacity - load).clip(min=0)).all()
    assert (room.sum(axis=1) >= wanted).all()  # the capacity is not below the mean


@pytest.mark.parametrize(
    ("num_pairs", "num_ranks", "factor", "capacity"),
    [(40, 4, 1.1, 11), (40, 4, 1.0, 10), (41, 4, 1.0, 11), (1, 4, 1.25, 1), (0, 4, 1.25, 0)],
)
def test_a_capacity_is_rounded_up(
    num_pairs: int, num_ranks: int, factor: float, capacity: int
) -> None:
    assert capacity_of(num_pairs, num_ranks, factor) == capacity


@settings(deadline=None, derandomize=True, max_examples=80)
@given(step=steps(modes=("drop",)), num_chunks=st.integers(1, 3), data=st.data())
def test_receipts_without_dropped_pairs_are_the_same_by_numpy_and_by_tensors(
    step: Step, num_chunks: int, data: st.DataObject
) -> None:
    num_tokens = sum(step.tokens_per_rank)
    generator = np.random.default_rng(step.seed)
    experts = np.argsort(generator.random((num_tokens, step.num_experts)), axis=1)
    experts = experts[:, : step.num_per_token]
    dropped = generator.random(experts.shape) < data.draw(st.sampled_from([0.1, 0.7]))
    dropped[np.arange(num_tokens), generator.integers(0, step.num_per_token, num_tokens)] = False
    everyone = torch.from_numpy(np.where(dropped, -1, experts))
    num_pairs = 0
    for rank in range(len(step.tokens_per_rank)):
        ours, theirs = group_of(step, rank), group_of(step, rank)
        found = ReceiptWriter(ours, 0, CPU, lambda *_: 4)(everyone, num_chunks)
        wanted = HostReceiptWriter(theirs, 0)(everyone, num_chunks)

        assert [plain(one) for one in found] == [plain(one) for one in wanted]
        assert ours.layer_pairs.tolist() == theirs.layer_pairs.tolist()
        num_pairs += int(ours.layer_pairs[0])
    assert num_pairs == (~dropped).sum()


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_answers_with_what_runs(
    ranks: RankThreadsCache, mode: Mode, num_chunks: int
) -> None:
    """Over gloo, against the sum of the experts that were decided on; work that is dropped is."""
    weights = LayerWeights.random(3, num_experts=8, num_per_token=2, width=WIDTH, expert_width=4)
    weights.router[:, 0] -= torch.arange(8.0)
    step = Step(
        placement=placement_of([[[0], [0, 2], [0], [1], [1], [2, 0], [2], [2]]], 3),
        tokens_per_rank=(12, 3, 20),
        num_per_token=2,
        route="waterfill",
        rule=OverflowRule(mode, 1.1),
        lean=0.0,
        seed=5,
    )

    def task(communicator: Communicator) -> tuple[Tensor, Choice, int]:
        rank = communicator.rank
        layer, group = weights.on_rank(
            rank,
            step.placement,
            communicator,
            route=step.route,
            num_chunks=num_chunks,
            tokens_per_rank=step.tokens_per_rank,
            deterministic=False,
        )
        layer.overflow = Overflow(step.rule, group, communicator)  # noqa: SLF001
        hidden = step.hidden(rank)
        output = layer(hidden)
        choice = Overflow(step.rule, group, communicator)(0, layer.gate, hidden, layer.gate(hidden))
        return output, choice, int(group.layer_pairs[0])

    results = ranks.run(3, task)

    kept = sum(int((choice.experts >= 0).sum()) for _, choice, _ in results)
    assert sum(num_pairs for _, _, num_pairs in results) == kept
    assert (kept < 70) == (mode == "drop")
    for rank, (output, choice, _) in enumerate(results):
        wanted = torch.stack(
            [
                sum_of_experts(weights, row, experts, share)
                for row, experts, share in zip(
                    step.hidden(rank), choice.experts.tolist(), choice.weights, strict=True
                )
            ]
        )
        torch.testing.assert_close(output, wanted)


def sum_of_experts(weights: LayerWeights, row: Tensor, experts: list[int], share: Tensor) -> Tensor:
    total = torch.zeros_like(row)
    for expert, weight in zip(experts, share, strict=True):
        if expert >= 0:
            gate, up, down = weights.gates[expert], weights.ups[expert], weights.downs[expert]
            total += weight * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    return total
