"""Weak scaling of one MoE layer: as many tokens on every card, on one card and on more.

    python benchmarks/bench_scaling.py --ranks 4

`efficiency` is a card's tokens/s over those of one card alone, which holds all experts and has no
exchange; with more cards each has as many pairs to compute, and fewer experts. limit = max(compute
alone, communication alone). Times are the slowest rank's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import protocol
import torch
from bench_moe_layer_ep import alone, time_naive
from ep_naive import NaiveLayer
from ep_ranks import RankLayer, run_ranks
from ep_transports import ALL_SHAPES, ROADS, join_torch_group, over

from lightmoe.distributed.communicator import Communicator


def main() -> None:
    """Run every number of cards and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    on_cards = torch.cuda.device_count() > 0
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--shapes", nargs="+", default=["mixtral"], choices=sorted(ALL_SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--setting", choices=("nvlink", "no-p2p"), default="nvlink")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--skip-naive", action="store_true")
    parser.add_argument("--num-samples", type=int, default=5)
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    values = vars(options) | {"setting": options.setting if on_cards else "cpu"}
    rows = []
    for num_ranks in doublings(options.ranks):
        rows += run_ranks(num_ranks, bench, values)
    rows = [row | {"efficiency": efficiency(row, rows)} for row in rows]
    print("\n".join(table(rows)))
    gpu = f"{options.ranks}x {torch.cuda.get_device_name()}" if on_cards else None
    protocol.write("scaling", rows, gpu=gpu, measured_commit=options.commit)


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    counts = [1]
    while 2 * counts[-1] < most:
        counts.append(2 * counts[-1])
    return counts if most == 1 else [*counts, most]


def bench(
    communicator: Communicator, device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of so many ranks, on one of them."""
    if not options["skip_naive"]:
        join_torch_group(communicator, device)
    return [
        row
        for name in options["shapes"]
        for row in bench_shape(communicator, device, name, options)
    ]


def bench_shape(
    communicator: Communicator, device: torch.device, name: str, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one shape: every chunk count."""
    num_tokens, num_ranks = options["tokens"], communicator.num_ranks
    own = RankLayer(communicator, device, ALL_SHAPES[name], num_tokens, ROADS[options["setting"]])
    transport = "copy_engine" if device.type == "cuda" else "gloo"
    if num_ranks == 1:
        transport = "local"
        over(own, transport)
    hidden = own.hidden(num_tokens)
    naive_ms = None if options["skip_naive"] else time_naive(own, hidden, NaiveLayer)
    compute_ms, comm_ms = (times["median"] for times in alone(own, hidden, own.measure))
    limit_ms = max(compute_ms, comm_ms)
    for chunks in options["chunks"] if transport == "copy_engine" else [1]:
        layer = own.layer(own.overlap(chunks))
        own.barrier()
        times = own.measure(lambda layer=layer: layer(hidden), num_samples=options["num_samples"])
        ours_ms = times["median"]
        yield {
            "setting": options["setting"],
            "shape": name,
            "tokens_per_rank": num_tokens,
            "transport": transport,
            "chunks": chunks,
            "mode": "deterministic",
            "ranks": num_ranks,
            "naive_ms": naive_ms,
            "ours_ms": ours_ms,
            "ours_min_ms": times["min"],
            "ours_max_ms": times["max"],
            "compute_ms": compute_ms,
            "comm_ms": comm_ms,
            "limit_ms": limit_ms,
            "hidden_fraction": hidden_fraction(compute_ms, comm_ms, ours_ms, num_ranks),
            "tokens_per_second_per_card": num_tokens / ours_ms * 1e3,
            "over_limit": ours_ms / limit_ms,
            "over_naive": None if naive_ms is None else naive_ms / ours_ms,
        }
    own.close()


def hidden_fraction(compute_ms: float, comm_ms: float, ours_ms: float, num_ranks: int) -> float:
    """Of the shorter of both; 0 where nothing is exchanged."""
    return (compute_ms + comm_ms - ours_ms) / min(compute_ms, comm_ms) if num_ranks > 1 else 0.0


def efficiency(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """A card's tokens/s over those of one card alone, of the same shape."""
    (one,) = [other for other in rows if other["ranks"] == 1 and other["shape"] == row["shape"]]
    return float(row["tokens_per_second_per_card"] / one["tokens_per_second_per_card"])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a row."""
    lines = [
        f"{'shape':9}{'cards':>6}{'chunks':>7}{'naive ms':>10}{'ours ms':>10}{'compute':>9}"
        f"{'comm':>9}{'x limit':>9}{'x naive':>9}{'tokens/s a card':>17}{'efficiency':>12}"
    ]
    for row in rows:
        naive, faster = (
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in ((row["naive_ms"], 3), (row["over_naive"], 2))
        )
        lines.append(
            f"{row['shape']:9}{row['ranks']:6}{row['chunks']:7}{naive:>10}{row['ours_ms']:10.3f}"
            f"{row['compute_ms']:9.3f}{row['comm_ms']:9.3f}{row['over_limit']:9.2f}{faster:>9}"
            f"{row['tokens_per_second_per_card']:17,.0f}{row['efficiency']:12.1%}"
        )
    return lines


if __name__ == "__main__":
    main()
