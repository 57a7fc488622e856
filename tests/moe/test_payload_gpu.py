"""copy_engine with sums at the expert's rank, as they are and as int8: real ranks on real cards."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from moe.cases import LayerWeights, placement_of, poison_results, random_copies
from moe.gpu_ranks import run_on_ranks
from moe.test_copy_engine_gpu import EXPERT_WIDTH, MAX_TOKENS, NUM_EXPERTS, PER_TOKEN, WIDTH, Rank
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import PeerMemory, Road
from lightmoe.kernels import reference
from lightmoe.kernels.permute import dequantize_rows, permute_int8
from lightmoe.moe.dispatch import make_dispatcher
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.summing import SummingLane
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.placement import Placement, initial_placement

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
ROADS = pytest.mark.parametrize("road", ["ipc", "host"])
PAYLOADS = pytest.mark.parametrize("as_int8", [True, False], ids=["int8", "full"])


def join(
    communicator: Communicator,
    device: torch.device,
    road: Road,
    *,
    as_int8: bool,
    summed: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> Rank:
    """A rank that gives sums, or else results."""
    layout = ArenaLayout(
        num_ranks=communicator.num_ranks,
        max_tokens=max_tokens,
        num_experts=NUM_EXPERTS,
        num_experts_per_token=PER_TOKEN,
        width=WIDTH,
        element_bytes=DTYPE.itemsize,
        summed=summed,
        as_int8=as_int8,
    )
    memory = PeerMemory(communicator, device, layout.num_bytes, road)
    kind = SummingLane if summed else PeerLane
    lane = kind(layout, memory, communicator.rank, 1, DTYPE, device, 60.0, exchange_ctas=4)
    weights = LayerWeights.random(0, NUM_EXPERTS, PER_TOKEN, WIDTH, EXPERT_WIDTH)
    return Rank(communicator, device, lane, DTYPE, weights)


def alone_with_weights(rank: Rank) -> MoELayer:
    """The layer of a rank alone, whose experts apply the routing weights."""
    layer, group = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    group.deterministic = False
    layer.dispatcher = make_dispatcher(group, 0, rank.device, layer.experts.tokens_per_tile)
    return layer


def homes_of(placement: Placement, device: torch.device) -> Tensor:
    """The rank of each expert [E], of a placement without replicas."""
    return torch.tensor([ranks[0] for ranks in placement.copies[0]], device=device)


def expected(alone: MoELayer, hidden: Tensor, homes: Tensor, as_int8: bool) -> Tensor:
    """The layer's answer [T, D] as this exchange rounds it."""
    rows = hidden
    if as_int8:
        numbers = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        rows = dequantize_rows(*permute_int8(hidden, numbers), hidden.dtype)
    choice = alone.gate(hidden, None)
    (receipt,) = alone.dispatcher.route(choice, 1)
    pairs = alone.experts(alone.dispatcher.dispatch(rows, receipt), receipt)
    assert receipt.pair_index is not None
    results = pairs[receipt.pair_index.long()].float()  # [T, K, D], weighted
    target = homes[choice.experts.long()]
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for rank in range(int(homes.max()) + 1):
        part, here = torch.zeros_like(total), target == rank
        for k in range(PER_TOKEN):
            part = torch.where(here[:, k, None], part + results[:, k], part)
        if as_int8:
            codes, scales = reference.permute_int8(
                part, torch.arange(len(part), device=part.device)
            )
            part = scales[:, None] * codes.float()
        else:
            part = part.to(hidden.dtype).float()
        total = torch.where(here.any(dim=1, keepdim=True), total + part, total)
    return total.to(hidden.dtype)


def _many_steps(
    communicator: Communicator, device: torch.device, road: Road, as_int8: bool, steps: int
) -> None:
    """Token counts, chunks and delays at random: always the bits of that arithmetic."""
    rank = join(communicator, device, road, as_int8=as_int8)
    rank.delay_uploads()
    num_ranks = communicator.num_ranks
    shared, own = random.Random(7), random.Random(communicator.rank)
    placement = initial_placement(1, NUM_EXPERTS, num_ranks)
    alone, homes = alone_with_weights(rank), homes_of(placement, device)
    plans = [rank.layer(placement, "none", chunks) for chunks in (1, 2, 4)]
    for step in range(steps):
        layer, group = shared.choice(plans)
        group.tokens_per_rank = tuple(
            0 if shared.random() < 0.2 else shared.randrange(1, MAX_TOKENS + 1)
            for _ in range(num_ranks)
        )
        if not any(group.tokens_per_rank):
            continue
        hidden = rank.hidden(
            group.tokens_per_rank[communicator.rank], 1000 * step + own.randrange(9)
        )
        if step % 10 == 0:
            rank.barrier()
            rank.lane.rows.fill_(float("nan"))
            poison_results(rank.lane)
            rank.barrier()
        for stream in (torch.cuda.current_stream(), rank.lane.stream):
            if own.random() < 0.4:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(own.randrange(1, 400_000))
        answer = layer(hidden)
        rank.lane.pair_counter.count()
        wanted = expected(alone, hidden, homes, as_int8) if len(hidden) else hidden
        rank.lane.check()
        assert torch.equal(answer, wanted), f"step {step}: {group.tokens_per_rank}"
    rank.barrier()


