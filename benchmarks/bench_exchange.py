"""The exchange of one MoE layer alone, through the Dispatcher seam: rows out, the same rows back.

    python benchmarks/bench_exchange.py --ranks 4 --topology 4xh200-nvlink

Every rank has as many tokens, and the expert of a pair gives its row back as it is, so that what
comes home is checked against what was sent. `naive` sorts a row for every pair and calls torch's
all_to_all_single for counts, rows and results. The limit is bytes / link rate: rows (one for each
token and rank) and results at the slowest hop of the topology, without any latency; the topology is
a file, or measured at the start. Times are the slowest rank's. In setting no-p2p NCCL and
copy_engine go through the host's memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import protocol
import torch
import torch.distributed as dist
from ep_ranks import RankLayer, Shape, run_ranks
from ep_transports import (
    ALL_SHAPES,
    ROADS,
    in_setting,
    join_nccl,
    join_torch_group,
    machine_of,
    over,
)
from torch import Tensor

from lightmoe.distributed.communicator import Communicator
from lightmoe.distributed.nccl import NcclCommunicator
from lightmoe.distributed.peers import gather_bytes
from lightmoe.moe.gate import Choice
from lightmoe.topology import Topology

MOST_IN_A_GRAPH = 64
"""Tokens of a rank's decode step that a server replays as a graph."""
NUM_LAYERS = 10
_CLOSE = 0.02  # of the largest number: results are summed in 16 bits
_STAGES = ("route", "dispatch", "combine")


