"""The watchdog of exchanges between GPUs, over a real store, with events that tests decide."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch._C import _distributed_c10d as dist

from lightmoe.distributed.communicator import LOOPBACK, Rendezvous
from lightmoe.distributed.watchdog import Watchdog, within
from lightmoe.errors import RankError

TIMEOUT_SECONDS = 0.6


class Rank:
    """A rank's watchdog, and what it did. Of its exchanges `num_done` have ended."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        port: int,
        health: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_done = 0
        self.num_aborts = 0
        self.aborted = threading.Event()
        store = dist.TCPStore(
            LOOPBACK, port, is_master=False, timeout=timedelta(seconds=TIMEOUT_SECONDS)
        )
        self.watchdog = Watchdog(
            rank,
            num_ranks,
            store,
            TIMEOUT_SECONDS,
            num_done=lambda: self.num_done,
            health=health,
            abort=self._abort,
        )

    def _abort(self) -> None:
        self.num_aborts += 1
        self.aborted.set()

    def exchange(self, *, done: bool) -> None:
        number = self.watchdog.begin()
        if done:
            self.num_done = number


def test_exchanges_that_end_are_no_concern() -> None:
    rendezvous = Rendezvous(5.0)
    rank = Rank(0, 1, rendezvous.port)
    for _ in range(20):
        rank.exchange(done=True)

    assert not rank.aborted.wait(2 * TIMEOUT_SECONDS)
    rank.watchdog.check()
    rank.watchdog.close()


@pytest.mark.parametrize("num_unseen", [0, 2])
def test_the_rank_that_did_not_come_is_named_and_the_exchange_aborted(num_unseen: int) -> None:
    """Also where some that have ended are not known to have."""
    rendezvous = Rendezvous(5.0)
    ranks = [Rank(rank, 3, rendezvous.port) for rank in range(3)]
    for rank in ranks:
        for turn in range(4):
            rank.exchange(done=turn < 4 - num_unseen)
    started = time.monotonic()
    for rank in (ranks[0], ranks[2]):  # rank 1 computes on, or is gone
        rank.exchange(done=False)

    for rank in (ranks[0], ranks[2]):
        assert rank.aborted.wait(5.0)
        with pytest.raises(
            RankError,
            match=rf"exchange {5 - num_unseen} of rank [02] did not end within 0.6 s;"
            r" rank 1 has come to 4 of 5 exchanges: stopped, or dead\?",
        ):
            rank.watchdog.check()
        with pytest.raises(RankError):
            rank.watchdog.begin()
    assert time.monotonic() - started >= TIMEOUT_SECONDS
    for rank in ranks:
        rank.watchdog.close()


def test_nobody_is_named_where_all_have_come() -> None:
    rendezvous = Rendezvous(5.0)
    rank = Rank(0, 1, rendezvous.port)
    rank.exchange(done=False)

    assert rank.aborted.wait(5.0)
    with pytest.raises(RankError, match="did not end .* all ranks have come to it"):
        rank.watchdog.check()
    rank.watchdog.close()


def test_what_the_transport_knows_is_not_waited_for() -> None:
    rendezvous = Rendezvous(5.0)

    def health() -> None:
        raise ValueError("remote error")

    rank = Rank(0, 2, rendezvous.port, health)
    rank.exchange(done=False)

    assert rank.aborted.wait(TIMEOUT_SECONDS)
    with pytest.raises(RankError, match=r"failed \(remote error\); rank 1 has come to 0 of 1"):
        rank.watchdog.check()
    rank.watchdog.close()


def test_a_refusal_of_the_transport_names_who_is_missing() -> None:
    rendezvous = Rendezvous(5.0)
    ranks = [Rank(rank, 2, rendezvous.port) for rank in range(2)]
    ranks[0].watchdog.begin()

    error = ranks[0].watchdog.fail(RuntimeError("connection reset"))

    assert "failed (connection reset); rank 1 has come to 0 of 1" in str(error)
    for rank in ranks:
        rank.watchdog.close()


def test_two_who_see_the_failure_abort_once() -> None:
    rendezvous = Rendezvous(5.0)
    slow = threading.Event()

    def health() -> None:
        slow.wait(0.3)
        raise ValueError("remote error")

    rank = Rank(0, 1, rendezvous.port, health)
    rank.watchdog.begin()

    error = rank.watchdog.fail(RuntimeError("connection reset"))

    rank.watchdog.close()
    assert rank.num_aborts == 1
    with pytest.raises(RankError) as raised:
        rank.watchdog.check()
    assert raised.value is error


def test_within_gives_the_result_or_the_error_or_gives_up() -> None:
    assert within(5.0, lambda: 7, "seven") == 7
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0, "nothing")
    waiting = threading.Event()
    with pytest.raises(RankError, match=r"rank 0 could not join within 0\.1 s"):
        within(0.1, waiting.wait, "rank 0 could not join")
    waiting.set()
