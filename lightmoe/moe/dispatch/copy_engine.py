"""Experts spread over GPUs whose memory, or pinned host memory, all ranks' kernels address.

No host takes part in a step: choices are pushed to all ranks, every rank computes the same route on
its device and pulls the rows of the pairs that are its own, and the experts' last product writes
each result where its token's rank adds it up. So results take no multiprocessors from the experts,
nothing needs a size on the host, and a step may be one CUDA graph.

Who may overwrite what, and when, is in peer_lane.py; what lies where in arena.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.distributed.peers import Road
from lightmoe.kernels.exchange import COUNTED_PAIRS, Chunk, Places
from lightmoe.moe.dispatch.base import Dispatcher, ExpertGroup, Receipt, TokensPerTile
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.peer_receipt import ChunkOfStep, PeerReceipt, Step
from lightmoe.moe.gate import Choice
from lightmoe.moe.overlap_model import MAX_CHUNKS
from lightmoe.telemetry.trace import span

_OPERATIONS_PER_BYTE: dict[Road, float] = {"ipc": 2200.0, "host": 40_000.0}
"""989 TFLOP/s of H100 and H200, and 450 GB/s over NVLink, or the 25 GB/s that each of four cards
has of the host's memory where all of them write to it."""


class CopyEngineDispatcher(Dispatcher):
    """The transport of GPUs: over NVLink, or through pinned memory of the host."""

    def __init__(
        self, group: ExpertGroup, layer: int, lane: PeerLane, tokens_per_tile: TokensPerTile
    ) -> None:
        self.stream, self.beside = lane.stream, lane.beside
        self.combines_here = lane.combines_here
        stays = lane.layout.summed
        self.operations_per_byte = 0.0 if stays else _OPERATIONS_PER_BYTE[lane.memory.road]
        self._group = group
        self._layer = layer
        self._lane = lane
        self._tokens_per_tile = tokens_per_tile
        self._load: Tensor | None = None
        self._tables = group.tables_on(lane.rows.device)
        # They stay where they are when a placement changes.
        self._slots = self._tables.slots[layer]
        self._copy_ranks = self._tables.copy_ranks[layer]

    def most_tokens(self, hidden: Tensor) -> int:
        """Tokens of the fullest rank in this step."""
        return max(self._group.tokens_per_rank)

    def publish(self, hidden: Tensor, num_chunks: int = 1) -> None:
        """These are the hidden states [T, D] of the next route, which is in so many chunks."""
        with span("dispatch", self._layer):  # uploads are communication
            self._lane.publish(hidden, num_chunks)

    def counts_into(self, load: Tensor) -> bool:
        """The kernel that shares the choices counts them, too."""
        self._load = load
        return True

    def route(self, choice: Choice, num_chunks: int) -> list[PeerReceipt]:
        """Exchange the choices of all ranks, then route each chunk by its own counts."""
        assert num_chunks <= MAX_CHUNKS, "arenas have room for the prefixes of so many"
        group, lane = self._group, self._lane
        num_tokens = group.tokens_per_rank[group.rank]
        experts = choice.experts.to(torch.int32)
        num_rows, per_token = experts.shape
        step = lane.step(group.tokens_per_rank, num_chunks, num_rows, group.in_halves)
        if num_chunks == 1 and num_tokens * per_token <= COUNTED_PAIRS:
            prefixes = pair_index = None
        else:
            assert num_rows == num_tokens, "only small steps are padded"
            prefixes, pair_index = kernels.sort_chunks(
                experts, lane.layout.num_experts, step.tokens
            )
        lane.share(
            experts,
            choice.weights,
            num_tokens,
            num_chunks,
            pair_index,
            prefixes,
            group.num_real,
            self._load,
        )
        return self._receipts(step)

    def _receipts(self, step: Step) -> list[PeerReceipt]:
        num_held = self._tables.num_held[self._layer]
        chunks, expected = step.to_split(self._group.route, num_held, self._tokens_per_tile)
        splits = kernels.route_chunks(
            step.prefixes,
            self._copy_ranks,
            self._slots,
            chunks,
            rank=self._group.rank,
            nearness=self._tables.nearness,
        )
        return list(map(self._receipt, step.chunks, splits, expected))

    def _receipt(
        self, chunk: ChunkOfStep, split: kernels.RouteSplit, expected: tuple[int, int]
    ) -> PeerReceipt:
        group, lane = self._group, self._lane
        lane.pair_counter.note(self._layer, split.groups.offsets)
        return PeerReceipt(
            tokens=chunk.tokens,
            groups=split.groups,
            expected=expected,
            pair_weight=chunk.pair_weight,
            output_rows=chunk.output_rows,
            chunk=Chunk(
                chunk.begins,
                chunk.counts,
                Places(split.segments, self._copy_ranks),
                lane.choices,
                chunk.prefixes,
                group.rank,
                lane.layout.num_experts_per_token,
            ),
            step=chunk,
        )

    def dispatch(self, hidden: Tensor, receipt: Receipt) -> Tensor:
        """The row of every pair that this rank computes, from wherever its token is: [P, D]."""
        assert isinstance(receipt, PeerReceipt)
        self._lane.pull(receipt)
        return receipt.step.rows

    def output_of(self, receipt: Receipt) -> Tensor | None:
        """Where the experts write results that stay here; None: the receipt has their addresses."""
        assert isinstance(receipt, PeerReceipt)
        return receipt.step.pairs

    def combine(
        self, pairs: Tensor, weights: Tensor, receipt: Receipt, output: Tensor | None = None
    ) -> Tensor:
        """The sum of each token's results, once all ranks have given theirs."""
        if output is None:
            num_tokens = receipt.tokens.stop - receipt.tokens.start
            output = pairs.new_empty(num_tokens, pairs.shape[1])
        self.combine_all([pairs], weights, [receipt], [output])
        return output

    def combine_all(
        self,
        pairs: Sequence[Tensor],
        weights: Tensor,
        receipts: Sequence[Receipt],
        outputs: Sequence[Tensor],
    ) -> None:
        """combine of chunks whose results have all been computed: the ranks meet once."""
        lane = self._lane
        for given, receipt in zip(pairs, receipts, strict=True):
            assert isinstance(receipt, PeerReceipt)
            lane.give(receipt, given)
        lane.meet()
        for receipt, output in zip(receipts, outputs, strict=True):
            assert isinstance(receipt, PeerReceipt)
            lane.add_up(receipt, weights, output)
