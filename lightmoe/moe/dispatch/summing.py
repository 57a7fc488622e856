"""copy_engine with fewer bytes on the links, for answers that may depend on the placement.

The ranks share their routing weights, too. A rank applies them in its experts' second product, adds
up what it has for each token, and gives its rank one sum a (token, rank), not one result a pair.
As int8 hidden states and sums travel as codes with one scale a row. So do a rank's own, which stay
in its own memory: a row is the same wherever its token's experts lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightmoe.kernels.exchange import publish_int8
from lightmoe.kernels.library import address
from lightmoe.moe.dispatch.arena import view_arena
from lightmoe.moe.dispatch.peer_lane import PeerLane
from lightmoe.moe.dispatch.peer_receipt import PeerReceipt


class SummingLane(PeerLane):
    """One rank's end of the arenas where ranks give sums, not results."""

    def _open_results(self) -> None:
        """Results stay here; and here is what a rank gives itself, if the arena is the host's."""
        layout, device = self.layout, self.rows.device
        self._pair_weight = torch.empty(layout.max_pairs, dtype=torch.float32, device=device)
        shape, begin = (layout.num_ranks, layout.choice_stride), layout.offsets["weights"]
        self._arena_weights = view_arena(self.memory.arena, begin, shape, torch.float32)
        self._weights = self._arena_weights.to(device)  # the same, where that is on the card
        own_bytes = 0 if self._on_card else layout.block.num_bytes
        self.own_results = torch.empty(own_bytes, dtype=torch.uint8, device=device)
        block = self.memory.arena[layout.offsets["hidden"] :][: layout.block.num_bytes]
        self._own_block = block if self._on_card else torch.empty_like(block, device=device)
        self._pairs = torch.empty_like(self.rows)
        begin = self.rank * layout.block.num_bytes
        self._sum_addresses = self._with_own(self._addresses("results", begin))

    @property
    def shared_weights(self) -> Tensor:
        """The routing weights of all ranks, fp32 [W, S]."""
        return self._weights

    def pair_weight_of(self, first_pair: int, num_pairs: int) -> Tensor:
        """Where the weights [P] of a chunk's pairs come to lie."""
        return self._pair_weight[first_pair:][:num_pairs]

    def output_rows_of(self, first_pair: int, num_pairs: int) -> Tensor | None:
        """None: results stay here."""
        return None

    def pairs_of(self, first_pair: int, num_pairs: int) -> Tensor:
        """Where a chunk's results go: [P, D]."""
        return self._pairs[first_pair:][:num_pairs]

    def _put_on_card(self, hidden: Tensor) -> Tensor | None:
        """Put hidden states into this card's arena; returned if that is to be done yet."""
        if not self.layout.as_int8:
            return super()._put_on_card(hidden)
        self._write_codes(hidden)
        return None

    def _parts_to_upload(self, hidden: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What goes where in the host's arena, each a row a token."""
        if not self.layout.as_int8:
            return super()._parts_to_upload(hidden)
        self._write_codes(hidden)
        return self._codes_and_scales

    def _write_codes(self, hidden: Tensor) -> None:
        self._read_own(self._own_block)
        publish_int8(hidden, address(self._own_block), self.layout.block)

    @cached_property
    def _codes_and_scales(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Those of this rank's memory, and of the arena: uint8 [max_tokens, bytes of a row]."""
        block, offset = self.layout.block, self.layout.offsets["hidden"]
        arena, here = self.memory.arena[offset:], self._own_block
        parts = []
        for first, row_bytes in ((0, block.row_bytes), (block.scale_offset, 4)):
            shape = (self.layout.max_tokens, row_bytes)
            source, target = (view_arena(at, first, shape, torch.uint8) for at in (here, arena))
            parts.append((source, target))
        return parts

    def _have_shared(self, num_chunks: int) -> None:
        super()._have_shared(num_chunks)
        if not self._on_card:
            self._weights.copy_(self._arena_weights, non_blocking=True)

    def give(self, receipt: PeerReceipt, pairs: Tensor) -> None:
        """Sum what is here for each token, and give it."""
        here = receipt.step.pairs
        assert here is not None, "results stay here"
        receipt.chunk.sum(
            here,
            self._sum_addresses,
            block=self.layout.block,
            max_ctas=receipt.step.combine_ctas,
        )