def main() -> None:
    """Run every setting, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    on_cards = torch.cuda.device_count() > 0
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 4)
    parser.add_argument("--settings", nargs="+", choices=("nvlink", "no-p2p"), default=None)
    parser.add_argument(
        "--shapes", nargs="+", default=["mixtral", "qwen3"], choices=sorted(ALL_SHAPES)
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048, 8192])
    parser.add_argument("--topology", help="a file or its name; without one it is measured")
    parser.add_argument("--num-samples", type=int, default=5)
    parser.add_argument("--commit", help="the commit that is measured, where git does not know")
    options = parser.parse_args()
    topology = machine_of(options.topology, options.ranks)
    settings = (options.settings or ["nvlink", "no-p2p"]) if on_cards else ["cpu"]
    rows = []
    for setting in settings:
        values = vars(options) | {"setting": setting, "topology": topology}
        rows += run_ranks(options.ranks, bench, values)
    print("\n".join(table(rows)))
    gpu = f"{options.ranks}x {torch.cuda.get_device_name()}" if on_cards else None
    protocol.write("exchange", rows, gpu=gpu, measured_commit=options.commit)


def bench(
    communicator: Communicator, device: torch.device, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """All rows of one setting, on one rank."""
    setting = options["setting"]
    if setting == "no-p2p":
        os.environ["NCCL_P2P_DISABLE"] = "1"
    join_torch_group(communicator, device)
    nccl = join_nccl(communicator, device)
    topology = in_setting(options["topology"], setting)
    rows = []
    for name in options["shapes"]:
        shape, road = ALL_SHAPES[name], ROADS[setting]
        own = RankLayer(communicator, device, shape, max(options["tokens"]), road)
        for num_tokens in options["tokens"]:
            common = {"setting": setting, "shape": name, "ranks": communicator.num_ranks}
            common |= {"topology": topology.name, "tokens_per_rank": num_tokens}
            rows += [
                common | row
                for row in bench_tokens(own, nccl, topology, num_tokens, options["num_samples"])
            ]
        own.close()
    if nccl is not None:
        nccl.close()
    return rows


def bench_tokens(
    own: RankLayer,
    nccl: NcclCommunicator | None,
    topology: Topology,
    num_tokens: int,
    num_samples: int,
) -> list[dict[str, Any]]:
    """The rows of one size: every transport that runs here, beside naive."""
    hidden = own.hidden(num_tokens)
    choice = own.gate(hidden, None)
    sent = bytes_between(own, choice, hidden)
    limit_ms = topology.busiest_seconds(topology.link_bytes(sent.tolist())) * 1e3
    most_bytes = float(max(sent.sum(axis=1).max(), sent.sum(axis=0).max()))
    naive = NaiveExchange(own.shape, own.communicator.num_ranks)
    check(naive(hidden, choice), hidden, "naive")
    naive_ms = own.measure(lambda: naive(hidden, choice), num_samples=num_samples)["median"]
    rows = []
    for transport in ["copy_engine", "nccl"] if nccl is not None else ["gloo"]:
        over(own, transport, nccl)
        hidden = own.hidden(num_tokens)
        exchange = Exchange(own, hidden, choice)
        check(exchange(), hidden, transport)
        own.barrier()
        times = own.measure(exchange, num_samples=num_samples)
        stages = exchange.stages_ms(num_samples)
        own.barrier()
        moved_ms = stages["dispatch_ms"] + stages["combine_ms"]
        rows.append(
            {
                "transport": transport,
                "chunks": 1,
                "mode": "deterministic",
                "naive_ms": naive_ms,
                "ours_ms": times["median"],
                "ours_min_ms": times["min"],
                "ours_max_ms": times["max"],
                "compute_ms": 0.0,
                "comm_ms": times["median"],
                "limit_ms": limit_ms,
                "hidden_fraction": 0.0,
                "graph_ms": graph_ms(own, exchange, num_tokens),
                "bytes": most_bytes,
                "gigabytes_per_second": most_bytes / moved_ms / 1e6,
                "link_gigabytes_per_second": most_bytes / limit_ms / 1e6 if limit_ms else None,
                "over_naive": naive_ms / times["median"],
                "over_limit": times["median"] / limit_ms if limit_ms else None,
                **stages,
            }
        )
    return rows


def graph_ms(own: RankLayer, exchange: Exchange, num_tokens: int) -> float | None:
    """Milliseconds of an exchange inside a CUDA graph, where a server would replay one."""
    if own.group.peers is None or num_tokens > MOST_IN_A_GRAPH:
        return None
    times = own.measure(own.graph_of(exchange, NUM_LAYERS), per_sample=3)
    own.barrier()
    return float(times["median"]) / NUM_LAYERS


def bytes_between(own: RankLayer, choice: Choice, hidden: Tensor) -> np.ndarray:
    """Bytes [W, W] that must travel: a row for each (token, rank), a result for each pair."""
    num_ranks = own.communicator.num_ranks
    mine = choice.experts.cpu().to(torch.int16).numpy()
    everyone = gather_bytes(own.communicator, mine.tobytes())
    experts = np.stack([np.frombuffer(part, np.int16).reshape(mine.shape) for part in everyone])
    targets = own.placement.homes[0][experts]  # [W, T, K]
    goes = targets[..., None] == np.arange(num_ranks)  # [W, T, K, W]
    num_rows = goes.any(axis=2).sum(axis=1) + goes.sum(axis=(1, 2)).T
    np.fill_diagonal(num_rows, 0)
    return np.asarray(num_rows * (hidden.shape[1] * hidden.element_size()), dtype=np.float64)


def check(output: Tensor, hidden: Tensor, what: str) -> None:
    """SystemExit unless the rows came home: the weights of a token add up to one."""
    error = float((output.float() - hidden.float()).abs().max() / hidden.float().abs().max())
    if not error <= _CLOSE:
        raise SystemExit(f"{what} brings back something else: error {error:.3g}")


@dataclass
class Exchange:
    """One exchange of this rank's layer, all three stages, whoever carries it."""

    own: RankLayer
    hidden: Tensor
    choice: Choice
    pairs: Tensor | None = None

    def __call__(self, mark: Callable[[], object] = lambda: None) -> Tensor:
        """Rows out and back: [T, D]; `mark` is called between the stages."""
        dispatcher = self.own.dispatcher
        mark()
        dispatcher.publish(self.hidden)
        (receipt,) = dispatcher.route(self.choice, 1)
        mark()
        rows = dispatcher.dispatch(self.hidden, receipt)
        mark()
        if self.pairs is None:
            # Kept for the timed calls, which have the same choice: this is the experts' part.
            self.pairs = rows if receipt.pair_row is None else rows[receipt.pair_row.long()]
        output = dispatcher.combine(self.pairs, self.choice.weights, receipt)
        mark()
        return output

    def stages_ms(self, num_samples: int) -> dict[str, float]:
        """Milliseconds of each stage on its slowest rank, the median of the samples."""
        samples = []
        for _ in range(num_samples):
            self.own.barrier()
            samples.append(self._stages())
        medians = [statistics.median(stage) for stage in zip(*samples, strict=True)]
        return {
            f"{name}_ms": self.own.slowest(ms) for name, ms in zip(_STAGES, medians, strict=True)
        }

    def _stages(self) -> list[float]:
        if self.own.device.type != "cuda":
            clock: list[float] = []
            self(lambda: clock.append(time.perf_counter()))
            return [(end - begin) * 1e3 for begin, end in zip(clock, clock[1:], strict=False)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(_STAGES) + 1)]
        waiting = iter(events)
        self(lambda: next(waiting).record())
        torch.cuda.synchronize(self.own.device)
        pairs = zip(events, events[1:], strict=False)
        return [begin.elapsed_time(end) for begin, end in pairs]


