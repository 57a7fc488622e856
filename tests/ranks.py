"""Ranks as threads over a real gloo group, for tests of the rooms below worker/."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.errors import RankError

TIMEOUT_SECONDS = 20.0
Result = TypeVar("Result")


class RankThreads:
    """A gloo group of threads, for as many tasks as one likes."""

    def __init__(self, num_ranks: int) -> None:
        self._rendezvous = Rendezvous(TIMEOUT_SECONDS)
        self._pool = ThreadPoolExecutor(num_ranks)
        port = self._rendezvous.port
        self.communicators = list(
            self._pool.map(
                lambda rank: Communicator(rank, num_ranks, port, TIMEOUT_SECONDS), range(num_ranks)
            )
        )

    def run(self, task: Callable[[Communicator], Result]) -> list[Result]:
        """The results of `task` on every rank at once."""
        futures = [self._pool.submit(_inferring, task, one) for one in self.communicators]
        wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        # A rank that fails leaves its peers alone in a collective: theirs are not the cause.
        for error in sorted(errors, key=lambda error: isinstance(error, RankError)):
            raise error
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class RankThreadsCache:
    """One group per size for the whole session: making one costs more than a test with it."""

    def __init__(self) -> None:
        self._groups: dict[int, RankThreads] = {}

    def run(self, num_ranks: int, task: Callable[[Communicator], Result]) -> list[Result]:
        """As RankThreads.run; a group in which something failed is not used again."""
        group = self._groups.pop(num_ranks, None) or RankThreads(num_ranks)
        results = group.run(task)
        self._groups[num_ranks] = group
        return results

    def close(self) -> None:
        """End all groups."""
        for group in self._groups.values():
            group.close()


def _inferring(task: Callable[[Communicator], Result], communicator: Communicator) -> Result:
    with torch.inference_mode():
        return task(communicator)
