"""Collectives among ranks on CPUs: gloo over loopback, made without any global state.

With no global process group, the ranks of a test can be threads of one process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as dist

from lightmoe.errors import RankError

LOOPBACK = "127.0.0.1"
_MESSAGE_TAG = 1 << 30
"""Above those of exchanges."""


class Rendezvous:
    """The key-value store where ranks meet. It listens on one address, loopback's by default.

    TCPStore alone would listen on every interface; given a socket that already listens, it uses
    that one.
    """

    def __init__(self, timeout_seconds: float, host: str = LOOPBACK) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((host, 0))
        listener.listen(1024)
        self.port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class Transfer(NamedTuple):
    """Rows of `sent` to every rank, rows of every rank into `received`, both in rank order.

    Counts are rows per rank; where there are none there is no message.
    """

    received: Tensor
    sent: Tensor
    received_counts: Sequence[int]
    sent_counts: Sequence[int]


class Exchanger(Protocol):
    """What carries rows between ranks: gloo here, NCCL in nccl.py.

    `stream` is where it runs on a GPU.
    """

    stream: torch.cuda.Stream | None

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
    ) -> None:
        """One transfer."""
        ...

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """Carry these at once. Every rank calls it equally often, with as many transfers."""
        ...


class Communicator:
    """One rank's end of the group. Every rank calls the same collectives in the same order.

    The store is at `store_host` and `port`; the other ranks reach this one at `host`.
    """

    stream: torch.cuda.Stream | None = None

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        port: int,
        timeout_seconds: float,
        *,
        host: str = LOOPBACK,
        store_host: str = LOOPBACK,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.host = host
        self._store_address = (store_host, port)
        timeout = timedelta(seconds=timeout_seconds)
        store = self.connect_store(timeout_seconds)
        # torch's type stubs lack gloo's options and collectives.
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timeout
        options._threads = 1
        try:
            self._group = gloo(store, rank, num_ranks, options)
        except RuntimeError as error:
            raise RankError(
                f"rank {rank} could not join the group of {num_ranks} within"
                f" {timeout_seconds:.0f} s: {error}"
            ) from error
        self._num_transfers = 0

    def connect_store(self, timeout_seconds: float) -> Any:
        """A connection of its own to the store where the ranks met."""
        timeout = timedelta(seconds=timeout_seconds)
        return dist.TCPStore(*self._store_address, is_master=False, timeout=timeout)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
    ) -> None:
        """One transfer."""
        self.exchange([Transfer(received, sent, received_counts, sent_counts)])

    def exchange(self, transfers: Sequence[Transfer]) -> None:
        """All of them at once, by single messages: gloo's own all-to-all sends one to every rank in
        any case, which is what a small step would spend its time on.

        Raises RankError when a peer is gone or late; the group is of no use then.
        """
        messages = [message for transfer in transfers for message in self._messages(transfer)]
        try:
            works = [start([rows], peer, tag) for start, rows, peer, tag in messages]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} lost a peer in an all-to-all: {error}") from error

    def _messages(self, transfer: Transfer) -> Iterator[tuple[Any, Tensor, int, int]]:
        """Receive or send, its rows, the peer, the tag; this rank's own rows are copied."""
        # gloo refuses int16 and float8; bytes it takes.
        parts_in = _as_bytes(transfer.received).split(list(transfer.received_counts))
        parts_out = _as_bytes(transfer.sent).split(list(transfer.sent_counts))
        # The tag tells this transfer's messages from the next one's of a rank that is ahead.
        self._num_transfers += 1
        tag = self._num_transfers % (1 << 30)
        for peer, (rows_in, rows_out) in enumerate(zip(parts_in, parts_out, strict=True)):
            if peer == self.rank:
                rows_in.copy_(rows_out)
                continue
            if len(rows_in):
                yield self._group.recv, rows_in, peer, tag
            if len(rows_out):
                yield self._group.send, rows_out, peer, tag

    def start_messages(
        self, received: Sequence[tuple[int, Tensor]], sent: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Single messages of bytes (peer, uint8) that travel beside the exchanges of a step.

        Between two ranks they arrive in the order in which both name them. Returns what waits for
        them, and raises RankError there when a peer is gone or late.
        """
        works = [self._group.recv([part], peer, _MESSAGE_TAG) for peer, part in received]
        works += [self._group.send([part], peer, _MESSAGE_TAG) for peer, part in sent]

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise RankError(f"rank {self.rank} lost a peer in a migration: {error}") from error

        return wait


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.dtype == torch.int16 else rows
