"""All-to-alls among GPUs: NCCL's grouped sends and receives, on a stream of their own.

NCCL has no timeout: a watchdog looks after every exchange, and aborts the communicator where a
peer does not come.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightmoe.distributed.communicator import LOOPBACK, Communicator, Transfer
from lightmoe.distributed.watchdog import Watchdog, within
from lightmoe.errors import MachineError, RankError

_BYTES = 1  # ncclUint8
_NUMBERS = 1 << 16  # more exchanges are never under way
_ENQUEUE_SECONDS = 1.0
_HIGH_PRIORITY = -5  # CUDA takes the highest that it has


def nccl_environment(
    rank: int, *, host: str = LOOPBACK, oversubscribed: bool, max_ctas: int | None = None
) -> dict[str, str]:
    """What NCCL is to find in the environment of a rank, before its communicator is made.

    Its sockets are loopback's where the ranks' `host` is. With `oversubscribed` every rank has a
    host name of its own, since NCCL refuses two ranks on one GPU of a host. `max_ctas` bounds the
    multiprocessors that it takes. What is set already stays.
    """
    wanted = {"NCCL_SOCKET_IFNAME": "lo"} if host == LOOPBACK else {}
    if oversubscribed:
        wanted["NCCL_HOSTID"] = f"lightmoe-rank-{rank}"
    if max_ctas is not None:
        wanted["NCCL_MAX_CTAS"] = str(max_ctas)
    return {name: value for name, value in wanted.items() if name not in os.environ}


class NcclCommunicator:
    """One rank's end of the group of GPUs. Every rank calls the same in the same order.

    `control` is the same ranks' gloo group, made before. Raises RankError where a rank does not
    come within `timeout_seconds`, MachineError where cupy or NCCL is missing or refuses the card.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        control: Communicator,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self._nccl = _import_nccl()
        self._enqueueing = threading.Lock()
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)
        unique_id = self._meet(control.connect_store(timeout_seconds), timeout_seconds)
        self._group = within(
            timeout_seconds,
            lambda: self._join(unique_id),
            f"rank {rank} could not make NCCL's communicator of {num_ranks} ranks",
        )
        # The stream writes each exchange's number to the host's memory behind it: asking for an
        # event may wait, with all other calls, for a GPU that hangs.
        self._numbers = torch.arange(_NUMBERS, dtype=torch.int32, device=device)
        self._last_done = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._watchdog = Watchdog(
            rank,
            num_ranks,
            control.connect_store(timeout_seconds),
            timeout_seconds,
            num_done=self._num_done,
            health=self._check_health,
            abort=self._abort,
        )
        self._connect()

    def _meet(self, store: Any, timeout_seconds: float) -> bytes:
        """NCCL's id of this group, once all ranks are there: NCCL itself would wait for ever."""
        if self.rank == 0:
            store.set("nccl/id", self._nccl.get_unique_id())
        store.set(f"nccl/ready/{self.rank}", "1")
        for rank in range(self.num_ranks):
            try:
                store.wait([f"nccl/ready/{rank}"], timedelta(seconds=timeout_seconds))
            except RuntimeError as error:
                raise RankError(
                    f"rank {rank} did not come to NCCL's group within {timeout_seconds:g} s"
                ) from error
        return bytes(store.get("nccl/id"))

    def _join(self, unique_id: bytes) -> Any:
        torch.cuda.set_device(self.device)  # this is another thread
        torch.cuda.synchronize(self.device)
        try:
            return self._nccl.NcclCommunicator(self.num_ranks, unique_id, self.rank)
        except RuntimeError as error:
            raise MachineError(
                f"NCCL refuses rank {self.rank} on {self.device} ({error}); two ranks on one GPU"
                " need --oversubscribe; NCCL_DEBUG=WARN says more"
            ) from error

    def _connect(self) -> None:
        """One byte between every two ranks: NCCL connects them at the first message."""
        byte = torch.zeros(self.num_ranks, 1, dtype=torch.uint8, device=self.device)
        ones = [1] * self.num_ranks
        self.all_to_all(torch.empty_like(byte), byte, ones, ones)
        torch.cuda.synchronize(self.device)
        self.check()

    def check(self) -> None:
        """RankError if an exchange has failed. Ask before what was computed is believed."""
        self._watchdog.check()

    def close(self) -> None:
        """Leave the group without waiting for the others."""
        self._watchdog.close()
        self._abort()

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
        """All of them in one group of messages, after what is on the current stream.

        What comes later on the current stream finds the rows received. Nothing waits on the host.
        Raises RankError when an earlier exchange has failed; the group is of no use then.
        """
        stream, current = self.stream, torch.cuda.current_stream(self.device)
        assert stream is not None
        # While a CUDA graph is captured nothing runs, and its replays are not seen here.
        watched = not torch.cuda.is_current_stream_capturing()
        number = self._watchdog.begin() if watched else 0
        if current != stream:
            stream.wait_stream(current)
        with torch.cuda.stream(stream):
            messages = [message for one in transfers for message in self._messages(one)]
        self._enqueue(messages, stream.cuda_stream)
        if watched:
            with torch.cuda.stream(stream):
                place = number % _NUMBERS
                self._last_done.copy_(self._numbers[place : place + 1], non_blocking=True)
        # The current stream waits, so it may have the tensors' memory again: no record_stream.
        if current != stream:
            current.wait_stream(stream)

    def _check_health(self) -> None:
        try:
            self._group.check_async_error()
        except KeyError as error:  # cupy has no text for NCCL's newer errors
            raise RuntimeError(f"NCCL's error {error}") from error

    def _abort(self) -> None:
        """End everything. Not while messages are being enqueued, unless that is what hangs."""
        is_free = self._enqueueing.acquire(timeout=_ENQUEUE_SECONDS)
        try:
            self._group.abort()
        finally:
            if is_free:
                self._enqueueing.release()

    def _num_done(self) -> int:
        num_begun = self._watchdog.num_begun
        return num_begun - (num_begun - int(self._last_done[0])) % _NUMBERS

    def _messages(self, transfer: Transfer) -> Iterator[tuple[bool, int, int, int]]:
        """(whether it is sent, address, bytes, peer) of a transfer; the own rows are copied."""
        received, sent, received_counts, sent_counts = transfer
        assert received.is_contiguous(), "rows are bytes one after the other"
        assert sent.is_contiguous(), "rows are bytes one after the other"
        first_in, first_out = ([0, *accumulate(one)] for one in (received_counts, sent_counts))
        assert first_in[-1] == len(received), "counts are of rows"
        assert first_out[-1] == len(sent), "counts are of rows"
        row_bytes = received[0].nbytes if len(received) else sent[:1].nbytes
        for peer, (num_in, num_out) in enumerate(zip(received_counts, sent_counts, strict=True)):
            begin_in, begin_out = first_in[peer], first_out[peer]
            if peer == self.rank:
                received[begin_in : begin_in + num_in].copy_(sent[begin_out : begin_out + num_out])
                continue
            if num_out:
                yield True, sent.data_ptr() + begin_out * row_bytes, num_out * row_bytes, peer
            if num_in:
                yield False, received.data_ptr() + begin_in * row_bytes, num_in * row_bytes, peer

    def _enqueue(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        if not messages:
            return
        try:
            with self._enqueueing:
                self.check()  # an aborted communicator must not be touched
                self._nccl.groupStart()
                try:
                    for is_sent, address, num_bytes, peer in messages:
                        call = self._group.send if is_sent else self._group.recv
                        call(address, num_bytes, _BYTES, peer, stream)
                finally:
                    self._nccl.groupEnd()
        except (RuntimeError, KeyError) as error:  # cupy has no text for NCCL's newer errors
            raise self._watchdog.fail(error) from error


def _import_nccl() -> Any:
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise MachineError(
            f"the exchange between GPUs needs cupy with NCCL ({error}); install lightmoe[cuda13],"
            " or lightmoe[cuda12] for a driver older than 580"
        ) from error
    if not getattr(nccl, "available", False):
        raise MachineError("this cupy comes without NCCL; install cupy-cuda13x or cupy-cuda12x")
    return nccl
