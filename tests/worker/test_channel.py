"""The step channel: what is packed comes back, what is too large or a stranger is refused."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import Batch, SampledToken, SamplingStep, SequenceStep, StepResult
from lightmoe.errors import RankError
from lightmoe.worker import channel
from tests.sockets import listening_addresses

TOKEN = bytes(range(32))

counts = st.integers(0, 2**31 - 1)
token_ids = st.lists(counts, max_size=20).map(tuple)
finite = st.floats(allow_nan=False, allow_infinity=False)
samplings = st.builds(
    SamplingStep,
    temperature=finite,
    top_p=finite,
    top_k=counts,
    min_p=finite,
    seed=st.integers(-(2**63), 2**63 - 1),
    position=counts,
    num_logprobs=st.integers(-1, 20),
    presence_penalty=finite,
    frequency_penalty=finite,
    repetition_penalty=finite,
    num_prompt_tokens=counts,
    history=token_ids,
    banned_ids=token_ids,
)
sequences = st.builds(
    SequenceStep,
    sequence_id=st.integers(0, 2**62),
    token_ids=token_ids,
    start=counts,
    block_table=token_ids,
    sampling=st.none() | samplings,
)
batches = st.builds(
    Batch,
    step=counts,
    tokens_per_rank=token_ids,
    sequences=st.lists(sequences, max_size=4).map(tuple),
)
sampled = st.builds(
    SampledToken,
    sequence_id=st.integers(0, 2**62),
    token_id=st.integers(-1, 2**31 - 1),
    logprob=finite,
    top=st.lists(st.tuples(counts, finite), max_size=4).map(tuple),
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(batch=batches)
def test_a_batch_comes_back_as_it_was(batch: Batch) -> None:
    assert channel.unpack_batch(channel.pack_batch(batch)) == batch


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    tokens=st.lists(sampled, max_size=4).map(tuple),
    shape=st.tuples(st.integers(0, 5), st.integers(0, 9)),
    seconds=finite,
    seed=counts,
)
def test_a_result_comes_back_as_it_was(
    tokens: tuple[SampledToken, ...], shape: tuple[int, int], seconds: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    result = StepResult(
        rank=3,
        step=9,
        tokens=tokens,
        expert_tokens=generator.integers(0, 2**31 - 1, size=shape, dtype=np.int32),
        layer_pairs=generator.integers(0, 2**31 - 1, size=shape[0], dtype=np.int32),
        seconds=seconds,
    )

    back = channel.unpack_result(channel.pack_result(result))

    assert (back.rank, back.step, back.tokens, back.seconds) == (3, 9, tokens, seconds)
    assert np.array_equal(back.expert_tokens, result.expert_tokens)
    assert np.array_equal(back.layer_pairs, result.layer_pairs)


def test_every_field_of_a_sampling_step_travels() -> None:
    """A field that is added to SamplingStep must not be lost on the way."""
    step = SamplingStep(
        **{
            field.name: (place,) if field.name in ("history", "banned_ids") else place
            for place, field in enumerate(fields(SamplingStep), start=1)
        }
    )
    batch = Batch(0, (1,), (SequenceStep(0, (1,), 0, (0,), step),))

    assert channel.unpack_batch(channel.pack_batch(batch)).sequences[0].sampling == step


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_frames_of_any_size_arrive_whole(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    payload = np.random.default_rng(size).bytes(size)
    sending = threading.Thread(target=channel.send_frame, args=(pair[0], payload))
    sending.start()

    assert channel.receive_frame(pair[1]) == payload
    sending.join()


def test_the_end_of_the_connection_is_no_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    channel.send_frame(pair[0], b"last")
    pair[0].sendall(struct.pack("<I", 100) + b"cut off")
    pair[0].close()

    assert channel.receive_frame(pair[1]) == b"last"
    assert channel.receive_frame(pair[1]) is None
    assert channel.receive_frame(pair[1]) is None


def test_a_frame_over_the_bound_is_refused_before_memory_is_taken(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    pair[0].sendall(struct.pack("<I", channel.MAX_FRAME_BYTES + 1))

    with pytest.raises(RankError, match=r"268435457 bytes is over the limit of 268435456"):
        channel.receive_frame(pair[1])


class Listening:
    """A StepListener that accepts in a thread, as the driver does while ranks connect."""

    def __init__(self, num_ranks: int, timeout_seconds: float = 20.0) -> None:
        self.listener = channel.StepListener(TOKEN)
        self.connections: list[socket.socket] = []
        self.error: RankError | None = None
        self._arguments = (num_ranks, timeout_seconds)
        self._thread = threading.Thread(target=self._accept)
        self._strangers: list[socket.socket] = []
        self._thread.start()

    def _accept(self) -> None:
        try:
            self.connections = self.listener.accept(*self._arguments)
        except RankError as error:
            self.error = error

    def stranger(self, hello: bytes) -> socket.socket:
        """Connects and says something else than a rank would."""
        stranger = socket.create_connection(("127.0.0.1", self.listener.port), timeout=20)
        stranger.sendall(hello)
        self._strangers.append(stranger)
        return stranger

    def wait(self) -> list[socket.socket]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.connections

    def close(self) -> None:
        self._thread.join(30)
        self.listener.close()
        for connection in (*self.connections, *self._strangers):
            connection.close()


def test_each_rank_gets_its_own_connection_whoever_comes_first() -> None:
    listening = Listening(num_ranks=3)
    ranks = {rank: channel.connect(listening.listener.port, rank, TOKEN) for rank in (2, 0, 1)}

    connections = listening.wait()

    for rank, connection in enumerate(connections):
        channel.send_frame(connection, bytes([rank]))
        assert channel.receive_frame(ranks[rank]) == bytes([rank])
        ranks[rank].close()
    listening.close()


@pytest.mark.parametrize(
    "hello",
    [
        struct.pack("<I32s", 0, b"\xff" * 32),
        struct.pack("<I32s", 7, TOKEN),
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n",
    ],
    ids=["wrong token", "no such rank", "not a rank"],
)
def test_a_stranger_is_shut_out(hello: bytes) -> None:
    listening = Listening(num_ranks=1)
    stranger = listening.stranger(hello)
    # Closed at our end: nothing, or a reset if it said more than was read.
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(1) == b""

    with channel.connect(listening.listener.port, 0, TOKEN) as rank:
        (connection,) = listening.wait()
        channel.send_frame(connection, b"plan")
        assert channel.receive_frame(rank) == b"plan"
    listening.close()


@pytest.mark.parametrize("hello", [b"", TOKEN[:9]], ids=["silent", "half a hello"])
def test_somebody_who_says_nothing_does_not_keep_the_ranks_out(
    hello: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_HELLO_SECONDS", 0.2)
    listening = Listening(num_ranks=1)
    listening.stranger(hello)

    with channel.connect(listening.listener.port, 0, TOKEN):
        started = time.monotonic()
        assert len(listening.wait()) == 1
        assert time.monotonic() - started < 10
    listening.close()


def test_ranks_that_do_not_come_are_named() -> None:
    listening = Listening(num_ranks=3, timeout_seconds=0.5)
    with channel.connect(listening.listener.port, 1, TOKEN):
        listening.wait()
    listening.close()

    assert "ranks [0, 2] did not connect within 0 s" in str(listening.error)


def test_the_listener_is_on_loopback_only() -> None:
    before = listening_addresses()
    listener = channel.StepListener(TOKEN)

    assert listening_addresses() - before == {("127.0.0.1", listener.port)}
    listener.close()
