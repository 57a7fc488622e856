"""The all-to-all over real gloo, in both of its forms, and who can reach its sockets."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.distributed.communicator import Communicator, Rendezvous
from lightmoe.errors import RankError
from tests.ranks import RankThreads, RankThreadsCache
from tests.sockets import listening_addresses

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int64]


def exchange(ranks: RankThreadsCache, counts: np.ndarray, dtype: torch.dtype) -> None:
    """Send counts[from, to] numbered rows, and check what every rank got."""
    num_ranks = len(counts)

    def rows(sender: int, receiver: int) -> torch.Tensor:
        first = 100 * sender + 10 * receiver
        return torch.arange(first, first + counts[sender, receiver])[:, None].repeat(1, 3).to(dtype)

    def task(communicator: Communicator) -> torch.Tensor:
        rank = communicator.rank
        sent = torch.cat([rows(rank, peer) for peer in range(num_ranks)])
        received = torch.empty(int(counts[:, rank].sum()), 3, dtype=dtype)
        received_counts, sent_counts = counts[:, rank].tolist(), counts[rank].tolist()
        communicator.all_to_all(received, sent, received_counts, sent_counts)
        return received

    for rank, received in enumerate(ranks.run(num_ranks, task)):
        assert torch.equal(received, torch.cat([rows(peer, rank) for peer in range(num_ranks)]))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), num_ranks=st.sampled_from([1, 2, 3, 5]))
def test_rows_arrive_in_rank_order_for_any_counts(
    ranks: RankThreadsCache, data: st.DataObject, num_ranks: int
) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=num_ranks**2, max_size=num_ranks**2))

    exchange(ranks, np.array(counts).reshape(num_ranks, num_ranks), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_travels(ranks: RankThreadsCache, dtype: torch.dtype) -> None:
    exchange(ranks, np.array([[1, 0, 2], [0, 0, 3], [4, 0, 1]]), dtype)


def test_nobody_has_anything_to_send(ranks: RankThreadsCache) -> None:
    exchange(ranks, np.zeros((3, 3), dtype=np.int64), torch.float32)


def test_a_rank_that_is_ahead_does_not_mix_its_messages() -> None:
    group = RankThreads(2)

    def task(communicator: Communicator) -> list[float]:
        got = []
        for turn in range(20):
            if communicator.rank == 0 and turn % 5 == 0:
                time.sleep(0.01)
            received = torch.empty(2, 1)
            sent = torch.full((2, 1), 10.0 * turn + communicator.rank)
            communicator.all_to_all(received, sent, [1, 1], [1, 1])
            got.append(received[1 - communicator.rank].item())
        return got

    results = group.run(task)
    group.close()
    assert results[0] == [10.0 * turn + 1 for turn in range(20)]
    assert results[1] == [10.0 * turn for turn in range(20)]


def test_a_peer_that_is_late_is_a_rank_error() -> None:
    rendezvous = Rendezvous(20.0)
    others = []
    joining = threading.Thread(
        target=lambda: others.append(Communicator(1, 2, rendezvous.port, timeout_seconds=20.0))
    )
    joining.start()
    alone = Communicator(0, 2, rendezvous.port, timeout_seconds=1.0)
    joining.join()

    with pytest.raises(RankError, match="rank 0 lost a peer in an all-to-all"):
        alone.all_to_all(torch.empty(2, 1), torch.ones(2, 1), [1, 1], [1, 1])


def test_a_group_that_never_fills_is_a_rank_error() -> None:
    rendezvous = Rendezvous(20.0)

    with pytest.raises(RankError, match=r"rank 0 could not join the group of 2 within 1 s"):
        Communicator(0, 2, rendezvous.port, timeout_seconds=1.0)


def test_store_and_gloo_listen_on_loopback_only() -> None:
    before = listening_addresses()

    group = RankThreads(3)

    opened = listening_addresses() - before
    group.close()
    assert len(opened) >= 2  # the store and gloo
    assert {address for address, _ in opened} == {"127.0.0.1"}
