"""What steps say beside tokens, as plain values for the step channel, checked where it comes in.

Orders go out; arrivals, overflow and what a host tier did come back. A frame that says anything
else than its sender can have meant ends the rank with a RankError.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np

from lightmoe.core import (
    HOST_COPY,
    ROUTES,
    Arrivals,
    HostTierCounts,
    Orders,
    Piece,
    SlotChange,
    StepOverflow,
)
from lightmoe.errors import RankError

MAX_CHANGES = 1 << 20
MAX_PIECES = 1 << 12
MAX_TRANSFERS = 1 << 12
_MAX_INTEGER = 1 << 40


def order_fields(orders: Orders | None) -> tuple[object, ...] | None:
    """Orders as lists of numbers; None stays None."""
    if orders is None:
        return None
    changes = [astuple(change) for change in orders.changes]
    return orders.epoch, changes, [astuple(piece) for piece in orders.pieces], orders.route


def orders_of(fields: Any) -> Orders | None:
    """The inverse of order_fields; RankError for what cannot be orders."""
    if fields is None:
        return None
    _check(isinstance(fields, tuple) and len(fields) == 4, fields)
    epoch, changes, pieces, route = fields
    _check(_is_integer(epoch, 0), epoch)
    _check(isinstance(changes, tuple) and len(changes) <= MAX_CHANGES, changes)
    _check(isinstance(pieces, tuple) and len(pieces) <= MAX_PIECES, pieces)
    _check(route is None or route in ROUTES, route)
    return Orders(epoch, tuple(map(_change, changes)), tuple(map(_piece, pieces)), route)


def _change(fields: Any) -> SlotChange:
    _check(isinstance(fields, tuple) and len(fields) == 5, fields)
    *indices, slot, is_home = fields
    _check(all(_is_integer(value, 0) for value in indices), fields)
    _check(_is_integer(slot, -1) and isinstance(is_home, bool), fields)
    return SlotChange(*fields)


def _piece(fields: Any) -> Piece:
    _check(isinstance(fields, tuple) and len(fields) == 10, fields)
    transfer, layer, expert, source, source_slot, *rest, is_last = fields
    _check(all(_is_integer(value, 0) for value in (transfer, layer, expert, *rest)), fields)
    _check(_is_integer(source, HOST_COPY) and _is_integer(source_slot, -1), fields)
    piece = Piece(*fields)
    _check(piece.begin < piece.end and isinstance(is_last, bool), fields)
    return piece


def arrival_fields(arrivals: Arrivals | None) -> tuple[object, ...] | None:
    """Arrivals as plain values; None stays None."""
    return None if arrivals is None else astuple(arrivals)


def arrivals_of(fields: Any) -> Arrivals | None:
    """The inverse of arrival_fields; RankError for what cannot be arrivals."""
    if fields is None:
        return None
    _check(isinstance(fields, tuple) and len(fields) == 3, fields)
    transfers, waited_seconds, error = fields
    _check(isinstance(transfers, tuple) and len(transfers) <= MAX_TRANSFERS, transfers)
    _check(all(_is_integer(transfer, 0) for transfer in transfers), transfers)
    _check(isinstance(waited_seconds, float) and waited_seconds >= 0, waited_seconds)
    _check(error is None or isinstance(error, str), error)
    return Arrivals(transfers, waited_seconds, error)


def overflow_fields(overflow: StepOverflow | None) -> tuple[object, ...] | None:
    """What an OverflowRule did as plain values; None stays None."""
    if overflow is None:
        return None
    moved = overflow.moved_pairs.astype("<i4").tobytes()
    return moved, overflow.num_layers, overflow.num_left


def overflow_of(fields: Any) -> StepOverflow | None:
    """The inverse of overflow_fields; RankError for what no rank can have done."""
    if fields is None:
        return None
    _check(isinstance(fields, tuple) and len(fields) == 3, fields)
    moved, num_layers, num_left = fields
    _check(isinstance(moved, bytes) and len(moved) % 4 == 0, moved)
    _check(_is_integer(num_layers, 0) and _is_integer(num_left, 0), fields)
    return StepOverflow(np.frombuffer(moved, dtype="<i4"), num_layers, num_left)


def host_tier_fields(counts: HostTierCounts | None) -> tuple[object, ...] | None:
    """What a host tier did as plain values; None stays None."""
    return None if counts is None else astuple(counts)


def host_tier_of(fields: Any) -> HostTierCounts | None:
    """The inverse of host_tier_fields; RankError for what no host tier can have done."""
    if fields is None:
        return None
    _check(isinstance(fields, tuple) and len(fields) == 5, fields)
    *numbers, num_bytes, waited_seconds = fields
    _check(all(_is_integer(number, 0) for number in numbers), fields)
    _check(_is_integer(num_bytes, 0, 1 << 63), fields)
    _check(isinstance(waited_seconds, float) and waited_seconds >= 0, waited_seconds)
    return HostTierCounts(*fields)


def _is_integer(value: object, lowest: int, end: int = _MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < end


def _check(holds: bool, value: object) -> None:
    if not holds:
        raise RankError(f"a step frame says {value!r:.100}, which nobody here sends")
