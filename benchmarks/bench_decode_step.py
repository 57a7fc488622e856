"""A decode step's MoE layer over the cards of this machine: one CUDA graph against naive eager.

    python benchmarks/bench_decode_step.py --ranks 4 --shapes mixtral qwen3

Milliseconds a layer on the slowest rank: ours as a graph of ten layers, the naive layer as torch
runs it, and the gate and the experts alone as a graph.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import ep_naive
import protocol
import torch
from ep_ranks import SHAPES, RankLayer, run_ranks

from lightmoe.distributed.communicator import Communicator

NUM_LAYERS = 10


def main() -> None:
    """Run every shape and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--shapes", nargs="+", default=["mixtral", "qwen3"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--road", choices=("ipc", "host"), default="ipc")
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    rows = run_ranks(options.ranks, bench, vars(options))
    name = f"{options.ranks}x {torch.cuda.get_device_name()}"
    protocol.write(f"decode-step-{options.road}", rows, gpu=name, measured_commit=options.commit)


def bench(
    communicator: Communicator, device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """All rows, on one rank."""
    rows = []
    for name in options["shapes"]:
        own = RankLayer(communicator, device, SHAPES[name], max(options["tokens"]), options["road"])
        for num_tokens in options["tokens"]:
            row = {"shape": name, "tokens_per_rank": num_tokens, "mode": "deterministic"}
            row |= bench_tokens(own, num_tokens)
            rows.append(row)
            if communicator.rank == 0:
                print(row, flush=True)
        own.barrier()
        own.memory.close()
    return rows


def bench_tokens(own: RankLayer, num_tokens: int) -> dict[str, float]:
    """Milliseconds a layer, for so many tokens a rank."""
    hidden, layer = own.hidden(num_tokens), own.layer()
    sort = own.dispatcher.pair_sort
    choice = own.gate(hidden, sort)
    own.dispatcher.publish(hidden)
    (receipt,) = own.dispatcher.route(choice, 1)
    rows = own.dispatcher.dispatch(hidden, receipt)
    at_home = dataclasses.replace(receipt, output_rows=None)
    own.barrier()

    def compute() -> None:
        own.gate(hidden, sort)
        own.experts(rows, at_home)

    ours = own.measure(own.graph_of(lambda: layer(hidden), NUM_LAYERS), per_sample=3)
    own.barrier()
    experts = own.measure(own.graph_of(compute, NUM_LAYERS), per_sample=3)
    eager = own.measure(lambda: layer(hidden), per_sample=20)
    if not torch.distributed.is_initialized():
        ep_naive.init(own.communicator.rank, own.communicator.num_ranks, 29512, own.device)
    naive = ep_naive.NaiveLayer(own.shape, own.router, own.pool.gate_up, own.pool.down)
    naive_ms = own.measure(lambda: naive(hidden), per_sample=20)["median"]
    ours_ms = ours["median"] / NUM_LAYERS
    experts_ms = experts["median"] / NUM_LAYERS
    return {
        "ours_ms": ours_ms,
        "eager_ms": eager["median"],
        "experts_ms": experts_ms,
        "naive_ms": naive_ms,
        "over_naive": naive_ms / ours_ms,
        "over_experts_us": 1e3 * (ours_ms - experts_ms),
    }


if __name__ == "__main__":
    main()
