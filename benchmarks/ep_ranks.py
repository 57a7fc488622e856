"""Ranks as processes, one a card, with a MoE layer each: what the benches of the exchange share.

Without a card they are on the CPU, over gloo and in float32: to try a bench out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.distributed.peers import PeerMemory, Road, gather_bytes
from lightmoe.moe.dispatch import ExpertGroup, make_dispatcher
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.multiprocessors import overlap_beside
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.quant.packing import ExpertLayout


@dataclass(frozen=True)
class Shape:
    """One MoE layer: E experts of width F, K a token, model width D."""

    num_experts: int
    per_token: int
    width: int
    expert_width: int


SHAPES = {
    "mixtral": Shape(8, 2, 4096, 14336),
    "dsv2lite": Shape(64, 6, 2048, 1408),
    "qwen3": Shape(128, 8, 2048, 768),
}
SETTINGS = {"ipc": "nvlink", "host": "no-p2p"}
"""What a road stands for in a result's rows."""

DTYPE = torch.bfloat16


def line_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """These fields of a result's row, to print."""
    return " ".join(
        f"{name}={row[name]:.4g}" if isinstance(row[name], float) else f"{name}={row[name]}"
        for name in names
    )


def run_ranks(num_ranks: int, body: Callable[..., Any], *arguments: object) -> Any:
    """body(communicator, device, *arguments) on every rank; what rank 0 returns."""
    context = get_context("spawn")
    rendezvous = Rendezvous(120)
    answers = context.SimpleQueue()
    processes = [
        context.Process(
            target=_rank, args=(rank, num_ranks, rendezvous.port, answers, body, arguments)
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise SystemExit(f"ranks {failed} failed")
    return answers.get()


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    answers: Any,
    body: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    device = _device_of(rank, num_ranks)
    with torch.inference_mode():
        result = body(Communicator(rank, num_ranks, port, 120), device, *arguments)
    if rank == 0:
        answers.put(result)


def _device_of(rank: int, num_ranks: int) -> torch.device:
    num_cards = torch.cuda.device_count()
    if not num_cards:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if num_ranks > num_cards:
        os.environ["NCCL_HOSTID"] = f"rank{rank}"
    device = torch.device("cuda", rank * num_cards // num_ranks)
    torch.cuda.set_device(device)
    return device


class RankLayer:
    """This rank's end of one layer over `copy_engine`, its weights made up.

    `num_slots` is for placements that need more slots than the first.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        shape: Shape,
        max_tokens: int,
        road: Road,
        placement: Placement | None = None,
        route: str = "waterfill",
        num_slots: int | None = None,
    ) -> None:
        self.communicator, self.device, self.shape = communicator, device, shape
        num_ranks = communicator.num_ranks
        self.dtype = DTYPE if device.type == "cuda" else torch.float32
        self.memory: Any = None
        self.lane: Any = None
        if device.type == "cuda":
            self._open_lane(max_tokens, road)
        self.placement = placement or initial_placement(1, shape.num_experts, num_ranks)
        self.group = ExpertGroup(
            rank=communicator.rank,
            placement=self.placement,
            communicator=communicator,
            route=route,
            layer_pairs=np.zeros(1, dtype=np.int64),
            peers=self.lane,
        )
        layout = ExpertLayout(shape.width, shape.expert_width)
        num_slots = num_slots or max(1, self.placement.num_slots(communicator.rank))
        self.pool = SlotPool(num_slots, layout, self.dtype, device)
        torch.manual_seed(1)
        self.router = torch.randn(shape.num_experts, shape.width, device=device, dtype=self.dtype)
        self.pool.blobs.normal_(0, 0.02)
        self.experts = Experts(self.pool)
        self.gate: Any = Gate(self.router, shape.per_token, renormalize=True)
        self.dispatcher = make_dispatcher(self.group, 0, device, self.experts.tokens_per_tile)
        self.load = LoadCounter(1, shape.num_experts, device)

    def _open_lane(self, max_tokens: int, road: Road) -> None:
        arena = ArenaLayout(
            num_ranks=self.communicator.num_ranks,
            max_tokens=max_tokens,
            num_experts=self.shape.num_experts,
            num_experts_per_token=self.shape.per_token,
            width=self.shape.width,
            element_bytes=self.dtype.itemsize,
        )
        self.memory = PeerMemory(self.communicator, self.device, arena.num_bytes, road)
        rank, device = self.communicator.rank, self.device
        self.lane = PeerLane(arena, self.memory, rank, 1, self.dtype, device, 30.0)

    def overlap(self, num_chunks: int) -> Overlap:
        """So many chunks, on a card beside each other as a launch has them."""
        road = self.memory.road if self.memory else "ipc"
        return replace(overlap_beside(self.device, road), num_chunks=num_chunks)

    def layer(self, overlap: Overlap | None = None) -> MoELayer:
        """The layer with this overlap."""
        return MoELayer(0, self.gate, self.load, self.dispatcher, self.experts, overlap=overlap)

    def hidden(self, num_tokens: int) -> Tensor:
        """Random rows [T, D], this rank's own; every rank has as many."""
        self.group.tokens_per_rank = (num_tokens,) * self.communicator.num_ranks
        torch.manual_seed(100 + self.communicator.rank)
        return torch.randn(num_tokens, self.shape.width, device=self.device, dtype=self.dtype)

    def close(self) -> None:
        """Give the arenas back, on all ranks at once."""
        self.barrier()
        if self.memory is not None:
            self.memory.close()

    def barrier(self) -> None:
        """Wait for all ranks and their cards."""
        if self.lane is not None:
            self.lane.pair_counter.count()
            torch.cuda.synchronize(self.device)
        gather_bytes(self.communicator, b"x")

    def slowest(self, seconds: float) -> float:
        """The largest of all ranks' numbers."""
        sent = np.float64(seconds).tobytes()
        return max(float(np.frombuffer(part)[0]) for part in gather_bytes(self.communicator, sent))

    def measure(
        self, call: Callable[[], object], per_sample: int = 5, num_samples: int = 5
    ) -> dict[str, float]:
        """Milliseconds of a call on the slowest rank: median, least and most of the samples."""
        for _ in range(3):
            call()
        samples = []
        for _ in range(num_samples):
            self.barrier()
            samples.append(self.slowest(self._timed(call, per_sample)))
        return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}

    def _timed(self, call: Callable[[], object], count: int) -> float:
        """Milliseconds of one of so many calls here."""
        if self.lane is None:
            started = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - started) * 1e3 / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize(self.device)
        self.lane.check()
        return float(begin.elapsed_time(end)) / count

    def graph_of(self, call: Callable[[], object], count: int) -> Callable[[], None]:
        """A replay of `count` calls as one CUDA graph."""
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            call()  # makes what is kept for a stream
        self.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                call()
        self.barrier()
        time.sleep(0.05)
        return graph.replay
