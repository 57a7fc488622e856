"""A thread that sees an exchange between GPUs overrun its time, says who is late, and ends it.

A GPU that waits for a peer waits for ever, and the host behind it. Every rank tells in the store
how many exchanges it has come to; who has come to the fewest is late, or gone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from lightmoe.errors import RankError

_PERIOD_SECONDS = 0.2
_KEY = "exchanges/"


class Store(Protocol):
    """What is used of torch's TCPStore."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of these keys are there."""
        ...

    def get(self, key: str) -> bytes:
        """Read a key, or wait for it."""
        ...


class Watchdog:
    """Watches the exchanges of one rank, which every rank begins in the same order.

    `num_done` tells how many have ended; it must not ask the GPU: a call may wait for what runs
    there. `health` raises where the transport knows of a failure before the time is over. `abort`
    ends what hangs. Both are called in the watchdog's thread.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        store: Store,
        timeout_seconds: float,
        *,
        num_done: Callable[[], int],
        health: Callable[[], None],
        abort: Callable[[], None],
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._period_seconds = min(_PERIOD_SECONDS, timeout_seconds / 4)
        self._num_done = num_done
        self._health = health
        self._abort = abort
        self._pending: deque[tuple[int, float]] = deque()  # number, time of its begin
        self.num_begun = 0
        self._num_published = -1
        self._failure: RankError | None = None
        self._failing = threading.Lock()
        self._closing = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="lightmoe-watchdog", daemon=True)
        self._thread.start()

    def begin(self) -> int:
        """Another exchange begins: its number, from 1 on. RankError where one has failed."""
        self.check()
        self.num_begun += 1
        self._pending.append((self.num_begun, time.monotonic()))
        return self.num_begun

    def check(self) -> None:
        """RankError once an exchange has failed: what it received is not to be used."""
        if self._failure is not None:
            raise self._failure

    def fail(self, cause: Exception) -> RankError:
        """The error for an exchange that the transport refused; waits until the peers have told."""
        self._closing.wait(2 * self._period_seconds)
        return self._end(self._error(self.num_begun, f"failed ({cause})"))

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join(self._timeout_seconds)

    def _run(self) -> None:
        while not self._closing.wait(self._period_seconds):
            try:
                self._publish()
            except RuntimeError as error:
                self._end(RankError(f"rank 0 is gone, and with it the ranks' store: {error}"))
                return
            failure = self._look()
            if failure is not None:
                self._end(failure)
                return

    def _end(self, failure: RankError) -> RankError:
        """The first failure is the one that counts, and aborts."""
        with self._failing:
            is_first = self._failure is None
            # Before the abort: who waits for the exchange wakes up by that, and must see it.
            known = self._failure = self._failure or failure
        if is_first:
            self._abort()
        return known

    def _look(self) -> RankError | None:
        num_done = self._num_done()
        while self._pending and self._pending[0][0] <= num_done:
            self._pending.popleft()
        if not self._pending:
            return None
        number, started = self._pending[0]
        try:
            self._health()
        except Exception as error:
            return self._error(number, f"failed ({error})")
        if time.monotonic() - started < self._timeout_seconds:
            return None
        return self._error(number, f"did not end within {self._timeout_seconds:g} s")

    def _publish(self) -> None:
        if self.num_begun != self._num_published:
            self._num_published = self.num_begun
            self._store.set(f"{_KEY}{self._rank}", str(self._num_published))

    def _error(self, number: int, what: str) -> RankError:
        begun = [self._begun(rank) for rank in range(self._num_ranks)]
        fewest = min(begun)
        late = [str(rank) for rank, count in enumerate(begun) if count == fewest]
        whose = "all ranks have come to it: is a link down?"
        if fewest < max(begun):
            names = f"rank {late[0]} has" if len(late) == 1 else f"ranks {', '.join(late)} have"
            whose = f"{names} come to {fewest} of {max(begun)} exchanges: stopped, or dead?"
        return RankError(f"exchange {number} of rank {self._rank} {what}; {whose}")

    def _begun(self, rank: int) -> int:
        if rank == self._rank:
            return self.num_begun
        key = f"{_KEY}{rank}"
        try:
            return int(self._store.get(key)) if self._store.check([key]) else 0
        except RuntimeError:  # the store went with rank 0, which is the one to blame then
            return 0 if rank == 0 else self.num_begun


def within(seconds: float, call: Callable[[], Any], message: str) -> Any:
    """The result of a call that may never come back; RankError after that time."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="lightmoe-within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise RankError(f"{message} within {seconds:g} s")
    return results[0]