def _many_tokens(
    communicator: Communicator, device: torch.device, road: Road, summed: bool, as_int8: bool
) -> None:
    """So many that sm_90 takes its bulk copies; two steps, in one piece and in two."""
    counts = (1100, 0, 2100)
    rank = join(communicator, device, road, as_int8=as_int8, summed=summed, max_tokens=max(counts))
    placement = initial_placement(1, NUM_EXPERTS, len(counts))
    homes = homes_of(placement, device)
    plain, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    alone = alone_with_weights(rank)
    for chunks in (1, 2):
        layer, group = rank.layer(placement, "none", chunks)
        group.tokens_per_rank = counts
        hidden = rank.hidden(counts[communicator.rank], chunks)
        answer = layer(hidden)
        rank.lane.check()
        if len(hidden):
            wanted = expected(alone, hidden, homes, as_int8) if summed else plain(hidden)
            assert torch.equal(answer, wanted)
    rank.barrier()


def _replicas(communicator: Communicator, device: torch.device, road: Road, as_int8: bool) -> None:
    """Wherever a token's copies are, the answer is near that of a rank alone."""
    rank = join(communicator, device, road, as_int8=as_int8)
    num_ranks = communicator.num_ranks
    alone, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    copies = random_copies(np.random.default_rng(3), NUM_EXPERTS, num_ranks, 12)
    layer, group = rank.layer(placement_of([copies], num_ranks), "waterfill", 2)
    for step in range(10):
        group.tokens_per_rank = (MAX_TOKENS,) * num_ranks
        hidden = rank.hidden(MAX_TOKENS, 10 * step + communicator.rank)
        answer, wanted = layer(hidden).float(), alone(hidden).float()
        rank.lane.check()
        error = (answer - wanted).norm() / wanted.norm()
        assert error < (0.03 if as_int8 else 0.01), f"step {step}: {error:.4f}"
    rank.barrier()


def _graph(communicator: Communicator, device: torch.device, road: Road, as_int8: bool) -> None:
    """A layer captured once answers every replay's own hidden states, padded ones left out."""
    rank = join(communicator, device, road, as_int8=as_int8)
    num_ranks = communicator.num_ranks
    placement = initial_placement(1, NUM_EXPERTS, num_ranks)
    alone, homes = alone_with_weights(rank), homes_of(placement, device)
    layer, group = rank.layer(placement, "waterfill", 1)
    group.tokens_per_rank = (8,) * num_ranks
    group.num_real = torch.full((1,), 5, dtype=torch.int32, device=device)
    hidden = rank.hidden(8, 0)
    layer(hidden)
    rank.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = layer(hidden)
    rank.barrier()
    for step in range(20):
        hidden.copy_(rank.hidden(8, 100 * step + communicator.rank))
        graph.replay()
        rank.lane.check()
        wanted = expected(alone, hidden, homes, as_int8)
        assert torch.equal(answer[:5], wanted[:5]), f"replay {step}"
    rank.barrier()


def _bytes(
    communicator: Communicator, device: torch.device, road: Road, summed: bool, as_int8: bool
) -> None:
    """rows x bytes of a row + results x bytes of a result, for each rank, over two steps."""
    rank = join(communicator, device, road, as_int8=as_int8, summed=summed)
    num_ranks, me = communicator.num_ranks, communicator.rank
    placement = initial_placement(1, NUM_EXPERTS, num_ranks)
    homes = homes_of(placement, device)
    layer, group = rank.layer(placement, "none", 2)
    assert group.take_bytes_sent() == ()
    rank.lane.count_sent()
    wanted = torch.zeros(num_ranks, dtype=torch.int64, device=device)
    for step in range(2):
        group.tokens_per_rank = tuple(MAX_TOKENS - other for other in range(num_ranks))
        everyone = [rank.hidden(MAX_TOKENS - other, step) for other in range(num_ranks)]
        layer(everyone[me])
        rank.lane.check()
        for other, hidden in enumerate(everyone):
            if other == me:
                continue
            there = homes[layer.gate(everyone[me], None).experts.long()] == other
            here = homes[layer.gate(hidden, None).experts.long()] == me
            wanted[other] += there.any(dim=1).sum()
            wanted[other] += here.any(dim=1).sum() if summed else here.sum()
    wanted *= WIDTH + 4 if as_int8 else 2 * WIDTH
    assert group.take_bytes_sent() == tuple(wanted.tolist())
    assert not any(group.take_bytes_sent())
    rank.barrier()


@ROADS
@PAYLOADS
@pytest.mark.parametrize(("num_ranks", "steps"), [(1, 20), (4, 100), (10, 20)])
def test_the_bits_are_those_of_the_arithmetic(
    road: Road, as_int8: bool, num_ranks: int, steps: int
) -> None:
    """With delays, poisoned buffers, chunks and changing counts."""
    run_on_ranks(num_ranks, _many_steps, road, as_int8, steps)


@ROADS
@pytest.mark.parametrize(
    ("summed", "as_int8"), [(False, False), (True, False), (True, True)], ids=str
)
def test_many_tokens_give_the_same_bits(road: Road, summed: bool, as_int8: bool) -> None:
    run_on_ranks(3, _many_tokens, road, summed, as_int8)


@ROADS
@PAYLOADS
def test_replicas_change_little(road: Road, as_int8: bool) -> None:
    run_on_ranks(4, _replicas, road, as_int8)


@ROADS
@PAYLOADS
def test_a_graph_of_a_layer_answers_every_replay(road: Road, as_int8: bool) -> None:
    run_on_ranks(3, _graph, road, as_int8)


@pytest.mark.parametrize(
    ("summed", "as_int8"), [(False, False), (True, False), (True, True)], ids=str
)
def test_what_crosses_each_link_is_the_formula(summed: bool, as_int8: bool) -> None:
    run_on_ranks(3, _bytes, "ipc", summed, as_int8)
