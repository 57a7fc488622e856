"""The order in which a layer's chunks are enqueued on their streams, without a GPU: calls that run
at once see what was enqueued before them, so a call that comes too early finds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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


class Stream:
    """A stream on which everything has happened already."""

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        assert event is not None


@pytest.fixture(autouse=True, scope="module")
def _no_streams() -> Any:
    with (
        mock.patch.object(pipeline, "on_stream", return_value=contextlib.nullcontext()),
        mock.patch.object(pipeline, "follow"),
        mock.patch.object(torch.cuda, "current_stream", return_value=Stream()),
    ):
        yield


def noted(calls: list[tuple[str, int]], name: str, call: Callable, chunk_of: Callable) -> Callable:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append((name, chunk_of(*arguments)))
        return call(*arguments, **named)

    return wrapped


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
    calls: list[tuple[str, int]] = []
    streams: Any = {"stream": Stream(), "beside": Stream() if has_beside else None}
    modes = {"exchanges_at_once": at_once, "combines_here": put_off and not at_once}
    for name, value in (streams | modes).items():
        setattr(dispatcher, name, value)
    for owner, name, place in (
        (dispatcher, "dispatch", 1),
        (layer.experts, "up", 1),
        (layer.experts, "down", 1),
        (dispatcher, "combine", 2),
    ):
        chunk = lambda *arguments, place=place: number(id(arguments[place]))  # noqa: E731
        setattr(owner, name, noted(calls, name, getattr(owner, name), chunk))
    with mock.patch.object(Experts, "outpace", return_value=waits):
        assert torch.equal(run(), expected)

    for name in ("dispatch", "up", "down", "combine"):
        assert [chunk for one, chunk in calls if one == name] == list(range(num_chunks)), name
    places = {call: place for place, call in enumerate(calls)}
    for chunk in range(num_chunks):
        order = [places[name, chunk] for name in ("dispatch", "up", "down", "combine")]
        assert order == sorted(order)
    if put_off and not at_once:
        assert places["combine", 0] > places["down", num_chunks - 2]
