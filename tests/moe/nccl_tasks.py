"""What the ranks of test_nccl_gpu.py do, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.communicator import Transfer
from lightmoe.errors import RankError
from lightmoe.moe.dispatch import ExpertGroup, make_dispatcher
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.quant.packing import ExpertLayout
from tests.gpu_ranks import Rank
from tests.moe.cases import LayerWeights, placement_of, random_copies

STALL_SECONDS = 12.0
WIDTH, EXPERT_WIDTH, NUM_EXPERTS, NUM_PER_TOKEN = 128, 64, 12, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.uint8)


def exchanges(rank: Rank) -> list[str]:
    """Numbered rows among all ranks, in every dtype and with changing counts; what was wrong."""
    wrong = []
    for turn in range(40):
        generator = np.random.default_rng(turn)
        shape = (2, rank.num_ranks, rank.num_ranks)
        counts = generator.integers(0, 5, shape) * generator.integers(0, 2, shape)
        dtype = DTYPES[turn % len(DTYPES)]
        transfers = [_transfer(rank, counts[which], dtype, which) for which in range(2)]
        wanted = [_numbered(rank, counts[which], dtype, which) for which in range(2)]
        if turn % 3 == rank.rank % 3:
            torch.cuda._sleep(2_000_000)  # the rows are not there yet when the exchange is enqueued
        rank.nccl.exchange(transfers)
        for which in range(2):
            if not torch.equal(transfers[which].received, wanted[which]):
                wrong.append(f"turn {turn}, transfer {which}, {dtype}")
    rank.nccl.check()
    return wrong


def _rows(sender: int, receiver: int, count: int, which: int) -> Tensor:
    return (torch.arange(count) + 7 * sender + 3 * receiver + 50 * which)[:, None].repeat(1, 5)


def _transfer(rank: Rank, counts: np.ndarray, dtype: torch.dtype, which: int) -> Transfer:
    sent = [_rows(rank.rank, to, counts[rank.rank, to], which) for to in range(rank.num_ranks)]
    received = torch.full((int(counts[:, rank.rank].sum()), 5), 99).to(rank.device, dtype)
    return Transfer(
        received,
        torch.cat(sent).to(rank.device, dtype),
        counts[:, rank.rank].tolist(),
        counts[rank.rank].tolist(),
    )


def _numbered(rank: Rank, counts: np.ndarray, dtype: torch.dtype, which: int) -> Tensor:
    parts = [_rows(by, rank.rank, counts[by, rank.rank], which) for by in range(rank.num_ranks)]
    return torch.cat(parts).to(rank.device, dtype)


def layers(rank: Rank) -> dict[str, object]:
    """Whole layers against one rank that holds everything, to the bit: what differed, and times."""
    wrong, num_cases, started = [], 0, time.monotonic()
    for dtype in (torch.float32, torch.bfloat16):
        weights = LayerWeights.random(3, NUM_EXPERTS, NUM_PER_TOKEN, WIDTH, EXPERT_WIDTH)
        for name, placement, route, num_chunks, tokens in _plans(rank.num_ranks):
            generator = torch.Generator().manual_seed(num_cases)
            hidden = torch.randn(sum(tokens), WIDTH, generator=generator).to(rank.device, dtype)
            alone, _ = _layer(rank, weights, dtype, None, "none", 1, (len(hidden),))
            layer, group = _layer(rank, weights, dtype, placement, route, num_chunks, tokens)
            first = sum(tokens[: rank.rank])
            mine = slice(first, first + tokens[rank.rank])
            wanted = alone(hidden)[mine]
            for again in range(2):
                found = layer(hidden[mine].clone())
                if not torch.equal(found, wanted):
                    wrong.append(f"{dtype} {name} {route} {num_chunks} chunks, pass {again}")
            num_cases += 1
    rank.nccl.check()
    return {"wrong": wrong, "cases": num_cases, "seconds": time.monotonic() - started}


def _plans(num_ranks: int) -> Iterator[tuple[str, Placement, str, int, tuple[int, ...]]]:
    generator = np.random.default_rng(num_ranks)
    uneven = tuple(int(count) for count in generator.integers(0, 60, num_ranks))
    spread = initial_placement(1, NUM_EXPERTS, num_ranks)
    spares = initial_placement(
        1, NUM_EXPERTS, num_ranks, num_spares=2, replicas_per_layer=NUM_EXPERTS
    )
    anywhere = placement_of([random_copies(generator, NUM_EXPERTS, num_ranks, 30)], num_ranks)
    yield "spread", spread, "none", 1, uneven
    yield "spread", spread, "waterfill", 3, uneven
    yield "spares", spares, "waterfill", 1, (33,) * num_ranks
    yield "spares", spares, "waterfill", 4, uneven
    yield "spares", spares, "even", 2, (0,) * (num_ranks - 1) + (7,)
    yield "anywhere", anywhere, "waterfill", 2, uneven
    yield "anywhere", anywhere, "waterfill", 1, (1,) + (0,) * (num_ranks - 1)


def _layer(
    rank: Rank,
    weights: LayerWeights,
    dtype: torch.dtype,
    placement: Placement | None,
    route: str,
    num_chunks: int,
    tokens_per_rank: tuple[int, ...],
) -> tuple[MoELayer, ExpertGroup]:
    """As one rank of the group has it, or alone."""
    alone = placement is None
    place = initial_placement(1, NUM_EXPERTS, 1) if placement is None else placement
    group = ExpertGroup(
        rank=0 if alone else rank.rank,
        placement=place,
        communicator=None if alone else rank.control,
        nccl=None if alone else rank.nccl,
        route=route,
        layer_pairs=np.zeros(1, dtype=np.int64),
        tokens_per_rank=tokens_per_rank,
    )
    layout = ExpertLayout(WIDTH, EXPERT_WIDTH)
    pool = SlotPool(max(1, place.num_slots(group.rank)), layout, dtype, rank.device)
    for _, expert, slot in place.hosted(group.rank):
        parts = (weights.gates, weights.ups, weights.downs)
        layout.write(pool.blobs[slot], *(part[expert].to(rank.device, dtype) for part in parts))
    experts = Experts(pool)
    router = weights.router.to(rank.device, dtype)
    layer = MoELayer(
        0,
        Gate(router, NUM_PER_TOKEN, renormalize=True),
        LoadCounter(1, NUM_EXPERTS, rank.device),
        make_dispatcher(group, 0, rank.device, experts.tokens_per_tile),
        experts,
        overlap=Overlap(num_chunks=num_chunks),
    )
    return layer, group


def one_dies(rank: Rank) -> str | None:
    """Rank 1 is gone after some exchanges: what the others are told."""
    _warm_up(rank)
    if rank.rank == 1:
        os._exit(1)
    return _error_of_the_next(rank, torch.Tensor.sum)


def one_dies_and_a_kernel_is_new(rank: Rank) -> str | None:
    """The same while the others launch a kernel for the first time, which waits for the GPU."""
    _warm_up(rank)
    if rank.rank == 1:
        os._exit(1)
    return _error_of_the_next(rank, torch.Tensor.logsumexp)


def one_stalls(rank: Rank) -> str | None:
    """Rank 2 comes too late."""
    _warm_up(rank)
    if rank.rank == 2:
        time.sleep(STALL_SECONDS)
    return _error_of_the_next(rank, torch.Tensor.sum)


def _warm_up(rank: Rank) -> None:
    for _ in range(3):
        _everyone(rank).sum(dim=0).cpu()
    if rank.rank == 1:
        time.sleep(1.0)  # what was sent has left this process, should it die now


def _everyone(rank: Rank) -> Tensor:
    ones = [1] * rank.num_ranks
    sent = torch.full((rank.num_ranks, 4096), float(rank.rank), device=rank.device)
    received = torch.empty_like(sent)
    rank.nccl.all_to_all(received, sent, ones, ones)
    return received


def _error_of_the_next(rank: Rank, use: Callable[..., Tensor]) -> str | None:
    """What an exchange, and the read of its result, raise; the time is the caller's to bound."""
    try:
        use(_everyone(rank), dim=0).cpu()
        rank.nccl.check()
    except RankError as error:
        return str(error)
    return None
