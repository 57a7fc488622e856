"""Receipts from what all ranks chose: integer tensor operations on the device the choices are on.

Every rank computes the same from the same choices, so no header travels with the rows. The host
needs to know how much goes where, and waits for that: once a layer, twice where an expert has
replicas, since the route is computed there.

Shapes: N tokens of all ranks, T of them this rank's, K experts per token, W ranks, C chunks,
E experts. Tokens stand by chunk, then source rank: C x W segments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightmoe import kernels
from lightmoe.moe.dispatch.base import ExpertGroup, Receipt, TokensPerTile
from lightmoe.moe.overlap_model import chunk_of
from lightmoe.moe.route import split_over_copies


@dataclass(frozen=True, slots=True)
class Segments:
    """How the tokens of all ranks are cut into chunks.

    | field | meaning |
    |---|---|
    | order int64 [N] | tokens by chunk, then rank; None where they stand so |
    | of_token int64 [N] | chunk x W + source rank |
    | borders int64 [W, C x W + 1] | where each segment begins, in W rows of N tokens |
    | starts [C x W + 1] | first token of each segment |
    | spans [C] | this rank's tokens of each chunk, as a slice of 0 .. T |
    | mine int64 [2, T] | of this rank's tokens: chunk x W, and the first token of their chunk |
    """

    order: Tensor | None
    of_token: Tensor
    borders: Tensor
    starts: tuple[int, ...]
    spans: tuple[slice, ...]
    mine: Tensor


@dataclass(frozen=True, slots=True)
class Traffic:
    """What goes where.

    | field | meaning |
    |---|---|
    | target int64 [N, K] | the rank each pair goes to |
    | goes bool [W, N] | whether a token goes to a rank |
    | before int32 [W, N] | rows to earlier ranks, and to this one of earlier tokens |
    | pairs, rows int64 [C, W, W] | how many from each source to each target |
    | first_row int32 [C, W] | `before` of each chunk's first token |
    """

    target: Tensor
    goes: Tensor
    before: Tensor
    pairs: np.ndarray
    rows: np.ndarray
    first_row: np.ndarray


def cut(
    tokens_per_rank: tuple[int, ...], num_chunks: int, rank: int, device: torch.device
) -> Segments:
    """The segments of a step; the same for all its layers."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _cut(tokens_per_rank, num_chunks, rank, device, stream)


@functools.lru_cache(maxsize=8)
def _cut(
    tokens_per_rank: tuple[int, ...], num_chunks: int, rank: int, device: torch.device, stream: int
) -> Segments:
    """Once for each stream: another would have to wait for the tables to be filled."""
    num_ranks, num_tokens = len(tokens_per_rank), sum(tokens_per_rank)
    first = np.concatenate(([0], np.cumsum(tokens_per_rank)))
    spans = [
        [chunk_of(tokens, chunk, num_chunks) for tokens in tokens_per_rank]
        for chunk in range(num_chunks)
    ]
    sizes = np.array([span.stop - span.start for chunk in spans for span in chunk])
    starts = np.concatenate(([0], sizes.cumsum()))
    order = None
    if num_chunks > 1:
        order = torch.from_numpy(
            np.concatenate(
                [
                    np.arange(first[source] + span.start, first[source] + span.stop)
                    for chunk in spans
                    for source, span in enumerate(chunk)
                ]
            )
        ).to(device)
    borders = np.arange(num_ranks)[:, None] * num_tokens + starts
    return Segments(
        order,
        torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device),
        torch.from_numpy(borders).to(device),
        tuple(starts.tolist()),
        tuple(chunk[rank] for chunk in spans),
        _mine([chunk[rank] for chunk in spans], num_ranks).to(device),
    )


def _mine(spans: list[slice], num_ranks: int) -> Tensor:
    columns = [(chunk * num_ranks, span.start) for chunk, span in enumerate(spans)]
    sizes = torch.tensor([span.stop - span.start for span in spans])
    return torch.tensor(columns).t().repeat_interleave(sizes, dim=1)


