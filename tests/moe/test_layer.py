"""The answer of a layer: the same bits wherever its experts are and however its tokens travel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from lightmoe.distributed.communicator import Communicator
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.moe.route import ROUTES
from tests.moe.cases import LayerWeights, placement_of, random_copies
from tests.ranks import RankThreadsCache

SIZES = [(8, 2, 32, 48), (7, 3, 20, 33)]  # experts, per token, width, expert width
NUM_TOKENS = 40


@dataclass(frozen=True)
class Plan:
    """One of the many ways to compute the same layer."""

    placement: Placement
    tokens_per_rank: tuple[int, ...]
    route: str
    num_chunks: int


def cut(generator: np.random.Generator, num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    """A random split of the tokens over the ranks, often with empty ones."""
    borders = np.sort(generator.integers(0, num_tokens + 1, size=num_ranks - 1))
    return tuple(np.diff([0, *borders, num_tokens]).tolist())


@st.composite
def plans(draw: st.DrawFn, num_experts: int) -> Plan:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.sampled_from([1, 2, 3, 5]))
    copies = random_copies(generator, num_experts, num_ranks, draw(st.integers(0, 20)))
    return Plan(
        placement=placement_of([copies], num_ranks),
        tokens_per_rank=cut(generator, NUM_TOKENS, num_ranks),
        route=draw(st.sampled_from(sorted(ROUTES))),
        num_chunks=draw(st.integers(1, 5)),
    )


def layer_output(
    ranks: RankThreadsCache, weights: LayerWeights, hidden: Tensor, plan: Plan
) -> tuple[Tensor, np.ndarray, list[int]]:
    """Output [T, D] of all ranks, load [E], and the pairs that each rank computed."""
    parts = hidden.split(list(plan.tokens_per_rank))

    def run(communicator: Communicator | None, rank: int) -> tuple[Tensor, np.ndarray, int]:
        layer, group = weights.on_rank(
            rank,
            plan.placement,
            communicator,
            route=plan.route,
            num_chunks=plan.num_chunks,
            tokens_per_rank=plan.tokens_per_rank,
        )
        return layer(parts[rank].clone()), layer.load.take()[0], int(group.layer_pairs[0])

    if len(plan.tokens_per_rank) == 1:
        results = [run(None, 0)]
    else:
        results = ranks.run(len(parts), lambda communicator: run(communicator, communicator.rank))
    outputs, loads, pairs = zip(*results, strict=True)
    return torch.cat(outputs), np.sum(loads, axis=0), list(pairs)


def alone(weights: LayerWeights) -> Plan:
    placement = initial_placement(1, len(weights.router), 1)
    return Plan(placement, (NUM_TOKENS,), "none", 1)


def naive_output(weights: LayerWeights, hidden: Tensor) -> Tensor:
    """Every token by itself, from the definition, in double precision."""
    output = []
    for token in hidden.double():
        scores = (weights.router.double() @ token).softmax(dim=0)
        best = scores.topk(weights.num_per_token)
        total = torch.zeros_like(token)
        for weight, expert in zip(
            best.values / best.values.sum(), best.indices.tolist(), strict=True
        ):
            inner = silu(weights.gates[expert].double() @ token)
            inner = inner * (weights.ups[expert].double() @ token)
            total += weight * (weights.downs[expert].double() @ inner)
        output.append(total)
    return torch.stack(output)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_rank_computes_what_the_definition_says(
    ranks: RankThreadsCache, sizes: tuple[int, int, int, int]
) -> None:
    weights = LayerWeights.random(5, *sizes)
    hidden = torch.randn(NUM_TOKENS, sizes[2], generator=torch.Generator().manual_seed(6))

    output, load, pairs = layer_output(ranks, weights, hidden, alone(weights))

    torch.testing.assert_close(output.double(), naive_output(weights, hidden), rtol=0, atol=1e-5)
    assert load.sum() == sum(pairs) == NUM_TOKENS * sizes[1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_the_answer_has_the_same_bits_for_any_plan(
    ranks: RankThreadsCache, sizes: tuple[int, int, int, int], data: st.DataObject
) -> None:
    weights = LayerWeights.random(7, *sizes)
    hidden = torch.randn(NUM_TOKENS, sizes[2], generator=torch.Generator().manual_seed(8))
    plan = data.draw(plans(sizes[0]))

    output, load, pairs = layer_output(ranks, weights, hidden, plan)

    wanted, wanted_load, _ = layer_output(ranks, weights, hidden, alone(weights))
    assert torch.equal(output, wanted)
    assert load.tolist() == wanted_load.tolist()
    assert sum(pairs) == NUM_TOKENS * sizes[1]


@pytest.mark.parametrize("tokens_per_rank", [(1, 0, 0), (0, 0, 1)])
def test_one_token_in_all_has_the_same_bits_too(
    ranks: RankThreadsCache, tokens_per_rank: tuple[int, ...]
) -> None:
    weights = LayerWeights.random(9, *SIZES[0])
    hidden = torch.randn(NUM_TOKENS, SIZES[0][2], generator=torch.Generator().manual_seed(10))
    placement = initial_placement(1, SIZES[0][0], 3, num_spares=1, replicas_per_layer=8)
    plan = Plan(placement, tokens_per_rank, "waterfill", 2)

    output, _, _ = layer_output(ranks, weights, hidden[:1], plan)

    wanted, _, _ = layer_output(ranks, weights, hidden, alone(weights))
    assert torch.equal(output, wanted[:1])


def test_a_shared_expert_is_added_to_what_the_others_say(ranks: RankThreadsCache) -> None:
    weights = LayerWeights.random(11, *SIZES[0])
    hidden = torch.randn(6, SIZES[0][2], generator=torch.Generator().manual_seed(12))
    placement = initial_placement(1, SIZES[0][0], 1)
    layer, _ = weights.on_rank(
        0, placement, None, route="none", num_chunks=1, tokens_per_rank=(len(hidden),)
    )
    without = layer(hidden)

    layer.shared_expert = lambda rows: 2.0 * rows

    assert torch.equal(layer(hidden), without + 2.0 * hidden)


def test_without_determinism_the_experts_apply_the_weights(ranks: RankThreadsCache) -> None:
    weights = LayerWeights.random(13, *SIZES[0])
    hidden = torch.randn(NUM_TOKENS, SIZES[0][2], generator=torch.Generator().manual_seed(14))
    layers = [
        weights.on_rank(
            0,
            initial_placement(1, SIZES[0][0], 1),
            None,
            route="none",
            num_chunks=num_chunks,
            tokens_per_rank=(NUM_TOKENS,),
            deterministic=deterministic,
        )[0]
        for deterministic, num_chunks in ((True, 1), (False, 1), (False, 3))
    ]

    wanted, *found = (layer(hidden) for layer in layers)

    for output in found:
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    (receipt,) = layers[1].dispatcher.route(
        layers[1].gate(hidden, layers[1].dispatcher.pair_sort), 1
    )
    assert receipt.pair_weight is not None
    choice = layers[1].gate(hidden)
    assert torch.equal(receipt.pair_weight[receipt.pair_index.long()], choice.weights)
