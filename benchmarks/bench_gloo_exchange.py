"""What one exchange among CPU ranks costs, by how many pairs of ranks have something to say.

    python benchmarks/bench_gloo_exchange.py [--gpus 10]

`dense` is gloo's all-to-all, `sparse` single messages: the figures behind the choice between the
two in lightmoe/moe/dispatch/gloo.py. Every rank is a process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time

import protocol
import torch

from lightmoe.distributed.communicator import Communicator, Rendezvous

WIDTH = 256
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
    for num_senders in (1, 2, 3, 5, num_ranks):
        counts_in = [int(source < num_senders) for source in range(num_ranks)]
        counts_out = [int(rank < num_senders)] * num_ranks
        sent = torch.ones(sum(counts_out), WIDTH)
        received = torch.empty(sum(counts_in), WIDTH)

        def exchange(sparse: bool, arguments: tuple[object, ...]) -> float:
            started = time.perf_counter()
            communicator.all_to_all(*arguments, sparse=sparse)
            return (time.perf_counter() - started) * 1e3

        arguments = (received, sent, counts_in, counts_out)
        dense = protocol.measure(lambda a=arguments: exchange(False, a), 20, samples)
        sparse = protocol.measure(lambda a=arguments: exchange(True, a), 20, samples)
        rows.append(
            {
                "num_ranks": num_ranks,
                "messages": num_senders * (num_ranks - 1),
                "pairs": num_ranks * (num_ranks - 1),
                "dense_ms": dense,
                "sparse_ms": sparse,
            }
        )
    if rank == 0:
        out.send_bytes(json.dumps(rows).encode())


if __name__ == "__main__":
    main()