class ReceiptWriter:
    """Writes the receipts of one layer."""

    def __init__(
        self,
        group: ExpertGroup,
        layer: int,
        device: torch.device,
        tokens_per_tile: TokensPerTile,
    ) -> None:
        self._group = group
        self._layer = layer
        self._tables = group.tables_on(device)
        self._tokens_per_tile = tokens_per_tile

    def __call__(self, everyone: Tensor, num_chunks: int) -> list[Receipt]:
        """One receipt a chunk from the experts [N, K] that the ranks chose, in rank order."""
        rank = self._group.rank
        segments = cut(self._group.tokens_per_rank, num_chunks, rank, everyone.device)
        experts = everyone.long()
        if segments.order is not None:
            experts = experts.index_select(0, segments.order)
        traffic = _traffic(self._targets(experts, segments), segments)
        pairs_here = traffic.pairs[:, :, rank].sum(axis=1).tolist()
        here = _true(traffic.target.flatten() == rank, sum(pairs_here))
        rows = traffic.before[rank].index_select(0, here // experts.shape[1]).split(pairs_here)
        chosen = experts.flatten().index_select(0, here).to(everyone.dtype).split(pairs_here)
        places = _places(traffic.target, segments, rank)
        return [
            self._receipt(chunk, segments, traffic, rows[chunk], chosen[chunk], places)
            for chunk in range(num_chunks)
        ]

    def _targets(self, experts: Tensor, segments: Segments) -> Tensor:
        """The rank each pair goes to, [N, K]. Tokens of a segment fill an expert's copies in order.

        Waits for the counts [C, W, E] where an expert has more than one copy. Expert -1, counted as
        one more before the first, goes to no rank, which is the one after the last.
        """
        copies = self._tables.copies[self._layer]
        most_copies = max(map(len, copies))
        num_ranks = len(self._group.tokens_per_rank)
        copy_ranks = self._tables.copy_ranks[self._layer, :, :most_copies]
        copy_ranks = pad(copy_ranks, (0, 0, 1, 0), value=num_ranks).long()
        if most_copies == 1:
            return copy_ranks[:, 0].index_select(0, experts.flatten() + 1).view_as(experts)
        num_segments, num_experts = len(segments.starts) - 1, len(copies) + 1
        key = (segments.of_token[:, None] * num_experts + (experts + 1)).flatten()
        counts = key.new_zeros(num_segments * num_experts)
        counts.index_add_(0, key, key.new_ones(1).expand(len(key)))
        by_chunk = counts.view(-1, num_ranks, num_experts).cpu().numpy()
        assigned = np.zeros((*by_chunk.shape, most_copies), dtype=np.int64)
        assigned[:, :, 0, 0] = by_chunk[:, :, 0]
        for chunk, chosen in zip(assigned, by_chunk[:, :, 1:], strict=True):
            chunk[:, 1:] = split_over_copies(
                chosen, copies, self._group.route, nearness=self._group.nearness
            )
        ranks = copy_ranks.expand(num_segments, -1, -1)
        in_order = ranks.flatten().repeat_interleave(
            torch.from_numpy(assigned.ravel()).to(key.device), output_size=len(key)
        )
        target = torch.empty_like(key).scatter_(0, key.int().argsort(stable=True), in_order)
        return target.view_as(experts)

    def _receipt(
        self,
        chunk: int,
        segments: Segments,
        traffic: Traffic,
        row: Tensor,
        expert: Tensor,
        places: Tensor,
    ) -> Receipt:
        """One chunk's, from the row and the expert of each pair that comes here."""
        rank, num_ranks = self._group.rank, len(self._group.tokens_per_rank)
        segment, span = chunk * num_ranks + rank, segments.spans[chunk]
        mine = slice(segments.starts[segment], segments.starts[segment + 1])
        rows_sent = traffic.rows[chunk, rank].tolist()
        send_token = _true(traffic.goes[:, mine].reshape(-1), sum(rows_sent))
        pairs_received = traffic.pairs[chunk, rank].tolist()
        # Groups of experts that are elsewhere are empty, and no reason for smaller tiles.
        expected = max(1, len(expert)), max(1, self._tables.num_held[self._layer])
        groups, order, place = self._groups(expert, expected)
        self._group.layer_pairs[self._layer] += len(expert)
        return Receipt(
            tokens=span,
            pair_row=row.index_select(0, order) - int(traffic.first_row[chunk, rank]),
            groups=groups,
            expected=expected,
            pair_index=without_dropped(places[span], sum(pairs_received)),
            send_row=(send_token % max(1, span.stop - span.start) + span.start).int(),
            rows_sent=rows_sent,
            rows_received=traffic.rows[chunk, :, rank].tolist(),
            return_order=place,
            pairs_returned=traffic.pairs[chunk, :, rank].tolist(),
            pairs_received=pairs_received,
        )

    def _groups(
        self, expert: Tensor, expected: tuple[int, int]
    ) -> tuple[kernels.PairGroups, Tensor, Tensor]:
        """Pairs [P] by expert: groups, the pair at each place, the place of each pair."""
        slots = self._tables.slots[self._layer]
        tokens = self._tokens_per_tile(*expected)
        groups, order, place = kernels.sort_pairs(expert[:, None], len(slots), slots, tokens)
        return groups, order, place[:, 0]


def _traffic(target: Tensor, segments: Segments) -> Traffic:
    """What follows from the targets [N, K]. Waits for the device."""
    num_tokens, num_ranks = len(target), len(segments.borders)
    pairs = torch.zeros(num_ranks + 1, num_tokens, dtype=torch.int32, device=target.device)
    pairs.scatter_add_(0, target.t(), pairs.new_ones(1).expand(target.t().shape))
    pairs = pairs[:num_ranks]
    goes = pairs > 0
    # One scan over pairs and rows of all ranks, and one copy to the host.
    both = torch.cat((pairs.flatten(), goes.flatten()))
    before = both.new_zeros(len(both) + 1)
    torch.cumsum(both, dim=0, dtype=torch.int32, out=before[1:])
    borders = torch.stack((segments.borders, segments.borders + pairs.numel()))
    at_borders = before.index_select(0, borders.flatten()).view_as(borders).cpu().numpy()
    counts = np.diff(at_borders, axis=2).reshape(2, num_ranks, -1, num_ranks)
    of_pairs, of_rows = counts.transpose(0, 2, 3, 1)
    return Traffic(
        target=target,
        goes=goes,
        before=before[pairs.numel() : -1].view(num_ranks, num_tokens),
        pairs=of_pairs,
        rows=of_rows,
        first_row=at_borders[1, :, :-1:num_ranks].T,
    )


def _places(target: Tensor, segments: Segments, rank: int) -> Tensor:
    """Where the results of this rank's pairs come to lie, by chunk, then target: int32 [T, K]."""
    num_ranks = len(segments.borders)
    firsts = [chunk * num_ranks + rank for chunk in range(len(segments.spans))]
    parts = [target[segments.starts[one] : segments.starts[one + 1]] for one in firsts]
    if len(parts) == 1:
        return _rank_of_each(parts[0])
    by_chunk = torch.cat(parts) + segments.mine[0, :, None]
    return _rank_of_each(by_chunk) - (segments.mine[1, :, None] * target.shape[1]).int()


def without_dropped(pair_index: Tensor, num_results: int) -> Tensor:
    """Where results lie [T, K]; those of no pair come last, and do not exist.

    A dropped pair weighs nothing, and reads a result of its own token: no other's infinity.
    """
    if pair_index.numel() == num_results:
        return pair_index
    own = pair_index.amin(dim=1, keepdim=True)
    return torch.where(pair_index < num_results, pair_index, own)


def _rank_of_each(keys: Tensor) -> Tensor:
    """The place of each key among all in ascending order, equal ones as they stand: int32."""
    order = keys.flatten().int().argsort(stable=True)
    numbers = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return torch.empty_like(numbers).scatter_(0, order, numbers).view(keys.shape)


def _true(mask: Tensor, num_true: int) -> Tensor:
    """Where a mask [N] is True, of which the host knows how often that is."""
    return torch.nonzero_static(mask, size=num_true).flatten()
