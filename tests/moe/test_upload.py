"""Uploads of hidden states: what waits for what, and whose rows come where each of them is as late
as it may be.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightmoe.distributed.peers import Road
from lightmoe.kernels import exchange as exchange_module
from lightmoe.kernels import streams
from lightmoe.moe.dispatch.arena import ArenaLayout
from lightmoe.moe.dispatch.upload import Upload
from lightmoe.moe.layer import MoELayer
from lightmoe.moe.overlap_model import chunk_of
from lightmoe.moe.placement import initial_placement
from lightmoe.telemetry.trace import SpanRecorder, span
from tests.moe.cases import LayerWeights, poison_results
from tests.moe.emulated_ranks import (
    DTYPE,
    HostLibrary,
    LateUpload,
    compile_kernels,
    layer_of,
    on_threads,
    open_lanes,
)

NUM_EXPERTS, PER_TOKEN, WIDTH, MAX_TOKENS = 6, 2, 16, 21
WEIGHTS = LayerWeights.random(1, NUM_EXPERTS, PER_TOKEN, WIDTH, 16)
STEPS = ((7, 0, MAX_TOKENS), (0, 0, 3), (1, 12, 5), (MAX_TOKENS,) * 3)
MODES = pytest.mark.parametrize(
    ("summed", "as_int8"), [(False, False), (True, False), (True, True)], ids=str
)
CHUNKS = pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])

calls: list[tuple[str, object]] = []


class Event:
    """Takes down who waits for it."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def record(self, stream: Stream) -> None:
        self.name = f"all of {stream.name}"

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current
        calls.append((f"{stream.name} waits", self.name))


