"""The exchange over arenas that all ranks address, by liblight_ops: nothing here waits for a GPU.

An arena is the same everywhere; a rank pushes its choices into all of them, pulls the hidden states
its experts need, and pulls the results of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.kernels.library import address, library

MAX_RANKS = 64
MAX_TOKENS = 1 << 20
COUNTED_PAIRS = 1024
"""So many pairs may be shared without being sorted before."""

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True)
class Flags:
    """Where ranks meet: one flag a rank in every arena, uint32 [W] at `offset`.

    `counter` int32 [1] counts the rounds. Past the timeout of a round `failure`, one int32 in
    pinned memory, is the late rank's number + 1, and no later round waits for anyone.
    """

    addresses: Sequence[int]
    offset: int
    rank: int
    counter: Tensor
    failure: Tensor
    timeout_seconds: float

    @property
    def _fields(self) -> tuple[Sequence[int], int, int, int, int, int]:
        return (
            self.addresses,
            self.offset,
            address(self.counter),
            address(self.failure),
            int(self.timeout_seconds * 1e9),
            self.rank,
        )

    def meet(self) -> None:
        """Announce what was enqueued before, and let the stream wait for every rank's own."""
        library().launch("exchange_meet", self.counter.device, flags=self._fields)

    def share(
        self,
        experts: Tensor,
        pair_index: Tensor | None,
        prefixes: Tensor | None,
        num_real: Tensor | None,
        hidden: Tensor | None,
        published: int,
        ticket: Tensor,
        *,
        num_tokens: int,
        num_experts: int,
        choice_offset: int,
        prefix_offset: int,
    ) -> None:
        """Give all ranks experts and pair_index int32 [N, K] and prefixes [C, E + 1], and meet.

        Of T tokens the first N are there, and of those the first `num_real` int32 [1], where it is
        given, are real: the others go nowhere. Up to COUNTED_PAIRS pairs need no pair_index and
        prefixes. hidden [N, D] is copied to the address `published`, unless it is None.
        """
        num_rows, num_experts_per_token = experts.shape
        row_bytes = 16 if hidden is None else hidden.shape[1] * hidden.element_size()
        library().launch(
            "exchange_share",
            experts.device,
            flags=self._fields,
            experts=address(experts),
            pair_index=address(pair_index),
            prefixes=address(prefixes),
            num_real=address(num_real),
            hidden=address(hidden),
            published=published,
            ticket=address(ticket),
            choice_offset=choice_offset,
            prefix_offset=prefix_offset,
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_experts_per_token=num_experts_per_token,
            num_experts=num_experts,
            num_chunks=1 if prefixes is None else len(prefixes),
            width_bytes=row_bytes,
            max_ctas=0,
        )


@dataclass(frozen=True)
class Places:
    """Where pairs go: segments int32 [W, E, copies, 2] of a split, copy_ranks int32 [E, copies]."""

    segments: Tensor
    copy_ranks: Tensor

    @property
    def _fields(self) -> tuple[int, int, int, int]:
        num_experts, num_copies = self.copy_ranks.shape
        return (address(self.segments), address(self.copy_ranks), num_experts, num_copies)

    def pull(
        self,
        rows: Tensor,
        hidden_addresses: Sequence[int],
        spans: Sequence[slice],
        choices: int,
        choice_stride: int,
        *,
        rank: int,
        num_experts_per_token: int,
        on_cards: bool,
        max_ctas: int = 0,
    ) -> None:
        """Fill rows [P, D], those of all pairs that this rank computes.

        `spans` are the chunk's tokens on each rank; `choices` is the address of all ranks' shared
        choices, `choice_stride` of them a rank. `on_cards`: hidden states of other ranks are in
        their cards' memory, not in the host's.
        """
        library().launch(
            "exchange_pull",
            rows.device,
            hidden=hidden_addresses,
            begin=[span.start for span in spans],
            count=[span.stop - span.start for span in spans],
            places=self._fields,
            choices=choices,
            rows=address(rows),
            choice_stride=choice_stride,
            rank=rank,
            num_experts_per_token=num_experts_per_token,
            width_bytes=rows.shape[1] * rows.element_size(),
            on_cards=on_cards,
            max_ctas=max_ctas,
        )

    def combine(
        self,
        output: Tensor,
        pair_addresses: Sequence[int],
        choices: int,
        weights: Tensor,
        first_token: int,
        *,
        rank: int,
        on_cards: bool,
        max_ctas: int = 0,
    ) -> None:
        """Sum the chunk's results into output [T of the chunk, D], in ascending k, in fp32.

        `weights` fp32 [T, K] and `choices` are of all tokens of this rank.
        """
        library().launch(
            "exchange_combine",
            output.device,
            pairs=pair_addresses,
            places=self._fields,
            choices=choices,
            weights=address(weights),
            output=address(output),
            first_token=first_token,
            num_tokens=len(output),
            rank=rank,
            num_experts_per_token=weights.shape[1],
            width_bytes=output.shape[1] * output.element_size(),
            on_cards=on_cards,
            dtype=_DTYPES[output.dtype],
            max_ctas=max_ctas,
        )
