"""One MoE layer over CPU ranks: the whole, its computing alone, its exchanges alone.

    python benchmarks/bench_moe_layer_cpu.py [--gpus 10] [--shapes lite wide] [--tokens 16 64 256]

Every rank is a process on one thread. `compute_ms` is a layer whose exchanges are answered from a
recording, `comm_ms` the exchanges alone, both on all ranks at once; `naive_ms` the layer in one
chunk. All are the least of their samples. `lightmoe simulate --calibrate` reads the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import protocol
import torch
from torch import Tensor

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.moe.dispatch.base import ExpertGroup
from lightmoe.moe.dispatch.gloo import GlooDispatcher
from lightmoe.moe.experts import Experts, SlotPool
from lightmoe.moe.gate import Gate
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.skew import RoutingSkew
from lightmoe.quant.packing import ExpertLayout

TIMEOUT_SECONDS = 120.0
# model width, expert width, experts, experts per token
SHAPES = {"lite": (256, 256, 8, 2), "wide": (512, 512, 32, 4)}
SAMPLE_SECONDS = 0.15
Exchange = tuple[Tensor, Tensor, list[int], list[int]]


class Recorder:
    """A communicator that can keep what it exchanges, and answer from that without the others."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.exchanges: list[Exchange] = []
        self.is_recording = False
        self.num_replayed: int | None = None

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
    ) -> None:
        """As Communicator.all_to_all, or the recorded answer."""
        if self.num_replayed is not None:
            received.copy_(self.exchanges[self.num_replayed % len(self.exchanges)][0])
            self.num_replayed += 1
            return
        self.communicator.all_to_all(received, sent, received_counts, sent_counts)
        if self.is_recording:
            counts = [*received_counts], [*sent_counts]
            self.exchanges.append((received.clone(), sent.clone(), *counts))

    def exchange_again(self) -> None:
        """The recorded exchanges, each into fresh memory, with nothing computed between them."""
        for received, *others in self.exchanges:
            self.communicator.all_to_all(torch.empty_like(received), *others)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128, 256, 512])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--samples", type=int, default=15)
    options = parser.parse_args()
    rendezvous = Rendezvous(TIMEOUT_SECONDS)
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    barrier = context.Barrier(options.gpus)
    ranks = [
        context.Process(target=run_rank, args=(rank, options, rendezvous.port, barrier, child))
        for rank in range(options.gpus)
    ]
    for process in ranks:
        process.start()
    rows = json.loads(parent.recv_bytes())
    for process in ranks:
        process.join()
    protocol.write("moe-layer", rows)


def run_rank(rank: int, options: argparse.Namespace, port: int, barrier: Any, out: Any) -> None:
    """One rank: every shape, token count and chunk count, in the same order everywhere."""
    torch.set_num_threads(1)
    communicator = Communicator(rank, options.gpus, port, TIMEOUT_SECONDS)
    rows = []
    with torch.inference_mode():
        for shape in options.shapes:
            for num_tokens in options.tokens:
                naive: dict[str, float] | None = None
                for num_chunks in options.chunks:
                    layer, hidden = make_layer(communicator, shape, num_tokens, num_chunks)
                    times = time_layer(layer, hidden, barrier, options.samples)
                    naive = naive or times["ours"]
                    rows.append(row(options.gpus, shape, num_tokens, num_chunks, times, naive))
                    if rank == 0:
                        print(rows[-1], flush=True)
    if rank == 0:
        out.send_bytes(json.dumps(rows).encode())


def make_layer(
    communicator: Communicator, shape: str, num_tokens: int, num_chunks: int
) -> tuple[MoELayer, Tensor]:
    """A layer with random weights, one copy of each expert, all ranks alike; and its input."""
    width, expert_width, num_experts, num_per_token = SHAPES[shape]
    placement = initial_placement(1, num_experts, communicator.num_ranks)
    device = torch.device("cpu")
    layout = ExpertLayout(width, expert_width)
    pool = SlotPool(max(1, placement.num_slots(communicator.rank)), layout, torch.float32, device)
    pool.blobs.normal_(std=width**-0.5)
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(num_experts, width, generator=generator)
    group = ExpertGroup(
        rank=communicator.rank,
        placement=placement,
        communicator=communicator,
        route="none",
        layer_pairs=np.zeros(1, dtype=np.int64),
        tokens_per_rank=(num_tokens,) * communicator.num_ranks,
    )
    gate = Gate(router, num_per_token, renormalize=True)
    recorder: Any = Recorder(communicator)
    layer = MoELayer(
        0,
        RoutingSkew(0.0).instead_of(gate, 0),  # uniform, whatever the router says
        LoadCounter(1, num_experts, device),
        GlooDispatcher(group, 0, recorder),
        Experts(pool),
        overlap=Overlap(num_chunks=num_chunks),
    )
    generator.manual_seed(communicator.rank)
    return layer, torch.randn(num_tokens, width, generator=generator)


def time_layer(
    layer: MoELayer, hidden: Tensor, barrier: Any, num_samples: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of the whole layer, of its computing and of its exchanges."""
    recorder: Any = layer.dispatcher._communicator  # type: ignore[attr-defined]
    recorder.is_recording = True
    layer(hidden)
    recorder.is_recording = False

    def whole() -> None:
        recorder.num_replayed = None
        layer(hidden)

    def computing() -> None:
        recorder.num_replayed = 0
        layer(hidden)

    calls = {"ours": whole, "compute": computing, "comm": recorder.exchange_again}
    repeats = {name: num_repeats(call, recorder.communicator) for name, call in calls.items()}
    # In turns: other programs on the machine then disturb all three alike.
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_samples):
        for name, call in calls.items():
            samples[name].append(timed(call, barrier, repeats[name]))
    return {name: protocol.spread(values) for name, values in samples.items()}


def num_repeats(call: Callable[[], None], communicator: Communicator) -> int:
    """Calls that make one sample long enough; rank 0's figure, as all must make as many."""
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    own = torch.tensor([max(1, round(SAMPLE_SECONDS / seconds))])
    everyone = torch.empty(communicator.num_ranks, dtype=torch.int64)
    ones = [1] * communicator.num_ranks
    communicator.all_to_all(everyone, own.repeat(communicator.num_ranks), ones, ones)
    return int(everyone[0])


def timed(call: Callable[[], None], barrier: Any, count: int) -> float:
    """Milliseconds of one call, from a common start to the last rank's end."""
    barrier.wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    barrier.wait()
    return (time.perf_counter() - started) * 1e3 / count


def row(
    num_ranks: int,
    shape: str,
    num_tokens: int,
    num_chunks: int,
    times: dict[str, dict[str, float]],
    naive: dict[str, float],
) -> dict[str, Any]:
    """One row of the result."""
    # The least of the samples: what else runs on the machine only adds.
    ours, compute, comm = (times[name]["min"] for name in ("ours", "compute", "comm"))
    return {
        "setting": f"cpu-{num_ranks}",
        "shape": shape,
        "tokens_per_rank": num_tokens,
        "transport": "gloo",
        "chunks": num_chunks,
        "mode": "serial",
        "naive_ms": naive["min"],
        "ours_ms": ours,
        "compute_ms": compute,
        "comm_ms": comm,
        "limit_ms": max(compute, comm),
        "hidden_fraction": (compute + comm - ours) / min(compute, comm),
        "spread": times,
        "widths": SHAPES[shape],
        "ranks": num_ranks,
        "alone_chunks": num_chunks,
    }


if __name__ == "__main__":
    main()