class Stream:
    """Records events by their number."""

    current: Stream
    device_index = 0

    def __init__(self, name: str) -> None:
        self.name, self.num_events = name, 0

    def record_event(self) -> Event:
        self.num_events += 1
        return Event(f"{self.name} {self.num_events - 1}")


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream."""
    stream = Stream("compute")

    def set_stream(stream: Stream) -> None:
        Stream.current = stream

    set_stream(stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(streams, "_events", streams._Events())
    calls.clear()
    return stream


@CHUNKS
@pytest.mark.parametrize("num_tokens", [0, 1, 5, MAX_TOKENS])
def test_chunks_are_copied_in_order_behind_the_current_stream(
    monkeypatch: pytest.MonkeyPatch, compute: Stream, num_tokens: int, num_chunks: int
) -> None:
    stream: Any = Stream("upload")
    upload, other = Upload(stream), Upload(stream).of_another_lane()
    source = torch.arange(num_tokens)[:, None].expand(-1, 2).contiguous()
    target = torch.full((MAX_TOKENS, 2), -1)
    copy = upload._copy

    def note(parts: Any, rows: slice) -> None:
        calls.append((f"{Stream.current.name} copies", rows))
        copy(parts, rows)

    monkeypatch.setattr(upload, "_copy", note)
    upload.begin([(source, target)], num_tokens, num_chunks)
    assert Stream.current is compute
    assert upload.num_chunks == num_chunks
    other.begin([(source, target)], num_tokens, 1)  # its events are its own
    for chunk in range(num_chunks):
        upload.wait(chunk)

    copies: list[tuple[str, object]] = [
        ("upload copies", chunk_of(num_tokens, chunk, num_chunks)) for chunk in range(num_chunks)
    ]
    begun: tuple[str, object] = ("upload waits", "all of compute")
    waits: list[tuple[str, object]] = [
        ("compute waits", f"upload {chunk}") for chunk in range(num_chunks)
    ]
    assert calls == [begun, *copies, begun, *waits]
    assert torch.equal(target[:num_tokens], source)
    assert (target[num_tokens:] == -1).all()


def test_an_upload_comes_after_what_computed_it_and_no_earlier_one_is_waited_for(
    compute: Stream,
) -> None:
    stream: Any = Stream("upload")
    upload = Upload(stream)
    rows = torch.zeros(4, 2)
    for layer in range(2):
        upload.begin([(rows, rows.clone())], 4, 2)
        upload.wait(0)
        upload.wait(1)
        assert calls[-2:] == [("compute waits", f"upload {2 * layer + chunk}") for chunk in (0, 1)]
    assert calls.count(("upload waits", "all of compute")) == 2


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_kernels(tmp_path_factory.mktemp("emulated"))


def use(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "library", lambda: library)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def layout(num_ranks: int, summed: bool = False, as_int8: bool = False) -> ArenaLayout:
    return ArenaLayout(
        num_ranks=num_ranks,
        max_tokens=MAX_TOKENS,
        num_experts=NUM_EXPERTS,
        num_experts_per_token=PER_TOKEN,
        width=WIDTH,
        element_bytes=2,
        summed=summed,
        as_int8=as_int8,
    )


def hidden_of(rank: int, layer: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * layer + rank)
    return torch.randn(num_tokens, WIDTH, generator=generator).to(DTYPE)


class NotingLibrary(HostLibrary):
    """Takes down the kernels of the exchange."""

    def launch(self, name: str, device: torch.device, **arguments: Any) -> None:
        if name in ("exchange_share", "exchange_meet", "exchange_pull"):
            calls.append((name, None))
        super().launch(name, device, **arguments)


class NotingUpload(LateUpload):
    """Takes down what is asked of it."""

    def of_another_lane(self) -> LateUpload:
        return NotingUpload()

    def begin(self, parts: Any, num_tokens: int, num_chunks: int) -> None:
        calls.append(("upload", num_chunks))
        super().begin(parts, num_tokens, num_chunks)

    def wait(self, chunk: int) -> None:
        calls.append(("wait", chunk))
        super().wait(chunk)


@CHUNKS
@MODES
def test_each_chunk_is_announced_before_it_is_pulled(
    emulated: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    num_chunks: int,
    summed: bool,
    as_int8: bool,
) -> None:
    """The upload begins before the gate; what is in one piece is announced with the choices."""
    use(NotingLibrary(emulated, 1), monkeypatch)
    lanes = open_lanes(layout(1, summed, as_int8), "host", NotingUpload())
    layer, group = layer_of(WEIGHTS, initial_placement(1, NUM_EXPERTS, 1), 0, lanes, num_chunks)
    group.tokens_per_rank = (9,)
    gate = layer.gate

    def noted_gate(*given: Any) -> Any:
        calls.append(("gate", None))
        return gate(*given)

    monkeypatch.setattr(layer, "gate", noted_gate)
    calls.clear()

    layer(hidden_of(0, 0, 9))

    wanted: list[tuple[str, object]] = [("upload", num_chunks), ("gate", None)]
    if num_chunks == 1:
        wanted += [("wait", 0), ("exchange_share", None), ("exchange_pull", None)]
        wanted += [("exchange_meet", None)]  # of results
    else:
        wanted.append(("exchange_share", None))
        for chunk in range(num_chunks):
            wanted += [("wait", chunk), ("exchange_meet", None), ("exchange_pull", None)]
            wanted += [("exchange_meet", None)]
    assert calls == wanted


def test_on_cards_nothing_is_uploaded_and_ranks_meet_twice_a_chunk(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(NotingLibrary(emulated, 1), monkeypatch)
    lanes = open_lanes(layout(1), "ipc", NotingUpload())
    layer, group = layer_of(WEIGHTS, initial_placement(1, NUM_EXPERTS, 1), 0, lanes, 3)
    group.tokens_per_rank = (9,)
    calls.clear()

    layer(hidden_of(0, 0, 9))

    assert lanes[0].upload is None
    chunk = ["exchange_pull", "exchange_meet"]
    assert [name for name, _ in calls] == ["exchange_share", *chunk * 3]


def test_an_upload_is_recorded_as_part_of_its_layer_s_dispatch(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What copies it starts outside of an exchange's span count as nobody's communication."""
    use(HostLibrary(emulated, 1), monkeypatch)
    recorder = SpanRecorder(0, annotate=False)

    class InSpan(LateUpload):
        def of_another_lane(self) -> LateUpload:
            return InSpan()

        def begin(self, parts: Any, num_tokens: int, num_chunks: int) -> None:
            with span("copy_engine"):
                super().begin(parts, num_tokens, num_chunks)

    lanes = open_lanes(layout(1), "host", InSpan())
    layer, group = layer_of(WEIGHTS, initial_placement(1, NUM_EXPERTS, 1), 0, lanes, 2)
    group.tokens_per_rank = (9,)
    with recorder.recording(0):
        layer(hidden_of(0, 0, 9))

    (upload,) = [one for one in recorder.records if one.name == "copy_engine"]
    assert (upload.stage, upload.layer) == ("dispatch", 0)


