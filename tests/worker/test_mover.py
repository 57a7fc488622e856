"""A rank's part in a migration: bytes beside the steps, the flip, and what it refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightmoe.core import HOST_COPY, Arrivals, Orders, Piece, SlotChange
from lightmoe.distributed.communicator import Communicator
from lightmoe.errors import CheckpointError, PlacementError
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.worker.local_group import LocalWorkerGroup
from lightmoe.worker.mover import HostCopy, Mover, RankCopies
from tests.models.folders import write_model
from tests.moe.cases import placement_of
from tests.ranks import RankThreads
from tests.worker.groups import new_config

# Expert 0 at home on rank 0, expert 1 on rank 1; each rank has slot 0 in use and slot 1 free.
PLACEMENT = placement_of([[[0], [1]]], 2)
NUM_ELEMENTS = 6
NUM_BYTES = 4 * NUM_ELEMENTS


def blob(expert: int) -> Tensor:
    return torch.arange(NUM_ELEMENTS, dtype=torch.float32) + 100.0 * (expert + 1)


def new_mover(
    rank: int,
    messages: Communicator | None = None,
    host_copy: HostCopy | None = None,
    copies: RankCopies | None = None,
) -> tuple[Mover, ExpertGroup, Tensor]:
    group = ExpertGroup(rank, PLACEMENT, None, "waterfill", np.zeros(1, dtype=np.int64))
    blobs = torch.zeros(2, NUM_ELEMENTS)
    blobs[0] = blob(rank)
    return Mover(group, blobs, messages, host_copy, copies), group, blobs


def piece(begin: int, end: int, source: int = 0, **changes: int) -> Piece:
    values = {"source_slot": 0 if source >= 0 else -1, "target_rank": 1, "target_slot": 1} | changes
    return Piece(5, 0, 0, source, **values, begin=begin, end=end, is_last=end == NUM_BYTES)


def wait_for(mover: Mover) -> Arrivals:
    end = time.monotonic() + 10
    while True:
        arrivals = mover.arrivals()
        if arrivals is not None and (arrivals.transfers or arrivals.error):
            return arrivals
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_expert_travels_in_pieces_and_is_named_after_the_last() -> None:
    ranks = RankThreads(2)
    borders = [0, 7, 8, NUM_BYTES]

    def move(messages: Communicator) -> tuple[Tensor, list[tuple[int, ...]], tuple[int, ...]]:
        mover, group, blobs = new_mover(messages.rank, messages)
        seen = []
        for begin, end in zip(borders, borders[1:], strict=False):
            mover.begin(Orders(0, pieces=(piece(begin, end),)))
            arrivals = mover.arrivals()
            seen.append(arrivals.transfers if arrivals else ())
        if messages.rank == 1:
            seen.append(seen.pop() or wait_for(mover).transfers)
        changes = (SlotChange(0, 0, 1, 1, True), SlotChange(0, 0, 0, -1))
        mover.begin(Orders(1, changes, route="even"))
        assert (group.placement.epoch, group.route) == (1, "even")
        return blobs, seen, group.placement.ranks_of(0, 0)

    (_, nothing, holders), (blobs, seen, same_holders) = ranks.run(move)
    ranks.close()

    assert torch.equal(blobs, torch.stack([blob(1), blob(0)]))
    assert nothing == [(), (), ()]
    assert seen == [(), (), (5,)]
    assert holders == same_holders == (1,)


def test_the_hosts_copy_is_read_once_and_written_in_pieces() -> None:
    reads = []
    may_read = threading.Event()

    def host_copy(layer: int, expert: int) -> Tensor:
        assert may_read.wait(10)
        reads.append((layer, expert))
        return blob(expert).view(torch.uint8)

    mover, _, blobs = new_mover(1, host_copy=host_copy)
    mover.begin(Orders(0, pieces=(piece(0, 10, HOST_COPY),)))
    mover.begin(Orders(0, pieces=(piece(10, NUM_BYTES, HOST_COPY),)))

    may_read.set()  # no step has waited for the copy
    assert wait_for(mover).transfers == (5,)
    assert torch.equal(blobs[1], blob(0))
    assert reads == [(0, 0)]


def test_a_copy_that_cannot_be_read_is_told_and_the_rank_lives() -> None:
    def gone(layer: int, expert: int) -> Tensor:
        raise CheckpointError("the file is gone")

    mover, group, _ = new_mover(1, host_copy=gone)
    mover.begin(Orders(0, pieces=(piece(0, NUM_BYTES, HOST_COPY),)))

    arrivals = wait_for(mover)

    assert (arrivals.transfers, arrivals.error) == ((), "rank 1: the file is gone")
    mover.begin(Orders(0))
    assert group.placement is PLACEMENT


class PoolsOfOthers:
    """Copies from pools in this process, each ended when it is told to."""

    def __init__(self, pools: dict[int, Tensor]) -> None:
        self._pools = {rank: pool.view(torch.uint8).ravel() for rank, pool in pools.items()}
        self.started: list[Future[None]] = []

    def start(self, copies: Sequence[tuple[int, int, Tensor]]) -> Future[None]:
        for rank, begin, target in copies:
            target.copy_(self._pools[rank][begin : begin + len(target)])
        self.started.append(Future())
        return self.started[-1]


def test_cards_that_reach_each_other_fetch_and_the_source_does_nothing() -> None:
    _, _, source_blobs = new_mover(0)
    fetches = PoolsOfOthers({0: source_blobs})
    mover, _, blobs = new_mover(1, copies=fetches)
    source, _, _ = new_mover(0, copies=PoolsOfOthers({}))

    for begin, end in ((0, 7), (7, NUM_BYTES)):
        orders = Orders(0, pieces=(piece(begin, end),))
        source.begin(orders)
        assert source.arrivals() is None
        mover.begin(orders)
        assert mover.arrivals() is None, "said to be here before the copy has ended"
        fetches.started[-1].set_result(None)
    arrivals = mover.arrivals()

    assert arrivals == Arrivals((5,))
    assert torch.equal(blobs, torch.stack([blob(1), blob(0)]))


def test_orders_follow_a_running_step_only_where_the_device_keeps_their_turn() -> None:
    """Another route is read by the host, and so is what passes its memory."""
    moving, routing = Orders(0, pieces=(piece(0, 7),)), Orders(0, route="even")
    on_cards, by_host = new_mover(1, copies=PoolsOfOthers({}))[0], new_mover(1)[0]

    assert on_cards.may_follow(moving)
    assert not on_cards.may_follow(routing)
    assert not by_host.may_follow(moving)


class SlowMessages:
    """Bytes that come only when they may; nothing else is asked of it here."""

    def __init__(self) -> None:
        self.may_come = threading.Event()
        self.num_under_way = 0

    def start_messages(self, received: object, sent: object) -> Callable[[], None]:
        self.num_under_way += 1
        assert self.num_under_way == 1, "two steps' pieces are under way"

        def wait() -> None:
            assert self.may_come.wait(10)
            self.num_under_way -= 1

        return wait


def test_a_step_waits_for_the_piece_of_the_step_before_and_says_how_long() -> None:
    slow = SlowMessages()
    mover, _, _ = new_mover(1, slow)  # type: ignore[arg-type]
    mover.begin(Orders(0, pieces=(piece(0, 10),)))
    assert mover.arrivals() is None
    threading.Timer(0.05, slow.may_come.set).start()

    mover.begin(Orders(0, pieces=(piece(10, NUM_BYTES),)))

    waited = mover.arrivals()
    assert waited is not None
    assert waited.waited_seconds > 0.01
    transfers = waited.transfers or wait_for(mover).transfers
    assert transfers == (5,)


@pytest.mark.parametrize(
    ("rank", "orders", "message"),
    [
        (1, Orders(0, pieces=(piece(0, 4, target_slot=0),)), "slot 0 of rank 1 is in use"),
        (1, Orders(0, pieces=(piece(0, 4, target_slot=2),)), "rank 1 has slots 0 to 1, not 2"),
        (
            0,
            Orders(0, pieces=(piece(0, 4, source_slot=1),)),
            "expert 0 of layer 0 in slot 0, not 1",
        ),
        (
            1,
            Orders(0, pieces=(piece(0, 4, source_slot=1),)),
            "rank 0 has expert 0 of layer 0 in slot 0, not 1",
        ),
        (0, Orders(3), "rank 0 is at epoch 0, its orders at 3"),
        (0, Orders(2, (SlotChange(0, 0, 1, 1),)), "epoch 2 does not follow epoch 0"),
    ],
)
def test_orders_that_do_not_fit_are_refused(rank: int, orders: Orders, message: str) -> None:
    mover, group, blobs = new_mover(rank, copies=PoolsOfOthers({}))

    with pytest.raises(PlacementError, match=message):
        mover.begin(orders)

    assert group.placement is PLACEMENT
    assert torch.equal(blobs[0], blob(rank))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_checkpoint_read_again_has_the_bytes_of_the_slots(
    tmp_path: Path, load_format: str
) -> None:
    folder = write_model(tmp_path)
    config = new_config(folder, 2, load_format=load_format)
    group = LocalWorkerGroup(config)
    num_compared = 0
    for worker in group._workers:
        assert worker._mover is not None
        slots = worker._mover._slots
        host_copy = worker._new_host_copy(slots.view(torch.float32))
        for layer, expert, slot in config.placement.hosted(worker.rank):
            assert torch.equal(host_copy(layer, expert), slots[slot])
            num_compared += 1
    group.close()
    assert num_compared == 10
