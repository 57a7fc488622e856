"""One MoE layer over the cards of this machine: naive, ours, compute alone, communication alone.

    python benchmarks/bench_moe_layer_ep.py --ranks 4 --shapes mixtral qwen3 --road ipc

limit = max(compute alone, communication alone); hidden = (compute + communication - ours) /
min(compute, communication). Every rank has as many tokens; the time is the slowest rank's. The
limit is timed as the layer is, as called or as one graph: a card at the limit of its power is
slower in a longer run. Naive layers are timed as called.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import ep_naive
import protocol
import torch
from ep_ranks import SETTINGS, SHAPES, RankLayer, line_of, run_ranks

from lightmoe.distributed.communicator import Communicator

LAYERS_OF_GRAPH = 4
_Measured = TypeVar("_Measured")
Times = dict[str, dict[str, float]]
"""By mode: median, least and most milliseconds."""

PRINTED = (
    "shape",
    "tokens_per_rank",
    "mode",
    "chunks",
    "naive_ms",
    "gathered_ms",
    "compute_ms",
    "comm_ms",
    "ours_ms",
    "over_naive",
    "over_limit",
    "hidden_fraction",
)


def main() -> None:
    """Run every shape and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--shapes", nargs="+", default=["mixtral", "qwen3"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--road", choices=SETTINGS, default="ipc")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    rows = run_ranks(options.ranks, bench, vars(options))
    for row in rows:
        row["ranks"] = options.ranks
    name = f"{options.ranks}x {torch.cuda.get_device_name()}"
    protocol.write(f"moe-layer-ep-{options.road}", rows, gpu=name, measured_commit=options.commit)


def bench(
    communicator: Communicator, device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """All rows, on one rank."""
    rows = []
    for name in options["shapes"]:
        for num_tokens in options["tokens"]:
            for row in bench_shape(communicator, device, name, num_tokens, options):
                rows.append(row)
                if communicator.rank == 0:
                    print(line_of(row, PRINTED), flush=True)
    return rows


def bench_shape(
    communicator: Communicator,
    device: torch.device,
    name: str,
    num_tokens: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The rows of one shape: every chunk count and share of the device."""
    shape = SHAPES[name]
    own = RankLayer(communicator, device, shape, num_tokens, options["road"])
    hidden = own.hidden(num_tokens)
    naive_ms = gathered_ms = float("nan")
    if not options["skip_naive"]:
        naive_ms = time_naive(own, hidden, ep_naive.NaiveLayer)
        gathered_ms = time_naive(own, hidden, ep_naive.GatheredLayer)
    compute, comm = alone(own, hidden, functools.partial(timed, own))
    common = {
        "setting": SETTINGS[options["road"]],
        "shape": name,
        "tokens_per_rank": num_tokens,
        "transport": "copy_engine",
        "naive_ms": naive_ms,
        "gathered_ms": gathered_ms,
    }
    for chunks in options["chunks"]:
        layer = own.layer(own.overlap(chunks))
        for mode, times in timed(own, functools.partial(layer, hidden)).items():
            ours_ms, compute_ms, comm_ms = (
                one["median"] for one in (times, compute[mode], comm[mode])
            )
            limit_ms = max(compute_ms, comm_ms)
            yield common | {
                "mode": mode,
                "compute_ms": compute_ms,
                "comm_ms": comm_ms,
                "limit_ms": limit_ms,
                "chunks": chunks,
                "ours_ms": ours_ms,
                "ours_min_ms": times["min"],
                "ours_max_ms": times["max"],
                "over_naive": naive_ms / ours_ms,
                "over_limit": ours_ms / limit_ms,
                "hidden_fraction": (compute_ms + comm_ms - ours_ms) / min(compute_ms, comm_ms),
            }
    own.barrier()
    own.memory.close()


def timed(own: RankLayer, call: Callable[[], object]) -> Times:
    """Milliseconds as it is called, and as part of one CUDA graph of four."""
    replay = own.graph_of(call, LAYERS_OF_GRAPH)
    graph = own.measure(replay, per_sample=3)
    return {
        "deterministic": own.measure(call),
        "deterministic, graph": {name: ms / LAYERS_OF_GRAPH for name, ms in graph.items()},
    }


def time_naive(own: RankLayer, hidden: torch.Tensor, kind: type[ep_naive.NaiveLayer]) -> float:
    """Milliseconds of a layer of torch's own parts."""
    communicator = own.communicator
    if not torch.distributed.is_initialized():
        ep_naive.init(communicator.rank, communicator.num_ranks, 29511, own.device)
    layer = kind(own.shape, own.router, own.pool.gate_up, own.pool.down)
    return own.measure(lambda: layer(hidden))["median"]


def alone(
    own: RankLayer, hidden: torch.Tensor, measure: Callable[[Callable[[], object]], _Measured]
) -> tuple[_Measured, _Measured]:
    """What is measured of the gate and the experts, and of the exchange, without the other."""
    dispatcher = own.dispatcher
    sort = dispatcher.pair_sort
    choice = own.gate(hidden, sort)
    dispatcher.publish(hidden)
    (receipt,) = dispatcher.route(choice, 1)
    rows = dispatcher.dispatch(hidden, receipt)
    at_home = dataclasses.replace(receipt, output_rows=None)
    pairs = own.experts(rows, at_home)
    own.barrier()

    def compute() -> None:
        own.gate(hidden, sort)
        own.experts(rows, at_home, output=pairs)

    def communicate() -> None:
        dispatcher.publish(hidden)
        (here,) = dispatcher.route(choice, 1)
        dispatcher.dispatch(hidden, here)
        dispatcher.combine(pairs, choice.weights, here)

    computed = measure(compute)
    own.barrier()
    return computed, measure(communicate)


if __name__ == "__main__":
    main()