def run_layers(layer: MoELayer, group: Any, rank: int) -> list[Tensor]:
    """What one rank gets of layers that follow each other, each with other hidden states."""
    answers = []
    for number, tokens in enumerate(STEPS):
        group.tokens_per_rank = tokens
        group.peers.rows.fill_(float("nan"))
        poison_results(group.peers)
        answers.append(layer(hidden_of(rank, number, tokens[rank])))
    return answers


@CHUNKS
@MODES
def test_layers_behind_each_other_have_the_rows_of_their_own(
    emulated: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    num_chunks: int,
    summed: bool,
    as_int8: bool,
) -> None:
    """Ranks that are ahead spoil what they published; the others have read it, in any mode."""
    use(HostLibrary(emulated, 3), monkeypatch)
    placement = initial_placement(1, NUM_EXPERTS, 3)
    answers = []
    for road, chunks in (("ipc", 1), ("host", num_chunks)):
        lanes = open_lanes(layout(3, summed, as_int8), road, LateUpload(num_chunks))
        layers = [layer_of(WEIGHTS, placement, rank, [lanes[rank]], chunks) for rank in range(3)]
        answers.append(on_threads([partial(run_layers, *layers[rank], rank) for rank in range(3)]))

    for on_cards, through_host in zip(*answers, strict=True):
        for wanted, answer in zip(on_cards, through_host, strict=True):
            assert torch.equal(answer, wanted)


def run_halves(layer: MoELayer, group: Any, rank: int) -> list[Tensor]:
    """The same layers in two halves, as a decoder calls them."""
    waiting: list[Any] = []
    answers: list[Tensor] = []
    group.in_halves = True
    for number, tokens in enumerate(STEPS):
        first = tuple(count // 2 for count in tokens)
        second = tuple(count - half for count, half in zip(tokens, first, strict=True))
        parts = hidden_of(rank, number, tokens[rank]).split([first[rank], second[rank]])
        flights = []
        for half, counts in enumerate((first, second)):
            if waiting:
                answers.append(layer.finish(waiting[half]))
            group.tokens_per_rank = counts
            flights.append(layer.begin(parts[half], half))
        for flight in flights:
            layer.compute(flight)
        waiting = flights
    answers += [layer.finish(flight) for flight in waiting]
    return [torch.cat(answers[begin : begin + 2]) for begin in range(0, len(answers), 2)]


@MODES
def test_halves_have_the_rows_of_their_own(
    emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, summed: bool, as_int8: bool
) -> None:
    use(HostLibrary(emulated, 3), monkeypatch)
    placement = initial_placement(1, NUM_EXPERTS, 3)
    shape = layout(3, summed, as_int8)
    answers = []
    for road, run in (("ipc", run_layers), ("host", run_halves)):
        pairs = list(zip(open_lanes(shape, road), open_lanes(shape, road), strict=True))
        layers = [layer_of(WEIGHTS, placement, rank, pairs[rank]) for rank in range(3)]
        answers.append(on_threads([partial(run, *layers[rank], rank) for rank in range(3)]))

    for whole, halves in zip(*answers, strict=True):
        for wanted, answer in zip(whole, halves, strict=True):
            assert torch.equal(answer, wanted)


@pytest.mark.parametrize(
    ("summed", "road", "operations"),
    [(False, "ipc", 2200), (False, "host", 40_000), (True, "ipc", 0), (True, "host", 0)],
)
def test_a_byte_through_the_host_takes_longer(
    monkeypatch: pytest.MonkeyPatch, summed: bool, road: Road, operations: int
) -> None:
    """Sums leave after the product."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    lanes = open_lanes(layout(1, summed), road)
    layer, _ = layer_of(WEIGHTS, initial_placement(1, NUM_EXPERTS, 1), 0, lanes)
    assert layer.dispatcher.operations_per_byte == operations
