"""What CPU ranks on this machine reach: products, copies, and exchanges over loopback.

Ranks are threads here, each with its own end of a gloo group, in place of processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.topology.cpu import CpuFigures

_TIMEOUT_SECONDS = 30.0
_MATMUL_SIZE = 1024
_COPY_BYTES = 64 << 20
_SMALL, _LARGE = 1 << 10, 1 << 20
_SECONDS = 0.4


def measure_cpu(num_ranks: int, memory_bytes: int) -> CpuFigures:
    """Measure for `num_ranks` ranks; about three seconds. torch computes on one thread a rank."""
    num_cores = len(os.sched_getaffinity(0))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(num_ranks, num_cores)) as pool:
            flops = 2 * _MATMUL_SIZE**3 / _product_seconds(pool, num_cores)
            message, bandwidth = _exchange_costs(pool, num_ranks)
            copied = 2 * _COPY_BYTES / _copy_seconds()
    finally:
        torch.set_num_threads(num_threads)
    return CpuFigures(
        num_cores=num_cores,
        memory_bytes=memory_bytes,
        flops_per_second=flops,
        copy_bytes_per_second=copied,
        message_seconds=message,
        loopback_bytes_per_second=bandwidth,
    )


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    samples: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while len(samples) < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def _product_seconds(pool: ThreadPoolExecutor, num_cores: int) -> float:
    """Seconds of one product a core, all cores at once."""
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)

    def multiply(_: int) -> None:
        torch.mm(left, left)

    return _median_seconds(lambda: list(pool.map(multiply, range(num_cores))))


def _copy_seconds() -> float:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source))


def _exchange_costs(pool: ThreadPoolExecutor, num_ranks: int) -> tuple[float, float]:
    """Seconds a message and bytes per second, from all-to-alls of small and of large messages."""
    if num_ranks == 1:
        return 0.0, 2 * _COPY_BYTES / _copy_seconds()
    rendezvous = Rendezvous(_TIMEOUT_SECONDS)
    ends = list(
        pool.map(
            lambda rank: Communicator(rank, num_ranks, rendezvous.port, _TIMEOUT_SECONDS),
            range(num_ranks),
        )
    )
    small, large = (_exchange_seconds(pool, ends, size) for size in (_SMALL, _LARGE))
    num_messages = num_ranks * (num_ranks - 1)
    # Noise must not make the large ones as cheap as the small.
    for_bytes = max(large - small, large / 100)
    return small / num_messages, num_messages * (_LARGE - _SMALL) / for_bytes


def _exchange_seconds(pool: ThreadPoolExecutor, ends: list[Communicator], size: int) -> float:
    counts = [size] * len(ends)
    sent = [torch.zeros(sum(counts), dtype=torch.uint8) for _ in ends]
    received = [torch.empty_like(buffer) for buffer in sent]

    def exchange(rank: int) -> None:
        ends[rank].all_to_all(received[rank], sent[rank], counts, counts)

    return _median_seconds(lambda: list(pool.map(exchange, range(len(ends)))))
