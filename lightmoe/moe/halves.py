"""Two halves of a step's tokens, the exchange of one behind what the other computes.

    compute   attention A | attention B       | up A | up B     | attention A of the next layer ...
    beside                                           | down A   | down B
    exchange              | choice, rows of A | of B            | results of A | of B

Where the second product writes its results to other ranks it waits for links, so it runs beside
what comes next; without a stream beside it follows the first. The first half's leaves room for the
other's first product, the second half's for nothing: attention takes what that gives up.
It hides what chunks of one layer cannot, where the exchange takes longer than the experts. The
calls are those of a whole layer, so cutting the step in two never changes a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.kernels.streams import follow, on_stream
from lightmoe.moe.dispatch import Dispatcher, Receipt
from lightmoe.moe.experts import Experts
from lightmoe.moe.gate import Choice
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.pipeline import SharedExpert
from lightmoe.telemetry.trace import span


@dataclass(slots=True)
class InFlight:
    """One half, 0 or 1, on its way through a layer. What streams read of each other lives as long.

    `done` is when the exchange stream has got to: rows that arrived, later results that are summed.
    """

    layer: int
    dispatcher: Dispatcher
    hidden: Tensor
    choice: Choice
    receipt: Receipt
    half: int
    rows: Tensor
    done: torch.cuda.Event | None
    inner: Tensor | None = None
    pairs: Tensor | None = None
    result: Tensor | None = None


def begin(
    layer: int, dispatcher: Dispatcher, hidden: Tensor, choice: Choice, half: int
) -> InFlight:
    """Send for the rows of this half: hidden [T, D] and what its tokens chose."""
    with _following(dispatcher.stream, hidden):
        with span("route", layer):
            (receipt,) = dispatcher.route(choice, 1)
        with span("dispatch", layer):
            rows = dispatcher.dispatch(hidden, receipt)
        done = _mark(dispatcher)
    return InFlight(layer, dispatcher, hidden, choice, receipt, half, rows, done)


def compute(flight: InFlight, experts: Experts, overlap: Overlap) -> None:
    """The experts' products of this half, and their way back."""
    dispatcher, receipt = flight.dispatcher, flight.receipt
    waits = experts.outpace(dispatcher.operations_per_byte)
    cut = dispatcher.beside is not None and flight.hidden.is_cuda and waits
    _join(flight)
    with span("experts", flight.layer):
        # The first half's finds the device to itself, the second's runs beside the first's down.
        up_ctas = overlap.up_ctas if cut and flight.half else overlap.expert_ctas
        flight.inner = experts.up(flight.rows, receipt, max_ctas=up_ctas)
    beside = dispatcher.beside if cut else None
    with _following(beside, flight.hidden), span("experts", flight.layer):
        down_ctas = overlap.down_ctas if cut and not flight.half else overlap.expert_ctas
        output = dispatcher.output_of(receipt)
        flight.pairs = experts.down(flight.inner, receipt, output=output, max_ctas=down_ctas)
        with _following(dispatcher.stream, flight.hidden), span("combine", flight.layer):
            flight.result = dispatcher.combine(flight.pairs, flight.choice.weights, receipt)
            flight.done = _mark(dispatcher)


def finish(flight: InFlight, shared_expert: SharedExpert | None) -> Tensor:
    """What the layer adds to this half's hidden states: [T, D]."""
    assert flight.result is not None, "compute before finish"
    added = None if shared_expert is None else shared_expert(flight.hidden)  # fills the gap
    _join(flight)
    return flight.result if added is None else flight.result + added


@contextlib.contextmanager
def _following(stream: torch.cuda.Stream | None, hidden: Tensor) -> Iterator[None]:
    """Enqueue on this stream, after what the current one has so far; on a CPU just do it."""
    if stream is None or not hidden.is_cuda:
        yield
        return
    current = torch.cuda.current_stream(hidden.device)
    follow(stream, current)
    with on_stream(stream, current):
        yield


def _mark(dispatcher: Dispatcher) -> torch.cuda.Event | None:
    return None if dispatcher.stream is None else dispatcher.stream.record_event()


def _join(flight: InFlight) -> None:
    if flight.done is not None:
        torch.cuda.current_stream(flight.hidden.device).wait_event(flight.done)