class NaiveExchange:
    """What anyone writes first: pairs sorted by rank, counts, rows and results by torch."""

    def __init__(self, shape: Shape, num_ranks: int) -> None:
        self.per_rank = -(-shape.num_experts // num_ranks)
        self.num_ranks = num_ranks

    def __call__(self, hidden: Tensor, choice: Choice) -> Tensor:
        """[T, D] -> [T, D]."""
        targets = choice.experts.flatten().long() // self.per_rank
        order = targets.argsort(stable=True)
        token = order // choice.experts.shape[1]
        counts = torch.bincount(targets, minlength=self.num_ranks)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts)
        sent, got = torch.stack([counts, arriving]).tolist()
        rows = hidden.new_empty(sum(got), hidden.shape[1])
        dist.all_to_all_single(rows, hidden[token], got, sent)
        back = hidden.new_empty(len(order), hidden.shape[1])
        dist.all_to_all_single(back, rows, sent, got)
        weighted = back * choice.weights.flatten()[order][:, None]
        output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return output.index_add_(0, token, weighted.float()).to(hidden.dtype)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each setting, shape and size, all transports side by side."""
    transports = list(dict.fromkeys(row["transport"] for row in rows))
    head = f"{'setting':8}{'shape':9}{'tokens':>7}{'limit ms':>10}{'naive ms':>10}"
    head += "".join(f" |{name + ' ms':>16}{'GB/s':>7}{'x limit':>9}" for name in transports)
    lines = [f"{head} |{'graph ms':>9}"]
    sizes: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["setting"], row["shape"], row["tokens_per_rank"])
        sizes.setdefault(key, {})[row["transport"]] = row
    for (setting, shape, tokens), found in sizes.items():
        some = next(iter(found.values()))
        line = f"{setting:8}{shape:9}{tokens:7}{some['limit_ms']:10.4f}{some['naive_ms']:10.3f}"
        for name in transports:
            row = found[name]
            ratio = "" if row["over_limit"] is None else f"{row['over_limit']:.2f}"
            line += f" |{row['ours_ms']:16.3f}{row['gigabytes_per_second']:7.1f}{ratio:>9}"
        graph = next((row["graph_ms"] for row in found.values() if row["graph_ms"]), None)
        lines.append(f"{line} |{'' if graph is None else f'{graph:.3f}':>9}")
    return lines


if __name__ == "__main__":
    main()
