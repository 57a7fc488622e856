"""One rank holds every expert: nothing travels, pairs are only sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.moe.dispatch.base import (
    Dispatcher,
    ExpertGroup,
    Receipt,
    TokensPerTile,
)
from lightmoe.moe.gate import Choice, PairSort, SortedPairs
from lightmoe.moe.overlap_model import chunk_of


class LocalDispatcher(Dispatcher):
    """The transport of a single rank, on any device.

    It never waits for one, but where experts take turns in the slots.
    """

    def __init__(
        self,
        group: ExpertGroup,
        layer: int,
        device: torch.device,
        tokens_per_tile: TokensPerTile,
    ) -> None:
        self._group = group
        self._layer = layer
        slots = group.tables_on(device).slots[layer]
        self._sort = PairSort(
            slots,
            lambda num_pairs: tokens_per_tile(num_pairs, len(slots)),
            weighted=not group.deterministic,
        )
        # Slots are known once experts are in them, and that is after the gate.
        self.pair_sort: PairSort | None = self._sort if group.residency is None else None

    def route(self, choice: Choice, num_chunks: int) -> list[Receipt]:
        """The pairs of each chunk, sorted by expert."""
        num_tokens, num_chosen = choice.experts.shape
        if self._group.residency is not None:
            self._group.residency.enter(self._layer, choice.with_guess.cpu(), num_chosen)
        if choice.pairs is not None:
            assert num_chunks == 1, "pairs that the gate sorted are those of all tokens"
            return [self._receipt(choice.pairs, slice(0, num_tokens))]
        spans = (chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks))
        return [
            self._receipt(self._sort(choice.experts[span], choice.weights[span]), span)
            for span in spans
        ]

    def _receipt(self, pairs: SortedPairs, span: slice) -> Receipt:
        self._group.layer_pairs[self._layer] += pairs.groups.num_pairs
        return Receipt(
            tokens=span,
            pair_row=pairs.pair_row,
            groups=pairs.groups,
            pair_index=pairs.pair_index,
            pair_weight=pairs.pair_weight,
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The chunk itself: every token is a row."""
        return hidden[receipt.tokens]

    def combine(
        self, pairs: Tensor, weights: Tensor, receipt: Receipt, output: Tensor | None = None
    ) -> Tensor:
        """The sum in ascending k, weighted unless the experts did that."""
        assert receipt.pair_index is not None, "route gives one"
        unweighted = receipt.pair_weight is not None
        total = kernels.combine(
            pairs, receipt.pair_index, None if unweighted else weights[receipt.tokens]
        )
        return total if output is None else output.copy_(total)
