"""One rank holds every expert: nothing travels, pairs are only sorted by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.moe.dispatch.base import ExpertGroup, Receipt, chunk_of
from lightmoe.moe.gate import Choice


class LocalDispatcher:
    """The transport of a single rank, on any device."""

    def __init__(self, group: ExpertGroup, layer: int) -> None:
        self._group = group
        self._layer = layer
        self._slot_table = torch.from_numpy(group.placement.slot_table[layer, :, group.rank]).long()

    def route(self, choice: Choice, num_chunks: int) -> list[Receipt]:
        """The pairs of each chunk, sorted by slot."""
        num_tokens = choice.experts.shape[0]
        spans = (chunk_of(num_tokens, chunk, num_chunks) for chunk in range(num_chunks))
        return [self._receipt(choice.experts[span], span) for span in spans]

    def _receipt(self, experts: Tensor, span: slice) -> Receipt:
        self._slot_table = self._slot_table.to(experts.device)  # moves with the first step only
        slot = self._slot_table[experts.flatten()]  # [T * K]
        order = torch.argsort(slot, stable=True)
        pair_index = torch.empty_like(order)
        pair_index[order] = torch.arange(len(order), device=order.device)
        slots, pairs_per_slot = torch.unique_consecutive(slot[order], return_counts=True)
        self._group.layer_pairs[self._layer] += len(order)
        return Receipt(
            tokens=span,
            pair_row=order // experts.shape[1],
            slots=slots.tolist(),
            pairs_per_slot=pairs_per_slot.tolist(),
            pair_index=pair_index.view_as(experts),
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The chunk itself: every token is a row."""
        return hidden[receipt.tokens]

    def combine(self, pairs: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
        """Weighted sum in ascending k."""
        return kernels.combine(pairs, receipt.pair_index, weights[receipt.tokens])
