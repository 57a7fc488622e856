"""Experts spread over ranks that exchange by all-to-alls: gloo on CPUs, NCCL on GPUs.

What travels first is the choice itself, [T, K] expert numbers of every rank, not its histogram:
from the [W, E] counts alone a receiver cannot know how many rows come (a token with two experts on
one rank is one row). With the choice, every rank derives the counts, the same route, and both ends
of every transfer, and no further header is needed. It is T x K x 2 bytes beside T x D x 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.distributed.communicator import Exchanger, Transfer
from lightmoe.moe.dispatch.base import Dispatcher, ExpertGroup, Receipt
from lightmoe.moe.gate import Choice
from lightmoe.telemetry.trace import span


class CollectiveDispatcher(Dispatcher):
    """The transports with three all-to-alls a layer: choice, rows, results."""

    exchanges_at_once = True

    def __init__(
        self,
        group: ExpertGroup,
        layer: int,
        communicator: Exchanger,
        write_receipts: Callable[[Tensor, int], list[Receipt]],
    ) -> None:
        self._group = group
        self._layer = layer
        self._communicator = communicator
        self._write_receipts = write_receipts

    def most_tokens(self, hidden: Tensor) -> int:
        """Tokens of the fullest rank in this step."""
        return max(self._group.tokens_per_rank)

    def publish(self, hidden: Tensor, num_chunks: int = 1) -> None:
        """Nothing: rows leave once it is known where to."""

    def route(self, choice: Choice, num_chunks: int) -> list[Receipt]:
        """Exchange the choices of all ranks, then route each chunk by its own counts."""
        everyone = self._share(choice.with_guess)
        residency, num_chosen = self._group.residency, choice.experts.shape[1]
        if residency is not None:
            assert not self._group.in_halves, "one layer's experts at a time"
            residency.enter(self._layer, everyone.cpu(), num_chosen)
            everyone = everyone[:, :num_chosen].contiguous()
        return self._write_receipts(everyone, num_chunks)

    def _share(self, experts: Tensor) -> Tensor:
        """Every rank's choice [N, K], by an all-to-all: gloo's all-gather is a ring, and slower."""
        tokens_per_rank = self._group.tokens_per_rank
        num_ranks = len(tokens_per_rank)
        sent = experts.to(torch.int16).repeat(num_ranks, 1)
        received = sent.new_empty(sum(tokens_per_rank), experts.shape[1])
        counts = [len(experts)] * num_ranks
        with span("collective"):
            self._communicator.all_to_all(received, sent, tokens_per_rank, counts)
        return received.to(experts.dtype)

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """One row per (token, rank) out, the rows of all ranks in."""
        out = _rows_out(hidden, receipt)
        self._group.count_sent(out.sent_counts, out.sent)
        with span("collective"):
            self._communicator.all_to_all(*out)
        return out.received

    def combine(
        self, pairs: Tensor, weights: Tensor, receipt: Receipt, output: Tensor | None = None
    ) -> Tensor:
        """One result per pair back; the sum is made here, in ascending k, wherever it came from."""
        back = _results_back(pairs, receipt)
        self._group.count_sent(back.sent_counts, back.sent)
        with span("collective"):
            self._communicator.all_to_all(*back)
        total = _sum(back.received, weights, receipt)
        return total if output is None else output.copy_(total)

    def exchange(
        self, dispatch: tuple[Tensor, Receipt], combine: tuple[Tensor, Tensor, Receipt]
    ) -> tuple[Tensor, Tensor]:
        """dispatch(*dispatch) of one chunk and combine(*combine) of another in one exchange.

        Apart on one NCCL communicator they would run one after the other, on two they can
        deadlock. Every rank calls it for the same two chunks.
        """
        out, (pairs, weights, receipt) = _rows_out(*dispatch), combine
        back = _results_back(pairs, receipt)
        self._group.count_sent(out.sent_counts, out.sent)
        self._group.count_sent(back.sent_counts, back.sent)
        with span("collective"):
            self._communicator.exchange([out, back])
        return out.received, _sum(back.received, weights, receipt)


def _rows_out(hidden: Tensor, receipt: Receipt) -> Transfer:
    assert receipt.send_row is not None
    sent = kernels.permute(hidden, receipt.send_row)
    rows = hidden.new_empty(sum(receipt.rows_received), hidden.shape[1])
    return Transfer(rows, sent, receipt.rows_received, receipt.rows_sent)


def _results_back(pairs: Tensor, receipt: Receipt) -> Transfer:
    assert receipt.return_order is not None
    sent = kernels.permute(pairs, receipt.return_order)
    results = pairs.new_empty(sum(receipt.pairs_received), pairs.shape[1])
    return Transfer(results, sent, receipt.pairs_received, receipt.pairs_returned)


def _sum(results: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
    assert receipt.pair_index is not None
    return kernels.combine(results, receipt.pair_index, weights[receipt.tokens])
