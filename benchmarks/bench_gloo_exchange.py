"""What one exchange among CPU ranks costs, by how many pairs of ranks have something to say.

    python benchmarks/bench_gloo_exchange.py [--gpus 10]

`gloo_ms` is gloo's own all-to-all, `ours_ms` lightmoe/distributed/communicator.py, which sends
single messages. Every rank is a process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import protocol
import torch
import torch.distributed

from lightmoe.distributed.communicator import Communicator, Rendezvous

TIMEOUT_SECONDS = 60.0


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=10)
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    rendezvous = Rendezvous(TIMEOUT_SECONDS)
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    ranks = [
        context.Process(
            target=run_rank,
            args=(rank, options.gpus, rendezvous.port, options.samples, child),
        )
        for rank in range(options.gpus)
    ]
    for process in ranks:
        process.start()
    rows = json.loads(parent.recv_bytes())
    for process in ranks:
        process.join()
    for row in rows:
        print(row)
    protocol.write("gloo-exchange", rows)


def run_rank(rank: int, num_ranks: int, port: int, samples: int, out: object) -> None:
    """One rank: for a growing number of ranks that send one row to everybody, time both ways."""
    torch.set_num_threads(1)
    communicator = Communicator(rank, num_ranks, port, TIMEOUT_SECONDS)
    rows = []
    sizes = itertools.product((256, 65536), (1, 3, 5, num_ranks))
    for width, num_senders in sizes:
        counts_in = [int(source < num_senders) for source in range(num_ranks)]
        counts_out = [int(rank < num_senders)] * num_ranks
        sent = torch.ones(sum(counts_out), width)
        received = torch.empty(sum(counts_in), width)

        arguments = (received, sent, counts_in, counts_out)
        ours = functools.partial(timed, communicator.all_to_all, arguments)
        theirs = functools.partial(
            timed, functools.partial(gloo_all_to_all, communicator), arguments
        )
        gloo_ms = protocol.measure(theirs, 20, samples)
        ours_ms = protocol.measure(ours, 20, samples)
        rows.append(
            {
                "num_ranks": num_ranks,
                "messages": num_senders * (num_ranks - 1),
                "pairs": num_ranks * (num_ranks - 1),
                "message_bytes": width * 4,
                "gloo_ms": gloo_ms,
                "ours_ms": ours_ms,
            }
        )
    if rank == 0:
        out.send_bytes(json.dumps(rows).encode())


def timed(call: Callable[..., None], arguments: tuple[Any, ...]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1e3


def gloo_all_to_all(
    communicator: Communicator,
    received: torch.Tensor,
    sent: torch.Tensor,
    counts_in: list[int],
    counts_out: list[int],
) -> None:
    """gloo's own collective on the same group."""
    options = torch.distributed.AllToAllOptions()
    communicator._group.alltoall_base(received, sent, counts_in, counts_out, options).wait()


if __name__ == "__main__":
    main()
