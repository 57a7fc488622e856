"""A rank's part in a migration: bytes of experts into free slots beside the steps, then the flip.

A step starts at most one piece each way and waits for the step before's, if that is still under
way: never for more than one step's bytes. Between cards that reach each other the target's copy
engine fetches them: what is under way is live on its source, whole and in place, so the source has
nothing to do. Elsewhere the bytes pass the hosts' memory (gloo), and meet neither the order nor
the SMs of the exchange between GPUs. For what comes from the host's copy no step waits: its pieces
follow each other at their own pace.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightmoe.core import HOST_COPY, Arrivals, Orders, Piece
from lightmoe.distributed.communicator import Communicator
from lightmoe.errors import LightMoEError, PlacementError
from lightmoe.moe.dispatch import ExpertGroup

HostCopy = Callable[[int, int], Tensor]
"""The blob of (layer, expert) as bytes uint8 [expert bytes], equal to those of any slot."""


class Pending(Protocol):
    """Something under way: a future, or copies on a stream."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> None:
        """Wait for its end; raises what went wrong."""
        ...


class RankCopies(Protocol):
    """What copies from other ranks' pools: distributed/peer_copies.py."""

    def start(self, copies: Sequence[tuple[int, int, Tensor]]) -> Pending:
        """Each a rank, the first byte of its pool, and where it goes to, uint8 [bytes]."""
        ...


@dataclass(frozen=True, slots=True)
class _Carried:
    """Pieces of one step under way, and the transfers that end with them here."""

    pending: Pending
    ending: tuple[int, ...]
    is_from_host: bool


class Mover:
    """Carries out the orders of one rank; `blobs` [S, elements] is its slot pool.

    `copies` is given where this rank's card reaches those of all others.
    """

    def __init__(
        self,
        group: ExpertGroup,
        blobs: Tensor,
        messages: Communicator | None,
        host_copy: HostCopy | None = None,
        copies: RankCopies | None = None,
    ) -> None:
        self._group = group
        self._slots = blobs.view(torch.uint8)  # [S, expert bytes]
        self._messages = messages
        self._host_copy = host_copy
        self._copies = copies
        self._stream = torch.cuda.Stream(blobs.device) if blobs.is_cuda else None
        self._sent, self._received = _Pinned(), _Pinned()
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

    def may_follow(self, orders: Orders) -> bool:
        """Whether `begin` may come while a step runs: all that it does is ordered on the device."""
        return self._copies is not None and orders.route is None

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
        while self._under_way:
            carried = self._under_way[0]
            is_late = not carried.pending.done()
            if is_late and (carried.is_from_host or not wait):
                break
            started = time.perf_counter()
            self._under_way.popleft()
            try:
                carried.pending.result()
                self._arrived += carried.ending
            except (LightMoEError, OSError, RuntimeError) as error:
                # The placement has not flipped: the ranks serve on with what they have.
                self._error = f"rank {self._group.rank}: {error}"
            if is_late:
                self._waited_seconds += time.perf_counter() - started

    def _start(self, pieces: Sequence[Piece]) -> None:
        rank = self._group.rank
        coming = [piece for piece in pieces if piece.target_rank == rank]
        going = [piece for piece in pieces if piece.source_rank == rank]
        if not coming and not going:
            return
        from_ranks = [piece for piece in coming if piece.source_rank != HOST_COPY]
        for piece in coming:
            self._check_free(piece.target_slot)
        for piece in (*going, *from_ranks):
            self._check_source(piece)
        from_host = [piece for piece in coming if piece.source_rank == HOST_COPY]
        if self._copies is not None:
            self._start_copies(self._copies, from_ranks)
        elif from_ranks or going:
            self._note(self._start_carrying(from_ranks, going), from_ranks, is_from_host=False)
        if from_host:
            copying = self._start_beside(self._copy_from_host, from_host)
            self._note(copying, from_host, is_from_host=True)

    def _note(self, pending: Pending, coming: Sequence[Piece], is_from_host: bool) -> None:
        ending = tuple(piece.transfer for piece in coming if piece.is_last)
        self._under_way.append(_Carried(pending, ending, is_from_host))

    def _start_copies(self, copies: RankCopies, coming: Sequence[Piece]) -> None:
        if coming:
            pieces = [
                (
                    piece.source_rank,
                    piece.source_slot * self._slots.shape[1] + piece.begin,
                    self._target(piece),
                )
                for piece in coming
            ]
            self._note(copies.start(pieces), coming, is_from_host=False)

    def _start_carrying(self, coming: Sequence[Piece], going: Sequence[Piece]) -> Pending:
        if self._slots.is_cuda:
            return self._start_beside(self._carry_staged, coming, going)
        # Started here, for gloo's calls belong on one thread; only waiting is done beside.
        wait = self._start_messages(
            [(piece.source_rank, self._target(piece)) for piece in coming],
            [(piece.target_rank, self._source(piece)) for piece in going],
        )
        return self._thread.submit(wait)

    def _start_beside(self, work: Callable[..., None], *pieces: Sequence[Piece]) -> Pending:
        """On the mover's thread; on a GPU after what is enqueued by now: it may read such a slot
        as has just become free.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._slots.device))
        return self._thread.submit(work, *pieces)

    def _copy_from_host(self, coming: Sequence[Piece]) -> None:
        with self._beside():
            for piece in coming:
                self._target(piece).copy_(self._host_bytes(piece))

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On a GPU: a stream beside that of the step, and at the end all on it is done."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def _carry_staged(self, coming: Sequence[Piece], going: Sequence[Piece]) -> None:
        """On a GPU: through pinned memory."""
        assert self._stream is not None
        sent, received = self._sent.parts_for(going), self._received.parts_for(coming)
        with self._beside():
            for piece, staged in zip(going, sent, strict=True):
                staged.copy_(self._source(piece), non_blocking=True)
            self._stream.synchronize()
            self._start_messages(
                [(piece.source_rank, part) for piece, part in zip(coming, received, strict=True)],
                [(piece.target_rank, part) for piece, part in zip(going, sent, strict=True)],
            )()
            for piece, staged in zip(coming, received, strict=True):
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
        rank = piece.source_rank
        slot = int(self._group.placement.slot_table[piece.layer, piece.expert, rank])
        if slot != piece.source_slot or slot < 0:
            raise PlacementError(
                f"rank {rank} has expert {piece.expert} of layer {piece.layer} in slot {slot},"
                f" not {piece.source_slot}"
            )


class _Pinned:
    """Pinned memory as large as the largest step's pieces: to allocate it may stop the device."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def parts_for(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Room for each piece; what was there before is gone."""
        sizes = [piece.end - piece.begin for piece in pieces]
        if sum(sizes) > len(self._memory):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        return list(self._memory[: sum(sizes)].split(sizes))
