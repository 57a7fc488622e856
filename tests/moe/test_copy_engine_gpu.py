"""The copy_engine transport: real processes on real cards, both roads, against a rank alone."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from moe.cases import (
    LayerWeights,
    placement_of,
    poison_results,
    random_copies,
    random_nearness,
)
from moe.gpu_ranks import run_on_ranks
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.peers import PeerMemory, Road, gather_bytes
from lightmoe.errors import RankError
from lightmoe.moe.dispatch import CopyEngineDispatcher, ExpertGroup, make_dispatcher
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.upload import Upload
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.halves import InFlight
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.moe.route import Nearness
from lightmoe.quant.packing import ExpertLayout

pytestmark = pytest.mark.gpu

NUM_EXPERTS, PER_TOKEN, WIDTH, EXPERT_WIDTH, MAX_TOKENS = 16, 4, 256, 128, 70


class SlowUpload(Upload):
    """An upload whose chunks come late, or not."""

    def __init__(self, stream: torch.cuda.Stream, rng: random.Random) -> None:
        super().__init__(stream)
        self._rng = rng

    def of_another_lane(self) -> SlowUpload:
        return SlowUpload(self.stream, self._rng)

    def _copy(self, parts: Sequence[tuple[Tensor, Tensor]], rows: slice) -> None:
        _delay(self._rng, self.stream)
        super()._copy(parts, rows)


@dataclass
class Rank:
    """What a rank's layers share, and how to make them."""

    communicator: Communicator
    device: torch.device
    lane: PeerLane
    dtype: torch.dtype
    weights: LayerWeights

    @classmethod
    def join(
        cls,
        communicator: Communicator,
        device: torch.device,
        road: Road,
        dtype: torch.dtype,
        timeout_seconds: float = 60.0,
        max_tokens: int = MAX_TOKENS,
        per_token: int = PER_TOKEN,
        width: int = WIDTH,
    ) -> Rank:
        layout = ArenaLayout(
            num_ranks=communicator.num_ranks,
            max_tokens=max_tokens,
            num_experts=NUM_EXPERTS,
            num_experts_per_token=per_token,
            width=width,
            element_bytes=dtype.itemsize,
        )
        memory = PeerMemory(communicator, device, layout.num_bytes, road)
        lane = PeerLane(
            layout, memory, communicator.rank, 1, dtype, device, timeout_seconds, exchange_ctas=4
        )
        weights = LayerWeights.random(0, NUM_EXPERTS, per_token, width, EXPERT_WIDTH)
        return cls(communicator, device, lane, dtype, weights)

    def layer(
        self,
        placement: Placement,
        route: str,
        num_chunks: int,
        alone: bool = False,
        nearness: Nearness = (),
        second_lane: PeerLane | None = None,
    ) -> tuple[MoELayer, ExpertGroup]:
        rank = 0 if alone else self.communicator.rank
        group = ExpertGroup(
            rank=rank,
            placement=placement,
            communicator=None if alone else self.communicator,
            route=route,
            layer_pairs=np.zeros(1, dtype=np.int64),
            peers=None if alone else self.lane,
            nearness=nearness,
        )
        sizes = self.lane.layout
        layout = ExpertLayout(sizes.width, EXPERT_WIDTH)
        pool = SlotPool(placement.num_slots(rank), layout, self.dtype, self.device)
        w = self.weights
        for _, expert, slot in placement.hosted(rank):
            parts = (w.gates[expert], w.ups[expert], w.downs[expert])
            layout.write(pool.blobs[slot], *(part.to(pool.blobs) for part in parts))
        experts = Experts(pool)
        layer = MoELayer(
            0,
            Gate(
                w.router.to(self.device, self.dtype), sizes.num_experts_per_token, renormalize=True
            ),
            LoadCounter(1, NUM_EXPERTS, self.device),
            make_dispatcher(group, 0, self.device, experts.tokens_per_tile),
            experts,
            overlap=Overlap(num_chunks=num_chunks, expert_ctas=64),
            second_dispatcher=None
            if second_lane is None
            else CopyEngineDispatcher(group, 0, second_lane, experts.tokens_per_tile),
        )
        return layer, group

    def second_lane(self, road: Road) -> PeerLane:
        """One for the second half of a step."""
        lane, num_bytes = self.lane, self.lane.layout.num_bytes
        memory = PeerMemory(self.communicator, self.device, num_bytes, road)
        fields = (lane.layout, memory, lane.rank, 1, self.dtype, self.device, 60.0)
        return PeerLane(*fields, exchange_ctas=4, like=lane)

    def delay_uploads(self) -> None:
        """Have delays before the chunks of hidden states that go through the host."""
        if self.lane.upload is not None:
            self.lane.upload = SlowUpload(self.lane.upload.stream, random.Random(self.lane.rank))

    def hidden(self, num_tokens: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(num_tokens, self.lane.layout.width, generator=generator)
        return rows.to(self.device, self.dtype)

    def barrier(self) -> None:
        torch.cuda.synchronize(self.device)
        gather_bytes(self.communicator, b"x")


def _delay(rng: random.Random, stream: torch.cuda.Stream) -> None:
    if rng.random() < 0.4:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(rng.randrange(1, 400_000))
    if rng.random() < 0.2:
        time.sleep(rng.random() * 2e-3)


def _many_steps(
    communicator: Communicator, device: torch.device, road: Road, dtype: torch.dtype, steps: int
) -> None:
    """Random placements, routes, token counts, chunks and delays: always the bits of one rank."""
    rank = Rank.join(communicator, device, road, dtype)
    rank.delay_uploads()
    num_ranks = communicator.num_ranks
    shared, own = random.Random(7), random.Random(communicator.rank)
    numbers = np.random.default_rng(3)
    alone, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    plans = []
    for number, (chunks, route) in enumerate(
        itertools.product((1, 2, 3, 4), ("waterfill", "even", "none"))
    ):
        copies = random_copies(numbers, NUM_EXPERTS, num_ranks, 8 * (number % 3))
        nearness = random_nearness(numbers, num_ranks) if number % 2 else ()
        placement = placement_of([copies], num_ranks)
        plans.append(rank.layer(placement, route, chunks, nearness=nearness))
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
        _delay(own, torch.cuda.current_stream())
        _delay(own, rank.lane.stream)
        answer = layer(hidden)
        rank.lane.pair_counter.count()
        expected = alone(hidden) if len(hidden) else hidden
        rank.lane.check()
        counted = alone.load.take() if len(hidden) else np.zeros((1, NUM_EXPERTS), dtype=np.int32)
        np.testing.assert_array_equal(layer.load.take(), counted)
        if dtype == torch.float32:
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(answer, expected), f"step {step}: {group.tokens_per_rank}"
    rank.barrier()


def _graph(communicator: Communicator, device: torch.device, road: Road, num_chunks: int) -> None:
    """Two layers captured once answer every replay's own hidden states."""
    rank = Rank.join(communicator, device, road, torch.bfloat16)
    rank.delay_uploads()
    num_ranks = communicator.num_ranks
    alone, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    layer, group = rank.layer(initial_placement(1, NUM_EXPERTS, num_ranks), "waterfill", num_chunks)
    group.tokens_per_rank = (8,) * num_ranks if num_chunks == 1 else (MAX_TOKENS, 5, 0)
    num_tokens = group.tokens_per_rank[communicator.rank]
    hidden = rank.hidden(num_tokens, 0)
    layer(layer(hidden))
    rank.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = layer(layer(hidden))
    rank.barrier()
    for step in range(20):
        hidden.copy_(rank.hidden(num_tokens, 100 * step + communicator.rank))
        graph.replay()
        rank.lane.check()
        expected = alone(alone(hidden)) if num_tokens else hidden
        assert torch.equal(answer, expected), f"replay {step}"
    rank.barrier()


def _behind_each_other(
    communicator: Communicator, device: torch.device, road: Road, num_chunks: int, in_halves: bool
) -> None:
    """Layers enqueued without a look at any, hidden states overwritten as soon as they may be."""
    rank = Rank.join(communicator, device, road, torch.bfloat16)
    rank.delay_uploads()
    num_ranks, me = communicator.num_ranks, communicator.rank
    second = rank.second_lane(road) if in_halves else None
    shared, own = random.Random(5), random.Random(me)
    alone, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    placement = initial_placement(1, NUM_EXPERTS, num_ranks)
    layer, group = rank.layer(placement, "waterfill", num_chunks, second_lane=second)
    group.in_halves = in_halves
    steps = []
    for number in range(24):
        tokens = [0 if shared.random() < 0.2 else shared.randrange(71) for _ in range(num_ranks)]
        tokens[number % num_ranks] = MAX_TOKENS
        steps.append((tuple(tokens), rank.hidden(tokens[me], 10 * number + me)))
    rank.barrier()
    answers: list[Tensor] = []
    waiting: list[InFlight] = []
    for tokens, hidden in steps:
        for stream in (torch.cuda.current_stream(), rank.lane.stream):
            _delay(own, stream)
        if in_halves:
            waiting = _begin_halves(layer, group, hidden, tokens, waiting, answers)
        else:
            group.tokens_per_rank = tokens
            answers.append(layer(hidden.clone()))
            rank.lane.pair_counter.count()
        torch.full_like(hidden, float("nan"))
    answers += [layer.finish(flight) for flight in waiting]
    if second is not None:
        answers = [torch.cat(answers[first : first + 2]) for first in range(0, len(answers), 2)]
        second.check()
    rank.barrier()
    rank.lane.check()
    for number, ((_, hidden), answer) in enumerate(zip(steps, answers, strict=True)):
        assert torch.equal(answer, alone(hidden) if len(hidden) else hidden), f"step {number}"
    rank.barrier()


def _begin_halves(
    layer: MoELayer,
    group: ExpertGroup,
    hidden: Tensor,
    tokens: Sequence[int],
    waiting: Sequence[InFlight],
    answers: list[Tensor],
) -> list[InFlight]:
    """A layer in two halves, each behind the same one of the layer before, as a decoder does it."""
    first = tuple(count // 2 for count in tokens)
    second = tuple(count - half for count, half in zip(tokens, first, strict=True))
    flights: list[InFlight] = []
    parts = hidden.split([first[group.rank], second[group.rank]])
    for half, (part, counts) in enumerate(zip(parts, (first, second), strict=True)):
        if waiting:
            answers.append(layer.finish(waiting[half]))
        group.tokens_per_rank = counts
        flights.append(layer.begin(part.clone(), half))
    for flight in flights:
        layer.compute(flight)
    return flights


def _stalled(communicator: Communicator, device: torch.device, road: Road, num_chunks: int) -> None:
    """Rank 1 never comes: everyone else says so."""
    rank = Rank.join(communicator, device, road, torch.bfloat16, timeout_seconds=2.0)
    num_ranks = communicator.num_ranks
    layer, group = rank.layer(initial_placement(1, NUM_EXPERTS, num_ranks), "none", num_chunks)
    group.tokens_per_rank = (8,) * num_ranks
    rank.barrier()
    if communicator.rank != 1:
        started = time.monotonic()
        layer(rank.hidden(8, 0))
        torch.cuda.synchronize()
        with pytest.raises(RankError, match="rank 1 did not answer"):
            rank.lane.check()
        assert time.monotonic() - started < 20
    gather_bytes(communicator, b"x")


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize(
    ("num_ranks", "dtype", "steps"),
    [
        (1, torch.bfloat16, 50),
        (4, torch.bfloat16, 200),
        (4, torch.float32, 40),
        (10, torch.bfloat16, 40),
    ],
    ids=["1-bf16", "4-bf16", "4-fp32", "10-bf16"],
)
def test_ranks_give_the_bits_of_a_rank_alone(
    road: Road, num_ranks: int, dtype: torch.dtype, steps: int
) -> None:
    """With delays between the stages, poisoned buffers, replicas and changing counts."""
    run_on_ranks(num_ranks, _many_steps, road, dtype, steps)


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize("num_chunks", [1, 4])
def test_a_graph_of_a_layer_answers_every_replay(road: Road, num_chunks: int) -> None:
    """Sizes, counts and the route are the device's business."""
    run_on_ranks(3, _graph, road, num_chunks)


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize(
    ("num_chunks", "in_halves"), [(1, False), (4, False), (1, True)], ids=["1", "4", "halves"]
)
def test_layers_behind_each_other_have_the_rows_of_their_own(
    road: Road, num_chunks: int, in_halves: bool
) -> None:
    """Nobody's hidden states are overwritten, here or where others read them, before all have."""
    run_on_ranks(4, _behind_each_other, road, num_chunks, in_halves)


@pytest.mark.parametrize(("road", "num_chunks"), [("ipc", 1), ("host", 1), ("host", 3)])
def test_a_stalled_rank_is_named(road: Road, num_chunks: int) -> None:
    """Within the timeout, and nothing hangs."""
    run_on_ranks(3, _stalled, road, num_chunks)


def _large_steps(
    communicator: Communicator,
    device: torch.device,
    road: Road,
    dtype: torch.dtype,
    per_token: int,
    width: int,
) -> None:
    """Steps whose rows are copied in bulk."""
    rank = Rank.join(
        communicator, device, road, dtype, max_tokens=4200, per_token=per_token, width=width
    )
    num_ranks = communicator.num_ranks
    alone, _ = rank.layer(initial_placement(1, NUM_EXPERTS, 1), "none", 1, alone=True)
    placement = placement_of(
        [random_copies(np.random.default_rng(1), NUM_EXPERTS, num_ranks, 8)], num_ranks
    )
    for num_chunks, tokens in itertools.product(
        (1, 2, 4), ((4200, 4200, 4200), (4100, 0, 1030), (3, 4200, 2100))
    ):
        layer, group = rank.layer(placement, "waterfill", num_chunks)
        group.tokens_per_rank = tokens
        hidden = rank.hidden(tokens[communicator.rank], num_chunks)
        rank.barrier()
        rank.lane.rows.fill_(float("nan"))
        poison_results(rank.lane)
        rank.barrier()
        answer = layer(hidden)
        rank.lane.pair_counter.count()
        expected = alone(hidden) if len(hidden) else hidden
        rank.lane.check()
        if dtype == torch.float32:
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(answer, expected), f"{num_chunks} chunks of {tokens}"
    rank.barrier()


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize(
    ("dtype", "per_token", "width"),
    [
        (torch.bfloat16, PER_TOKEN, WIDTH),
        (torch.float32, PER_TOKEN, WIDTH),
        (torch.bfloat16, 3, 2056),  # two pieces a row
        (torch.bfloat16, 12, 2056),  # too many pairs for two looks at once
        (torch.float16, 8, 64),
    ],
    ids=str,
)
def test_large_steps_give_the_bits_of_a_rank_alone(
    road: Road, dtype: torch.dtype, per_token: int, width: int
) -> None:
    """Through shared memory, by bulk copies, where cards have them."""
    run_on_ranks(3, _large_steps, road, dtype, per_token, width)
