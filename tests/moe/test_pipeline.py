"""The order in which a layer's chunks are enqueued on their streams, without a GPU: calls that run
at once see what was enqueued before them, so a call that comes too early finds nothing. And what
each of them waits for: streams here know what they have waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.moe import pipeline
from lightmoe.moe.experts import Experts
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import initial_placement
from tests.moe.cases import LayerWeights

WEIGHTS = LayerWeights.random(0, 8, 2, 32, 48)
Call = tuple[str, int]  # its name and chunk


class Stream:
    """What is behind everything that is enqueued here next."""

    def __init__(self) -> None:
        self.known: set[Call] = set()

    def record_event(self) -> frozenset[Call]:
        return frozenset(self.known)

    def wait_event(self, event: frozenset[Call]) -> None:
        self.known |= event


class Device:
    """Notes calls: their order, what each waits for, and the thread blocks of products."""

    def __init__(self) -> None:
        self.compute = self.current = Stream()
        self.calls: list[Call] = []
        self.before: dict[Call, set[Call]] = {}
        self.ctas: dict[Call, int | None] = {}

    @contextlib.contextmanager
    def on_stream(self, stream: Stream, current: Stream) -> Iterator[None]:
        assert current is self.current
        self.current = stream
        yield
        self.current = current

    def follow(self, stream: Stream, other: Stream) -> None:
        stream.wait_event(other.record_event())

    def note(self, call: Call) -> None:
        self.calls.append(call)
        self.before[call] = set(self.current.known)
        self.current.known.add(call)

    def noted(self, name: str, call: Callable, chunk_of: Callable) -> Callable:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            this, helper = (name, chunk_of(*arguments)), named.pop("helper", None)
            self.ctas[this] = named.get("max_ctas")
            if helper is None:
                self.note(this)
                return call(*arguments, **named)
            helper.ready = self.current.record_event()
            self.note(this)
            output = call(*arguments, **named)
            helper.leave(this, output)
            return output

        return wrapped


class Helper:
    """Has all of its product left."""

    def __init__(self, device: Device, max_ctas: int | None, stream: Stream) -> None:
        self.device, self.max_ctas, self.stream = device, max_ctas, stream
        self.ready: frozenset[Call]

    def leave(self, product: Call, output: Tensor) -> None:
        assert self.stream is self.device.current
        self.product, self.output, self.left = product, output, output.clone()
        output.fill_(torch.nan)

    def launch(self, stream: Stream) -> None:
        assert stream is self.device.current
        assert stream is not self.stream
        stream.wait_event(self.ready)
        name, chunk = self.product
        self.device.note((f"help {name}", chunk))
        self.device.ctas[f"help {name}", chunk] = self.max_ctas
        self.output.copy_(self.left)


@pytest.fixture(autouse=True, scope="module")
def _streams() -> Any:
    """Streams and helpers of the last of DEVICES."""
    with (
        mock.patch.object(pipeline, "on_stream", lambda *streams: DEVICES[-1].on_stream(*streams)),
        mock.patch.object(pipeline, "follow", lambda *streams: DEVICES[-1].follow(*streams)),
        mock.patch.object(torch.cuda, "current_stream", side_effect=lambda _: DEVICES[-1].current),
        mock.patch.object(pipeline, "Helpers", FakeHelpers),
    ):
        yield


DEVICES: list[Device] = []


class FakeHelpers:
    """Helpers on the device of now, which are at most so many."""

    def __init__(self, _: torch.device, most: int) -> None:
        self.left = most

    def of(self, max_ctas: int | None, stream: Stream) -> Helper:
        self.left -= 1
        assert self.left >= 0
        return Helper(DEVICES[-1], max_ctas, stream)


@given(
    num_tokens=st.integers(1, 40),
    num_chunks=st.integers(2, 6),
    at_once=st.booleans(),
    put_off=st.booleans(),
    has_beside=st.booleans(),
    waits=st.booleans(),
    is_shared=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_chunks_in_any_mode_give_the_bits_of_chunks_in_turn(
    num_tokens: int,
    num_chunks: int,
    at_once: bool,
    put_off: bool,
    has_beside: bool,
    waits: bool,
    is_shared: bool,
) -> None:
    layer, _ = WEIGHTS.on_rank(
        0,
        initial_placement(1, 8, 1),
        None,
        route="none",
        num_chunks=num_chunks,
        tokens_per_rank=(num_tokens,),
    )
    hidden = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(num_tokens))
    dispatcher, choice = layer.dispatcher, layer.gate(hidden)
    receipts = [replace(one) for one in dispatcher.route(choice, num_chunks)]
    number = {id(receipt): chunk for chunk, receipt in enumerate(receipts)}.get
    shared = torch.tanh if is_shared else None
    overlap = Overlap(num_chunks=num_chunks, expert_ctas=12)

    def run() -> Tensor:
        return pipeline.run_layer(
            dispatcher, layer.experts, hidden, choice.weights, receipts, shared, overlap
        )

    expected = run()
    device = Device()
    DEVICES[:] = [device]
    beside = Stream() if has_beside else None
    streams: Any = {"stream": Stream(), "beside": beside}
    put_off = put_off and not at_once
    modes = {"exchanges_at_once": at_once, "combines_here": put_off}
    for name, value in (streams | modes).items():
        setattr(dispatcher, name, value)
    for owner, name, place in (
        (dispatcher, "dispatch", 1),
        (layer.experts, "up", 1),
        (layer.experts, "down", 1),
        (dispatcher, "combine", 2),
    ):
        chunk = lambda *arguments, place=place: number(id(arguments[place]))  # noqa: E731
        setattr(owner, name, device.noted(name, getattr(owner, name), chunk))
    with mock.patch.object(Experts, "outpace", return_value=waits):
        assert torch.equal(run(), expected)

    cut = has_beside and waits
    for name in ("dispatch", "up", "down", "combine"):
        assert [chunk for one, chunk in device.calls if one == name] == list(range(num_chunks))
    assert_each_waits_for_what_it_reads(device, num_chunks)
    assert_products_help_each_other(device, num_chunks, cut=cut, put_off=put_off)
    before, last = device.before, num_chunks - 1
    for chunk in range(last):
        # The chunks overlap.
        assert (("down", chunk) not in before["up", chunk + 1]) == cut
        assert ("up", chunk + 1) not in before["down", chunk]
        if not put_off:
            assert ("up", chunk + 1) not in before["combine", chunk]
    if put_off:
        assert ("down", last - 1) in before["combine", 0]
    assert ("down", last) not in before["combine", 0]


def assert_each_waits_for_what_it_reads(device: Device, num_chunks: int) -> None:
    """Also for helpers, and where one helps, those who read wait for both."""
    before, joined = device.before, device.compute.known
    for chunk in range(num_chunks):
        road = [
            [call for call in ((name, chunk), (f"help {name}", chunk)) if call in before]
            for name in ("dispatch", "up", "down", "combine")
        ]
        for earlier, later in zip(road, road[1:], strict=False):
            for call in later:
                assert before[call] >= set(earlier), call
                assert device.calls.index(call) > max(map(device.calls.index, earlier))
    assert joined == set(before)


def assert_products_help_each_other(
    device: Device, num_chunks: int, *, cut: bool, put_off: bool
) -> None:
    """A first product has the help of the second beside it, and that one its help where it may."""
    helped = {call for call in device.calls if call[0].startswith("help")}
    ups = {("help up", chunk) for chunk in range(1, num_chunks)}
    downs = {("help down", chunk) for chunk in range(num_chunks - 1)}
    assert helped == (ups if cut else set()) | (downs if cut and put_off else set())
    for name, chunk in helped:
        own, other = ("up", "down") if name == "help up" else ("down", "up")
        neighbour = chunk - 1 if own == "up" else chunk + 1
        assert device.ctas[name, chunk] == device.ctas[other, neighbour]
        assert device.ctas[own, chunk] + device.ctas[other, neighbour] == 12
        assert (own, chunk) not in device.before[name, chunk], "nothing would be left"
        # It comes behind the product whose multiprocessors it has, and before the next one there.
        assert (other, neighbour) in device.before[name, chunk]
        after = (other, neighbour + 1)
        assert after not in device.before or (name, chunk) in device.before[after]
