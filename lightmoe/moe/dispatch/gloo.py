"""Experts spread over CPU ranks: three all-to-alls a layer (choice, rows, results).

What travels first is the choice itself, [T, K] expert numbers of every rank, not its histogram:
from the [W, E] counts alone a receiver cannot know how many rows come (a token with two experts on
one rank is one row). With the choice, every rank derives the counts, the same route, and both ends
of every transfer, and no further header is needed. It is T x K x 2 bytes beside T x D x 4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.distributed.communicator import Communicator
from lightmoe.kernels import PairGroups
from lightmoe.moe.dispatch.base import ExpertGroup, Receipt, chunk_of
from lightmoe.moe.gate import Choice, PairSort
from lightmoe.moe.route import pair_ranks


class GlooDispatcher:
    """The transport of many ranks without GPUs."""

    def __init__(self, group: ExpertGroup, layer: int, communicator: Communicator) -> None:
        self.pair_sort: PairSort | None = None  # where pairs go is known after the exchange
        self._group = group
        self._layer = layer
        self._communicator = communicator
        self._copies = group.placement.copies[layer]
        self._slot_table = group.placement.slot_table[layer, :, group.rank]

    def route(self, choice: Choice, num_chunks: int) -> list[Receipt]:
        """Exchange the choices of all ranks, then route each chunk by its own counts."""
        everyone = self._share(choice.experts)  # one [T, K] a rank
        return [self._receipt(everyone, chunk, num_chunks) for chunk in range(num_chunks)]

    def _share(self, experts: Tensor) -> list[np.ndarray]:
        """Every rank's choice, by an all-to-all: gloo's all-gather is a ring, and slower."""
        tokens_per_rank = self._group.tokens_per_rank
        num_ranks, num_per_token = len(tokens_per_rank), experts.shape[1]
        sent = experts.to(torch.int16).repeat(num_ranks, 1)
        received = sent.new_empty(sum(tokens_per_rank), num_per_token)
        counts = [len(experts)] * num_ranks
        self._communicator.all_to_all(received, sent, tokens_per_rank, counts)
        borders = np.cumsum(tokens_per_rank)[:-1]
        return np.split(received.numpy().astype(np.int64), borders)

    def _receipt(self, everyone: list[np.ndarray], chunk: int, num_chunks: int) -> Receipt:
        rank, num_ranks = self._group.rank, len(everyone)
        spans = [chunk_of(len(experts), chunk, num_chunks) for experts in everyone]
        sizes = [span.stop - span.start for span in spans]
        experts = np.concatenate([part[span] for part, span in zip(everyone, spans, strict=True)])
        source = np.repeat(np.arange(num_ranks), sizes)  # [tokens of all ranks]
        target = pair_ranks(experts, source, self._copies, num_ranks, self._group.route)

        # What comes here: rows by source rank, then token.
        token_here, k_here = np.nonzero(target == rank)
        row_here = np.zeros(len(experts), dtype=bool)
        row_here[token_here] = True
        row_of_token = row_here.cumsum() - 1
        slot = self._slot_table[experts[token_here, k_here]]
        by_slot = np.argsort(slot, kind="stable")
        slots, pairs_per_slot = np.unique(slot, return_counts=True)
        return_order = np.empty_like(by_slot)
        return_order[by_slot] = np.arange(len(by_slot))
        self._group.layer_pairs[self._layer] += len(by_slot)

        # What goes out: rows by destination rank, then token.
        first = sum(sizes[:rank])
        mine = target[first : first + sizes[rank]]  # [T, K]
        goes = np.zeros((num_ranks, len(mine)), dtype=bool)
        goes[mine, np.arange(len(mine))[:, None]] = True
        _, send_token = np.nonzero(goes)
        pair_index = np.empty(mine.size, dtype=np.int64)
        pair_index[np.argsort(mine.ravel(), kind="stable")] = np.arange(mine.size)
        return Receipt(
            tokens=spans[rank],
            pair_row=torch.from_numpy(row_of_token[token_here][by_slot]),
            groups=PairGroups.from_counts(slots.tolist(), pairs_per_slot.tolist()),
            pair_index=torch.from_numpy(pair_index.reshape(mine.shape)),
            send_row=torch.from_numpy(send_token + spans[rank].start),
            rows_sent=goes.sum(axis=1).tolist(),
            rows_received=np.bincount(source[row_here], minlength=num_ranks).tolist(),
            return_order=torch.from_numpy(return_order),
            pairs_returned=np.bincount(source[token_here], minlength=num_ranks).tolist(),
            pairs_received=np.bincount(mine.ravel(), minlength=num_ranks).tolist(),
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """One row per (token, rank) out, the rows of all ranks in."""
        assert receipt.send_row is not None
        sent = kernels.permute(hidden, receipt.send_row)
        rows = hidden.new_empty(sum(receipt.rows_received), hidden.shape[1])
        self._communicator.all_to_all(rows, sent, receipt.rows_received, receipt.rows_sent)
        return rows

    def combine(self, pairs: Tensor, weights: Tensor, receipt: Receipt) -> Tensor:
        """One result per pair back; the sum is made here, in ascending k, wherever it came from."""
        assert receipt.return_order is not None
        sent = kernels.permute(pairs, receipt.return_order)
        results = pairs.new_empty(sum(receipt.pairs_received), pairs.shape[1])
        self._communicator.all_to_all(results, sent, receipt.pairs_received, receipt.pairs_returned)
        return kernels.combine(results, receipt.pair_index, weights[receipt.tokens])
