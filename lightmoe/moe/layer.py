"""One Mixture-of-Experts layer, its experts spread over the ranks of a group.

    hidden ── gate ──> experts, weights ── route ──> receipt
       │                                               │
       └── dispatch ──> rows ── experts ──> pairs ── combine ──> hidden

Shapes: T tokens on this rank, D model width, K experts per token, R rows received, P pairs.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightmoe.moe import halves
from lightmoe.moe.dispatch import Dispatcher
from lightmoe.moe.experts import Experts
from lightmoe.moe.gate import Choice, Gate
from lightmoe.moe.halves import InFlight
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.overflow import Overflow
from lightmoe.moe.overlap_model import Overlap
from lightmoe.moe.pipeline import SharedExpert, run_layer
from lightmoe.telemetry.trace import span


class MoELayer:
    """Gate, exchange, experts, exchange. How many chunks there are never changes the answer."""

    def __init__(
        self,
        layer: int,
        gate: Gate,
        load: LoadCounter,
        dispatcher: Dispatcher,
        experts: Experts,
        shared_expert: SharedExpert | None = None,
        overlap: Overlap | None = None,
        second_dispatcher: Dispatcher | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        self.layer = layer
        self.gate = gate
        self.load = load
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared_expert = shared_expert
        self.overlap = overlap or Overlap()
        self.next_gate: Gate | None = None  # set where one wants to know what comes next
        self._halves = (dispatcher, second_dispatcher or dispatcher)
        self.overflow = overflow
        # What an overflow moves counts as it was chosen, which no transport knows.
        row, counting = load.row(layer), [False]
        if overflow is None:
            counting = [one.counts_into(row) for one in self._halves]
        self._counted = all(counting)

    def begin(self, hidden: Tensor, half: int) -> InFlight:
        """Send one half of a step, [T, D], on its way; `compute` and `finish` follow."""
        dispatcher = self._halves[half]
        dispatcher.publish(hidden)
        with span("gate", self.layer):
            choice = self.gate(hidden, dispatcher.pair_sort)
        self._count(choice)
        choice = self._within_capacity(hidden, choice, half)
        return halves.begin(self.layer, dispatcher, hidden, choice, half)

    def compute(self, flight: InFlight) -> None:
        """The experts' part for one half."""
        halves.compute(flight, self.experts, self.overlap)

    def finish(self, flight: InFlight) -> Tensor:
        """What the layer adds to one half's hidden states: [T, D]."""
        return halves.finish(flight, self.shared_expert)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        num_chunks = self.overlap.chunks(self.dispatcher.most_tokens(hidden))
        self.dispatcher.publish(hidden, num_chunks)
        sort = self.dispatcher.pair_sort if num_chunks == 1 else None
        with span("gate", self.layer):
            choice = self.gate(hidden, sort)  # experts [T, K], weights [T, K]
        self._count(choice)
        choice = self._within_capacity(hidden, choice)
        if self.next_gate is not None:
            choice = replace(choice, guessed=self.next_gate(hidden).experts)
        with span("route", self.layer):
            receipts = self.dispatcher.route(choice, num_chunks)
        with span("pipeline", self.layer):
            return run_layer(
                self.dispatcher,
                self.experts,
                hidden,
                choice.weights,
                receipts,
                self.shared_expert,
                self.overlap,
            )

    def _count(self, choice: Choice) -> None:
        if self._counted:
            self.load.keep(self.layer, choice)
        else:
            self.load.add(self.layer, choice)

    def _within_capacity(self, hidden: Tensor, choice: Choice, half: int = 0) -> Choice:
        """What is to run of the gate's choice, where ranks have a capacity."""
        if self.overflow is None:
            return choice
        choice = self.overflow(self.layer, self.gate, hidden, choice, half)
        self.load.keep(self.layer, choice)
        return choice
