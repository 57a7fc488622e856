"""Ranks as threads of this process: the same Worker, the same gloo, no Ray and no step channel.

For notebooks, debuggers and tests. Threads share one interpreter, so many ranks are slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.distributed.communicator import Rendezvous
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.worker import Worker


class LocalWorkerGroup:
    """A WorkerGroup of threads."""

    block_size = BLOCK_SIZE

    def __init__(self, config: WorkerConfig) -> None:
        self.placement = config.placement
        num_ranks = config.placement.num_ranks
        self._workers = [Worker(rank, config) for rank in range(num_ranks)]
        self._pool = ThreadPoolExecutor(num_ranks, thread_name_prefix="lightmoe-rank")
        self._rendezvous = Rendezvous(config.timeout_seconds)
        port = self._rendezvous.port
        list(self._pool.map(lambda worker: worker.join(port), self._workers))
        self.ranks: Sequence[RankInfo] = list(self._pool.map(Worker.load, self._workers))

    def step(self, batches: Sequence[Batch]) -> list[StepResult]:
        """Run one step on every rank at once."""
        return list(self._pool.map(_step, self._workers, batches))

    def check(self) -> None:
        """Threads do not die by themselves."""

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def _step(worker: Worker, batch: Batch) -> StepResult:
    with torch.inference_mode():
        return worker.step(batch)
