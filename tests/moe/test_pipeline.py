"""What a layer's chunks wait for on their streams, without a GPU: streams here know which calls are
behind them, and calls run at once, so one that comes too early finds nothing.
"""

from __future__ import annotations

import contextlib
import weakref
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
from lightmoe.moe.dispatch.base import Receipt
from lightmoe.moe.experts import Experts
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.placement import initial_placement
from tests.moe.cases import LayerWeights

WEIGHTS = LayerWeights.random(0, 8, 2, 32, 48)
ROAD = ("dispatch", "up", "down", "combine")  # each reads what the one before it writes
Call = tuple[str, int]  # its name and chunk
GATE: Call = ("gate", 0)  # all that a layer has done on compute before


class Stream:
    """What is behind everything that is enqueued here next."""

    def __init__(self, *known: Call) -> None:
        self.known = set(known)

    def record_event(self) -> frozenset[Call]:
        return frozenset(self.known)

    def wait_event(self, event: frozenset[Call]) -> None:
        self.known |= event


class Device:
    """Notes calls: their order, what each waits for, and the multiprocessors of products."""

    def __init__(self) -> None:
        self.compute = self.current = Stream(GATE)
        self.before: dict[Call, set[Call]] = {}
        self.ctas: dict[Call, int | None] = {}
        self.written: dict[Call, weakref.ref[Tensor]] = {}

    @contextlib.contextmanager
    def on_stream(self, stream: Stream, current: Stream) -> Iterator[None]:
        assert current is self.current
        self.current = stream
        yield
        self.current = current

    def follow(self, stream: Stream, other: Stream) -> None:
        """Nothing is freed before the last of these."""
        stream.wait_event(other.record_event())
        assert all(written() is not None for written in self.written.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        with (
            mock.patch.object(pipeline, "on_stream", self.on_stream),
            mock.patch.object(pipeline, "follow", self.follow),
            mock.patch.object(torch.cuda, "current_stream", side_effect=lambda _: self.current),
        ):
            yield

    def noted(self, name: str, call: Callable, chunk_of: Callable[..., int]) -> Callable:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            this = (name, chunk_of(*arguments))
            assert this not in self.before
            self.before[this] = set(self.current.known)
            self.current.known.add(this)
            self.ctas[this] = named.get("max_ctas")
            output = call(*arguments, **named)
            if name in ("dispatch", "up", "output_of", "down"):
                self.written[this] = weakref.ref(output)
            if name == "down":
                assert output is self.written["output_of", this[1]]()
            return output

        return wrapped

    def chunks(self, name: str) -> list[int]:
        return [chunk for one, chunk in self.before if one == name]


def note_calls(device: Device, layer: Any, receipts: list[Receipt]) -> None:
    """Of the layer's dispatcher and experts; results have memory of the dispatcher's."""
    number = {id(receipt): chunk for chunk, receipt in enumerate(receipts)}

    def output_of(receipt: Receipt) -> Tensor:
        return torch.full((receipt.groups.num_pairs, 32), torch.nan)

    layer.dispatcher.output_of = output_of
    for owner, name, receipt_of in (
        (layer.dispatcher, "dispatch", lambda _, receipt: receipt),
        (layer.dispatcher, "exchange", lambda dispatch, _: dispatch[1]),
        (layer.dispatcher, "output_of", lambda receipt: receipt),
        (layer.dispatcher, "combine", lambda *arguments: arguments[2]),
        (layer.dispatcher, "combine_all", lambda *arguments: arguments[2][-1]),
        (layer.experts, "up", lambda _, receipt: receipt),
        (layer.experts, "down", lambda _, receipt: receipt),
    ):
        chunk_of = lambda *arguments, of=receipt_of: number[id(of(*arguments))]  # noqa: E731
        setattr(owner, name, device.noted(name, getattr(owner, name), chunk_of))


@pytest.mark.parametrize("num_chunks", range(2, 6))
@pytest.mark.parametrize("mode", ["in turn", "at once", "put off"])
@pytest.mark.parametrize(("has_beside", "waits"), [(True, True), (True, False), (False, True)])
@given(
    num_tokens=st.integers(1, 40),
    expert_ctas=st.sampled_from((None, 12, 116)),
    is_shared=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=6)
def test_chunks_wait_for_what_they_read_and_give_the_bits_of_chunks_in_turn(
    num_chunks: int,
    mode: str,
    has_beside: bool,
    waits: bool,
    num_tokens: int,
    expert_ctas: int | None,
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
    dispatcher: Any = layer.dispatcher
    choice = layer.gate(hidden)
    receipts = [replace(one) for one in dispatcher.route(choice, num_chunks)]
    overlap = Overlap(num_chunks=num_chunks, expert_ctas=expert_ctas)

    def run(shared_expert: Callable[[Tensor], Tensor]) -> Tensor:
        shared = shared_expert if is_shared else None
        return pipeline.run_layer(
            dispatcher, layer.experts, hidden, choice.weights, receipts, shared, overlap
        )

    expected = run(torch.tanh)
    device = Device()
    dispatcher.stream, dispatcher.beside = Stream(), Stream() if has_beside else None
    dispatcher.exchanges_at_once, dispatcher.combines_here = mode == "at once", mode == "put off"
    note_calls(device, layer, receipts)
    with mock.patch.object(Experts, "outpace", return_value=waits), device.in_place():
        assert torch.equal(run(device.noted("shared", torch.tanh, lambda _: 0)), expected)

    cut = has_beside and waits
    assert_each_waits_for_what_it_reads(device, num_chunks)
    assert_exchanges_are_in_line(device, num_chunks, mode)
    assert_chunks_overlap(device, num_chunks, mode, cut=cut)
    assert_products_have_their_multiprocessors(device, overlap, mode, cut=cut)
    assert device.chunks("shared") == [0] * is_shared


def assert_each_waits_for_what_it_reads(device: Device, num_chunks: int) -> None:
    """And compute for all, in the end."""
    for call, before in device.before.items():
        assert GATE in before, call
    for name in ROAD:
        assert device.chunks(name) == list(range(num_chunks)), name
    for earlier, later in zip(ROAD, ROAD[1:], strict=False):
        for chunk in range(num_chunks):
            assert (earlier, chunk) in device.before[later, chunk]
    assert device.current is device.compute
    assert device.compute.known == {GATE, *device.before}


def assert_exchanges_are_in_line(device: Device, num_chunks: int, mode: str) -> None:
    """No two are under way at once, and those of two chunks are one where they have to be."""
    exchanges = [call for call in device.before if call[0] in ("dispatch", "combine")]
    for call, following in zip(exchanges, exchanges[1:], strict=False):
        assert call in device.before[following]
    both = list(range(2, num_chunks)) if mode == "at once" else []
    assert device.chunks("exchange") == both
    # Those put off meet the other ranks once, and those of `exchange` are not among these.
    met = list(range(num_chunks)) if mode == "in turn" else [num_chunks - 2, num_chunks - 1]
    assert device.chunks("combine_all") == met


def assert_chunks_overlap(device: Device, num_chunks: int, mode: str, *, cut: bool) -> None:
    """None waits for what it need not wait for."""
    before, last = device.before, num_chunks - 1
    for chunk in range(num_chunks):
        given = range(chunk - 1) if mode == "at once" else ()  # with results of the last of these
        products = {call for call in before["dispatch", chunk] if call[0] in ("up", "down")}
        assert products == {(name, one) for name in ("up", "down") for one in given}
        downs = {one for name, one in before["up", chunk] if name == "down"}
        assert downs == set(given if cut else range(chunk))
    for chunk in range(last):
        assert ("up", chunk + 1) not in before["down", chunk]
        assert ("dispatch", chunk + 1) not in before["up", chunk]
        next_up = last if mode == "put off" else chunk + 1
        assert ("down", next_up - 1) in before["combine", chunk]
        assert ("up", next_up) not in before["combine", chunk]
    assert not any(name in ROAD for name, _ in before.get(("shared", 0), ()))


def assert_products_have_their_multiprocessors(
    device: Device, overlap: Overlap, mode: str, *, cut: bool
) -> None:
    """All of the experts', unless a product of another chunk, or all sums, run beside."""
    assert overlap.num_chunks is not None
    last, alone = overlap.num_chunks - 1, overlap.expert_ctas
    assert device.ctas["up", 0] == alone
    for chunk in range(last):
        both = device.ctas["up", chunk + 1], device.ctas["down", chunk]
        shares = overlap.ctas_beside(chunk, overlap.num_chunks)
        assert both == (shares if cut else (alone, alone))
    beside_sums = cut and mode == "put off"
    assert device.ctas["down", last] == (overlap.up_ctas if beside_sums else alone)
