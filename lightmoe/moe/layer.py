"""One Mixture-of-Experts layer, its experts spread over the ranks of a group.

    hidden ── gate ──> experts, weights ── route ──> receipt
       │                                               │
       └── dispatch ──> rows ── experts ──> pairs ── combine ──> hidden

Shapes: T tokens on this rank, D model width, K experts per token, R rows received, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightmoe.moe.dispatch import Dispatcher
from lightmoe.moe.experts import Experts
from lightmoe.moe.gate import Gate
from lightmoe.moe.load import LoadCounter


class MoELayer:
    """Gate, exchange, experts, exchange. `num_chunks` never changes a bit of the answer."""

    def __init__(
        self,
        layer: int,
        gate: Gate,
        load: LoadCounter,
        dispatcher: Dispatcher,
        experts: Experts,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        num_chunks: int = 1,
    ) -> None:
        self.layer = layer
        self.gate = gate
        self.load = load
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared_expert = shared_expert
        self.num_chunks = num_chunks

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        sort = self.dispatcher.pair_sort if self.num_chunks == 1 else None
        choice = self.gate(hidden, sort)  # experts [T, K], weights [T, K]
        self.load.add(self.layer, choice)
        parts = []
        for receipt in self.dispatcher.route(choice, self.num_chunks):
            rows = self.dispatcher.dispatch(hidden, receipt)  # [R, D]
            pairs = self.experts(rows, receipt)  # [P, D]
            parts.append(self.dispatcher.combine(pairs, choice.weights, receipt))
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.shared_expert is not None:
            output += self.shared_expert(hidden)
        return output
