"""Plans out to the ranks and results back: msgpack frames on a TCP connection, on loopback where
all ranks are on this machine.

One frame each way a step. No Ray call and no pickle: a frame is plain numbers, bounded in size.
A connection begins with a token that only the ranks of this launch were given.
"""

from __future__ import annotations

import contextlib
import hmac
import operator
import socket
import struct
from typing import Any

import msgpack
import numpy as np

from lightmoe.core import Batch, SampledToken, SamplingStep, SequenceStep, StepResult
from lightmoe.errors import RankError
from lightmoe.worker.order_frames import (
    arrival_fields,
    arrivals_of,
    host_tier_fields,
    host_tier_of,
    order_fields,
    orders_of,
    overflow_fields,
    overflow_of,
)

LOOPBACK = "127.0.0.1"
MAX_FRAME_BYTES = 256 << 20
_HELLO_SECONDS = 5.0
"""How long a connection may keep quiet before it is somebody with nothing to say."""
_LENGTH = struct.Struct("<I")
_HELLO = struct.Struct("<I32s")


def send_frame(connection: socket.socket, payload: bytes) -> None:
    """Write one frame."""
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_frame(connection: socket.socket) -> bytes | None:
    """Read one frame; None when the other end has closed."""
    header = _receive_exactly(connection, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise RankError(f"a step frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    buffer = bytearray(length)
    view, received = memoryview(buffer), 0
    while received < length:
        try:
            count = connection.recv_into(view[received:])
        except ConnectionError:
            return None
        if not count:
            return None
        received += count
    return bytes(buffer)


def connect(port: int, rank: int, token: bytes, host: str = LOOPBACK) -> socket.socket:
    """A rank's end: say who it is."""
    connection = socket.create_connection((host, port), timeout=30)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_HELLO.pack(rank, token))
    return connection


def hang_up(connection: socket.socket) -> None:
    """End a connection for both ends, though a thread may still read from it."""
    with contextlib.suppress(OSError):  # the other end was quicker
        connection.shutdown(socket.SHUT_RDWR)


class StepListener:
    """The driver's end: takes one connection from each rank, and no other."""

    def __init__(self, token: bytes, host: str = LOOPBACK) -> None:
        self._token = token
        self._socket = socket.create_server((host, 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]

    def accept(self, num_ranks: int, timeout_seconds: float) -> list[socket.socket]:
        """Connections of ranks 0 .. num_ranks - 1; RankError names those that did not come."""
        connections: dict[int, socket.socket] = {}
        self._socket.settimeout(timeout_seconds)
        while len(connections) < num_ranks:
            try:
                connection, _ = self._socket.accept()
            except TimeoutError as error:
                late = sorted(set(range(num_ranks)) - set(connections))
                for connection in connections.values():
                    connection.close()
                raise RankError(
                    f"ranks {late} did not connect within {timeout_seconds:.0f} s"
                ) from error
            connection.settimeout(_HELLO_SECONDS)
            try:
                hello = _receive_exactly(connection, _HELLO.size)
            except TimeoutError:
                hello = None
            rank, token = _HELLO.unpack(hello) if hello else (-1, b"")
            if not 0 <= rank < num_ranks or not hmac.compare_digest(token, self._token):
                connection.close()
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections[rank] = connection
        return [connections[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """Take no further connections."""
        self._socket.close()


def pack_batch(batch: Batch) -> bytes:
    """A Batch as one frame."""
    sequences = [
        (
            sequence.sequence_id,
            sequence.token_ids,
            sequence.start,
            sequence.block_table,
            _sampling_fields(sequence.sampling),
        )
        for sequence in batch.sequences
    ]
    return _pack((batch.step, batch.tokens_per_rank, sequences, order_fields(batch.orders)))


def unpack_batch(frame: bytes) -> Batch:
    """The inverse of pack_batch."""
    step, tokens_per_rank, sequences, orders = _unpack(frame)
    return Batch(
        step,
        tokens_per_rank,
        tuple(
            SequenceStep(
                identity, tokens, start, blocks, SamplingStep(*sampling) if sampling else None
            )
            for identity, tokens, start, blocks, sampling in sequences
        ),
        orders_of(orders),
    )


def pack_result(result: StepResult) -> bytes:
    """A StepResult as one frame."""
    tokens = [
        (token.sequence_id, token.token_id, token.logprob, token.top) for token in result.tokens
    ]
    counts = [
        (array.shape, array.astype("<i4").tobytes())
        for array in (result.expert_tokens, result.layer_pairs)
    ]
    routing = None
    if result.routing is not None:
        routing = (result.routing.shape, result.routing.astype("<u2").tobytes())
    arrivals, overflow = arrival_fields(result.arrivals), overflow_fields(result.overflow)
    extras = (arrivals, routing, overflow, host_tier_fields(result.host_tier))
    return _pack((result.rank, result.step, tokens, counts, result.seconds, *extras))


def unpack_result(frame: bytes) -> StepResult:
    """The inverse of pack_result."""
    rank, step, tokens, counts, seconds, *extras = _unpack(frame)
    arrivals, routing, overflow, host_tier = extras
    experts, pairs = (np.frombuffer(data, dtype="<i4").reshape(shape) for shape, data in counts)
    return StepResult(
        rank,
        step,
        tuple(SampledToken(*token) for token in tokens),
        experts,
        pairs,
        seconds,
        arrivals_of(arrivals),
        None if routing is None else np.frombuffer(routing[1], dtype="<u2").reshape(routing[0]),
        overflow_of(overflow),
        host_tier_of(host_tier),
    )


_fields_of = operator.attrgetter(*SamplingStep.__slots__)


def _sampling_fields(step: SamplingStep | None) -> tuple[object, ...] | None:
    return None if step is None else _fields_of(step)


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _unpack(frame: bytes) -> Any:
    return msgpack.unpackb(frame, use_list=False)
