"""Ranks as threads of this process: the same Worker, the same gloo, no Ray and no step channel.

For notebooks, debuggers and tests. Threads share one interpreter, so many ranks are slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.distributed.communicator import Rendezvous
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.worker import Worker

_Answer = TypeVar("_Answer")


class LocalWorkerGroup:
    """A WorkerGroup of threads."""

    block_size = BLOCK_SIZE

    def __init__(self, config: WorkerConfig) -> None:
        self.placement = config.placement
        num_ranks = config.placement.num_ranks
        self._workers = [Worker(rank, config) for rank in range(num_ranks)]
        # A thread each: the steps of a rank run one after the other.
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"lightmoe-rank-{rank}")
            for rank in range(num_ranks)
        ]
        self._under_way: deque[list[Future[StepResult]]] = deque()
        self._rendezvous = Rendezvous(config.timeout_seconds)
        port = self._rendezvous.port
        self._on_all(lambda worker: worker.join(port))
        self.ranks: Sequence[RankInfo] = self._on_all(Worker.load)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step on every rank at once."""
        ranks = zip(self._threads, self._workers, batches, strict=True)
        self._under_way.append(
            [thread.submit(_step, worker, batch) for thread, worker, batch in ranks]
        )

    def finish(self) -> list[StepResult]:
        """Wait for the first of the steps under way."""
        return [step.result() for step in self._under_way.popleft()]

    def _on_all(self, call: Callable[[Worker], _Answer]) -> list[_Answer]:
        ranks = zip(self._threads, self._workers, strict=True)
        answers = [thread.submit(call, worker) for thread, worker in ranks]
        return [answer.result() for answer in answers]

    def check(self) -> None:
        """Threads do not die by themselves."""

    def close(self) -> None:
        """Stop the threads."""
        for thread in self._threads:
            thread.shutdown()


def _step(worker: Worker, batch: Batch) -> StepResult:
    with torch.inference_mode():
        return worker.step(batch)
