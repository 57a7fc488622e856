"""Two halves of a step's tokens, the exchange of one behind what the other computes.

    compute   attention A | attention B | experts A | experts B | attention A of the next layer ...
    exchange              | choice, rows of A | of B | results of A     | of B

It hides what chunks of one layer cannot, where the exchange takes longer than the experts. The
calls are those of a whole layer, so cutting the step in two never changes a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.moe.dispatch import Dispatcher, Receipt
from lightmoe.moe.experts import Experts
from lightmoe.moe.gate import Choice
from lightmoe.moe.pipeline import SharedExpert
from lightmoe.telemetry.trace import span


@dataclass(slots=True)
class InFlight:
    """One half on its way through a layer. What streams read of each other lives as long as it.

    `done` is when the exchange stream has got to: rows that arrived, later results that are summed.
    """

    dispatcher: Dispatcher
    hidden: Tensor
    choice: Choice
    receipt: Receipt
    rows: Tensor
    done: torch.cuda.Event | None
    pairs: Tensor | None = None
    result: Tensor | None = None


def begin(dispatcher: Dispatcher, hidden: Tensor, choice: Choice) -> InFlight:
    """Send for the rows of this half: hidden [T, D] and what its tokens chose."""
    with _exchanging(dispatcher, hidden):
        with span("route"):
            (receipt,) = dispatcher.route(choice, 1)
        with span("dispatch"):
            rows = dispatcher.dispatch(hidden, receipt)
        done = _mark(dispatcher)
    return InFlight(dispatcher, hidden, choice, receipt, rows, done)


def compute(flight: InFlight, experts: Experts, expert_ctas: int | None) -> None:
    """The experts' products of this half, and their way back."""
    dispatcher, receipt = flight.dispatcher, flight.receipt
    _join(flight)
    with span("experts"):
        flight.pairs = experts(
            flight.rows, receipt, output=dispatcher.output_of(receipt), max_ctas=expert_ctas
        )
    with _exchanging(dispatcher, flight.hidden), span("combine"):
        flight.result = dispatcher.combine(flight.pairs, flight.choice.weights, receipt)
        flight.done = _mark(dispatcher)


def finish(flight: InFlight, shared_expert: SharedExpert | None) -> Tensor:
    """What the layer adds to this half's hidden states: [T, D]."""
    assert flight.result is not None, "compute before finish"
    added = None if shared_expert is None else shared_expert(flight.hidden)  # fills the gap
    _join(flight)
    return flight.result if added is None else flight.result + added


@contextlib.contextmanager
def _exchanging(dispatcher: Dispatcher, hidden: Tensor) -> Iterator[None]:
    """Enqueue on the exchange's stream, after what is enqueued so far; on a CPU just do it."""
    if dispatcher.stream is None or not hidden.is_cuda:
        yield
        return
    dispatcher.stream.wait_stream(torch.cuda.current_stream(hidden.device))
    with torch.cuda.stream(dispatcher.stream):
        yield


def _mark(dispatcher: Dispatcher) -> torch.cuda.Event | None:
    return None if dispatcher.stream is None else dispatcher.stream.record_event()


def _join(flight: InFlight) -> None:
    if flight.done is not None:
        torch.cuda.current_stream(flight.hidden.device).wait_event(flight.done)
