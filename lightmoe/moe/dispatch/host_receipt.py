"""Receipts from what all ranks chose, by numpy: of small steps on a CPU, twice as fast as tensors.

The receipts are those of receipt.py, but that groups without a pair are left out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightmoe.kernels import PairGroups
from lightmoe.moe.dispatch.base import ExpertGroup, Receipt
from lightmoe.moe.dispatch.receipt import without_dropped
from lightmoe.moe.overlap_model import chunk_of
from lightmoe.moe.route import pair_ranks


class HostReceiptWriter:
    """Writes the receipts of one layer."""

    def __init__(self, group: ExpertGroup, layer: int) -> None:
        self._group = group
        self._layer = layer
        self._tables = group.tables_on(torch.device("cpu"))

    def __call__(self, everyone: Tensor, num_chunks: int) -> list[Receipt]:
        """One receipt a chunk from the experts int64 [N, K] that the ranks chose, in rank order."""
        borders = np.cumsum(self._group.tokens_per_rank)[:-1]
        by_rank = np.split(everyone.numpy(), borders)  # one [T, K] a rank
        return [self._receipt(by_rank, chunk, num_chunks) for chunk in range(num_chunks)]

    def _receipt(self, everyone: list[np.ndarray], chunk: int, num_chunks: int) -> Receipt:
        rank, num_ranks = self._group.rank, len(everyone)
        spans = [chunk_of(len(experts), chunk, num_chunks) for experts in everyone]
        sizes = [span.stop - span.start for span in spans]
        experts = np.concatenate([part[span] for part, span in zip(everyone, spans, strict=True)])
        source = np.repeat(np.arange(num_ranks), sizes)  # [tokens of all ranks]
        copies = self._tables.copies[self._layer]
        group = self._group
        target = pair_ranks(experts, source, copies, num_ranks, group.route, group.nearness)

        # What comes here: rows by source rank, then token.
        token_here, k_here = np.nonzero(target == rank)
        row_here = np.zeros(len(experts), dtype=bool)
        row_here[token_here] = True
        row_of_token = row_here.cumsum() - 1
        slots_here = self._tables.slots[self._layer].numpy()
        slot = slots_here[experts[token_here, k_here]]
        by_slot = np.argsort(slot, kind="stable")
        slots, pairs_per_slot = np.unique(slot, return_counts=True)
        return_order = np.empty_like(by_slot)
        return_order[by_slot] = np.arange(len(by_slot))
        self._group.layer_pairs[self._layer] += len(by_slot)

        # What goes out: rows by destination rank, then token; the rank after the last is none.
        first = sum(sizes[:rank])
        mine = target[first : first + sizes[rank]]  # [T, K]
        goes = np.zeros((num_ranks + 1, len(mine)), dtype=bool)
        goes[mine, np.arange(len(mine))[:, None]] = True
        goes = goes[:num_ranks]
        _, send_token = np.nonzero(goes)
        pair_index = np.empty(mine.size, dtype=np.int64)
        pair_index[np.argsort(mine.ravel(), kind="stable")] = np.arange(mine.size)
        pairs_received = np.bincount(mine.ravel(), minlength=num_ranks + 1)[:num_ranks].tolist()
        return Receipt(
            tokens=spans[rank],
            pair_row=torch.from_numpy(row_of_token[token_here][by_slot]),
            groups=PairGroups.from_counts(slots.tolist(), pairs_per_slot.tolist()),
            pair_index=without_dropped(
                torch.from_numpy(pair_index.reshape(mine.shape)), sum(pairs_received)
            ),
            send_row=torch.from_numpy(send_token + spans[rank].start),
            rows_sent=goes.sum(axis=1).tolist(),
            rows_received=np.bincount(source[row_here], minlength=num_ranks).tolist(),
            return_order=torch.from_numpy(return_order),
            pairs_returned=np.bincount(source[token_here], minlength=num_ranks).tolist(),
            pairs_received=pairs_received,
        )
