"""Collectives among ranks on CPUs: gloo over loopback, made without any global state.

With no global process group, the ranks of a test can be threads of one process.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as dist

from lightmoe.errors import RankError

LOOPBACK = "127.0.0.1"


class Rendezvous:
    """The key-value store where ranks meet. It listens on loopback only.

    TCPStore alone would listen on every interface; given a socket that already listens, it uses
    that one.
    """

    def __init__(self, timeout_seconds: float) -> None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((LOOPBACK, 0))
        listener.listen(1024)
        self.port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(
            LOOPBACK,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class Communicator:
    """One rank's end of the group. Every rank calls the same collectives in the same order."""

    def __init__(self, rank: int, num_ranks: int, port: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        timeout = timedelta(seconds=timeout_seconds)
        store = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=timeout)
        # torch's type stubs lack gloo's options and collectives.
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timeout
        options._threads = 1
        try:
            self._group = gloo(store, rank, num_ranks, options)
        except RuntimeError as error:
            raise RankError(
                f"rank {rank} could not join the group of {num_ranks} within"
                f" {timeout_seconds:.0f} s: {error}"
            ) from error
        self._num_exchanges = 0

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_counts: Sequence[int],
        sent_counts: Sequence[int],
    ) -> None:
        """Rows of `sent` to every rank, rows of every rank into `received`, in rank order.

        Counts are rows per rank; where there are none there is no message. gloo's own all-to-all
        sends one to every rank in any case, which is what a small step would spend its time on.
        Raises RankError when a peer is gone or late; the group is of no use then.
        """
        # gloo refuses int16 and float8; bytes it takes.
        parts_in = _as_bytes(received).split(list(received_counts))
        parts_out = _as_bytes(sent).split(list(sent_counts))
        # The tag tells this exchange's messages from the next one's of a rank that is ahead.
        self._num_exchanges += 1
        tag = self._num_exchanges % (1 << 30)
        works = []
        try:
            for peer, (rows_in, rows_out) in enumerate(zip(parts_in, parts_out, strict=True)):
                if peer == self.rank:
                    rows_in.copy_(rows_out)
                    continue
                if len(rows_in):
                    works.append(self._group.recv([rows_in], peer, tag))
                if len(rows_out):
                    works.append(self._group.send([rows_out], peer, tag))
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} lost a peer in an all-to-all: {error}") from error


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.dtype == torch.int16 else rows
