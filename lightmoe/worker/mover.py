"""A rank's part in a migration: bytes of experts into free slots beside the steps, then the flip.

A step starts at most one piece each way and waits for the step before's, if that is still under
way: never for more than one step's bytes. Between ranks the bytes pass the hosts' memory (gloo), so
they meet neither the order nor the SMs of the exchange between GPUs. For what comes from the host's
copy no step waits: its pieces follow each other at their own pace.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.core import HOST_COPY, Arrivals, Orders, Piece
from lightmoe.distributed.communicator import Communicator
from lightmoe.errors import LightMoEError, PlacementError
from lightmoe.moe.dispatch import ExpertGroup

HostCopy = Callable[[int, int], Tensor]
"""The blob of (layer, expert) as bytes uint8 [expert bytes], equal to those of any slot."""


@dataclass(frozen=True, slots=True)
class _Carried:
    """Pieces of one step under way, and the transfers that end with them here."""

    future: Future[None]
    ending: tuple[int, ...]
    is_from_host: bool


class Mover:
    """Carries out the orders of one rank; `blobs` [S, elements] is its slot pool."""

    def __init__(
        self,
        group: ExpertGroup,
        blobs: Tensor,
        messages: Communicator | None,
        host_copy: HostCopy | None = None,
    ) -> None:
        self._group = group
        self._slots = blobs.view(torch.uint8)  # [S, expert bytes]
        self._messages = messages
        self._host_copy = host_copy
        self._from_host: tuple[int, Tensor] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightmoe-mover")
        self._under_way: deque[_Carried] = deque()
        self._arrived: tuple[int, ...] = ()
        self._waited_seconds = 0.0
        self._error: str | None = None

    def begin(self, orders: Orders) -> None:
        """At a step's begin: the step before's pieces end, the placement flips, new ones start.

        Raises PlacementError where the orders do not fit what this rank has.
        """
        self._settle(wait=True)
        group = self._group
        if orders.changes:
            group.adopt(group.placement.changed(orders.changes, orders.epoch))
        elif orders.epoch != group.placement.epoch:
            raise PlacementError(
                f"rank {group.rank} is at epoch {group.placement.epoch}, its orders at"
                f" {orders.epoch}; the ranks no longer agree: start again"
            )
        if orders.route is not None:
            group.route = orders.route
        self._start(orders.pieces)

    def arrivals(self) -> Arrivals | None:
        """At a step's end: what came since the last call; None if there is nothing to say."""
        self._settle(wait=False)
        if not self._arrived and not self._waited_seconds and self._error is None:
            return None
        arrivals = Arrivals(self._arrived, self._waited_seconds, self._error)
        self._arrived, self._waited_seconds, self._error = (), 0.0, None
        return arrivals

    def _settle(self, wait: bool) -> None:
        """Take what is done, and with `wait` what came from or goes to other ranks."""
        started = time.perf_counter()
        while self._under_way:
            carried = self._under_way[0]
            if not carried.future.done():
                if carried.is_from_host or not wait:
                    break
                futures.wait([carried.future])
                self._waited_seconds += time.perf_counter() - started
            self._under_way.popleft()
            try:
                carried.future.result()
                self._arrived += carried.ending
            except (LightMoEError, OSError, RuntimeError) as error:
                # The placement has not flipped: the ranks serve on with what they have.
                self._error = f"rank {self._group.rank}: {error}"

    def _start(self, pieces: Sequence[Piece]) -> None:
        rank = self._group.rank
        coming = [piece for piece in pieces if piece.target_rank == rank]
        going = [piece for piece in pieces if piece.source_rank == rank]
        if not coming and not going:
            return
        for piece in coming:
            self._check_free(piece.target_slot)
        for piece in going:
            self._check_source(piece)
        from_ranks = [piece for piece in coming if piece.source_rank != HOST_COPY]
        from_host = [piece for piece in coming if piece.source_rank == HOST_COPY]
        if from_ranks or going:
            self._note(self._start_carrying(from_ranks, going), from_ranks, is_from_host=False)
        if from_host:
            future = self._thread.submit(self._copy_from_host, from_host)
            self._note(future, from_host, is_from_host=True)

    def _note(self, future: Future[None], coming: Sequence[Piece], is_from_host: bool) -> None:
        ending = tuple(piece.transfer for piece in coming if piece.is_last)
        self._under_way.append(_Carried(future, ending, is_from_host))

    def _start_carrying(self, coming: Sequence[Piece], going: Sequence[Piece]) -> Future[None]:
        if self._slots.is_cuda:
            return self._thread.submit(self._carry_staged, coming, going)
        # Started here, for gloo's calls belong on one thread; only waiting is done beside.
        wait = self._start_messages(
            [(piece.source_rank, self._target(piece)) for piece in coming],
            [(piece.target_rank, self._source(piece)) for piece in going],
        )
        return self._thread.submit(wait)

    def _copy_from_host(self, coming: Sequence[Piece]) -> None:
        with self._beside():
            for piece in coming:
                self._target(piece).copy_(self._host_bytes(piece))

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU: a stream beside that of the step, and at the end all on it is done."""
        if not self._slots.is_cuda:
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self._slots.device)):
            yield
            torch.cuda.current_stream().synchronize()

    def _carry_staged(self, coming: Sequence[Piece], going: Sequence[Piece]) -> None:
        """On a GPU: through pinned memory."""
        with self._beside():
            sent = [(piece.target_rank, _pinned(piece)) for piece in going]
            for piece, (_, staged) in zip(going, sent, strict=True):
                staged.copy_(self._source(piece), non_blocking=True)
            torch.cuda.current_stream().synchronize()
            received = [(piece.source_rank, _pinned(piece)) for piece in coming]
            self._start_messages(received, sent)()
            for piece, (_, staged) in zip(coming, received, strict=True):
                self._target(piece).copy_(staged, non_blocking=True)

    def _start_messages(
        self, received: Sequence[tuple[int, Tensor]], sent: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        assert self._messages is not None, "a rank alone has nobody to move experts with"
        return self._messages.start_messages(received, sent)

    def _host_bytes(self, piece: Piece) -> Tensor:
        if self._host_copy is None:
            raise PlacementError("an expert was ordered from the host's copy; use --host-copy on")
        if self._from_host is None or self._from_host[0] != piece.transfer:
            self._from_host = piece.transfer, self._host_copy(piece.layer, piece.expert)
        blob = self._from_host[1]
        if piece.is_last:
            self._from_host = None
        return blob[piece.begin : piece.end]

    def _source(self, piece: Piece) -> Tensor:
        return self._slots[piece.source_slot, piece.begin : piece.end]

    def _target(self, piece: Piece) -> Tensor:
        return self._slots[piece.target_slot, piece.begin : piece.end]

    def _check_free(self, slot: int) -> None:
        rank = self._group.rank
        if not 0 <= slot < len(self._slots):
            raise PlacementError(f"rank {rank} has slots 0 to {len(self._slots) - 1}, not {slot}")
        if (self._group.placement.slot_table[:, :, rank] == slot).any():
            raise PlacementError(f"slot {slot} of rank {rank} is in use; no expert may go there")

    def _check_source(self, piece: Piece) -> None:
        rank = self._group.rank
        slot = int(self._group.placement.slot_table[piece.layer, piece.expert, rank])
        if slot != piece.source_slot or slot < 0:
            raise PlacementError(
                f"rank {rank} has expert {piece.expert} of layer {piece.layer} in slot {slot},"
                f" not {piece.source_slot}"
            )


def _pinned(piece: Piece) -> Tensor:
    return torch.empty(piece.end - piece.begin, dtype=torch.uint8, pin_memory=True)
