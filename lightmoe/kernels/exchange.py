"""The exchange over arenas that all ranks address, by liblight_ops: nothing here waits for a GPU.

An arena is the same everywhere; a rank pushes its choices into all of them, pulls the hidden states
its experts need, and writes each result into the arena of its token's rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
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
        weights: Tensor | None,
        hidden: Tensor | None,
        published: int,
        ticket: Tensor,
        load: Tensor | None,
        *,
        num_tokens: int,
        num_experts: int,
        choice_offset: int,
        prefix_offset: int,
        weight_offset: int,
    ) -> None:
        """Give all ranks experts and pair_index int32 [N, K] and prefixes [C, E + 1], and meet.

        Of T tokens the first N are there, and of those the first `num_real` int32 [1], where it is
        given, are real: the others go nowhere. Up to COUNTED_PAIRS pairs need no pair_index and
        prefixes. `weights` fp32 [N, K] go with them unless they are None. hidden [N, D] is copied
        to the address `published`, unless it is None. `load` int32 [E] counts each expert's pairs.
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
            weights=address(weights),
            hidden=address(hidden),
            published=published,
            ticket=address(ticket),
            load=address(load),
            choice_offset=choice_offset,
            prefix_offset=prefix_offset,
            weight_offset=weight_offset,
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_experts_per_token=num_experts_per_token,
            num_experts=num_experts,
            num_chunks=1 if prefixes is None else len(prefixes),
            width_bytes=row_bytes,
            max_ctas=0,
        )


@dataclass(frozen=True)
class RowBlock:
    """How rows [N, D] lie where ranks read them: as they are, or int8 codes, then fp32 scales [N].

    Codes and scales are `permute_int8`'s.
    """

    num_rows: int
    width: int
    element_bytes: int
    as_int8: bool = False

    @cached_property
    def row_bytes(self) -> int:
        """Of a row, without its scale."""
        return self.width * (1 if self.as_int8 else self.element_bytes)

    @cached_property
    def scale_offset(self) -> int:
        """From the first row to the scales, in bytes; 0 where there are none."""
        return self.num_rows * self.row_bytes if self.as_int8 else 0

    @property
    def bytes_on_link(self) -> int:
        """What crosses a link with a row."""
        return self.row_bytes + (4 if self.as_int8 else 0)

    @property
    def num_bytes(self) -> int:
        """Of the whole block, a multiple of 256."""
        return -(-self.num_rows * self.bytes_on_link // 256) * 256


@dataclass(slots=True)
class Places:
    """Where pairs go: segments int32 [W, E, copies, 2] of a split, copy_ranks int32 [E, copies]."""

    segments: Tensor
    copy_ranks: Tensor

    @property
    def _fields(self) -> tuple[int, int, int, int]:
        num_experts, num_copies = self.copy_ranks.shape
        return (address(self.segments), address(self.copy_ranks), num_experts, num_copies)

    def combine(
        self,
        output: Tensor,
        results: Sequence[int],
        prefixes: int,
        choices: int,
        weights: Tensor,
        first_token: int,
        *,
        rank: int,
        together: bool,
        block: RowBlock,
        summed: bool = False,
        max_ctas: int = 0,
    ) -> None:
        """Sum the chunk's results into output [T of the chunk, D], in ascending k, in fp32.

        `weights` fp32 [T, K], `choices` and what each rank gave, at its address in `results`
        [T * K, D] as Chunk.pull says, are of all tokens of this rank; `together`: all of it is at
        this rank's own. `prefixes` are those of this rank's pairs, of the chunk; they and `choices`
        are the addresses of rows of Chunk's. With `summed` a
        rank gave the weighted sum [T, D] of each token of which it had results: these are added in
        ascending rank.
        """
        library().launch(
            "exchange_combine",
            output.device,
            results=results,
            places=self._fields,
            prefixes=prefixes,
            choices=choices,
            weights=address(weights),
            output=address(output),
            scale_offset=block.scale_offset,
            first_token=first_token,
            num_tokens=output.shape[0],
            rank=rank,
            num_experts_per_token=weights.shape[1],
            width_bytes=block.row_bytes,
            together=together,
            summed=summed,
            dtype=_DTYPES[output.dtype],
            as_int8=block.as_int8,
            max_ctas=max_ctas,
        )


@dataclass(slots=True)
class Chunk:
    """The tokens of a chunk, where their pairs go, and what ranks shared.

    `counts` of each rank's tokens from its `begins` on. `choices` int32 [W, S] are all ranks', with
    room for S; `prefixes` int32 [W, E + 1] the prefix sums of each rank's pairs per expert.
    """

    begins: Sequence[int]
    counts: Sequence[int]
    places: Places
    choices: Tensor
    prefixes: Tensor
    rank: int
    num_experts_per_token: int

    @property
    def _fields(self) -> tuple[object, ...]:
        return (
            self.begins,
            self.counts,
            self.places._fields,
            address(self.choices),
            self.choices.shape[1],
            self.rank,
            self.num_experts_per_token,
        )

    def pull(
        self,
        rows: Tensor,
        hidden_addresses: Sequence[int],
        *,
        block: RowBlock,
        weights: Tensor | None = None,
        pair_weight: Tensor | None = None,
        results: Sequence[int] = (),
        output_rows: Tensor | None = None,
        max_ctas: int = 0,
    ) -> None:
        """Fill rows [P, D], those of all pairs that this rank computes, and what goes with them.

        `weights` fp32 [W, S] are all ranks', for pair_weight [P]. `results` are where each rank
        wants those of its tokens [T * K, D], a chunk's by expert, then position, for output_rows
        int64 [P]: the address for each pair's.
        """
        library().launch(
            "exchange_pull",
            rows.device,
            hidden=hidden_addresses,
            results=results,
            chunk=self._fields,
            weights=address(weights),
            pair_weight=address(pair_weight),
            output_rows=address(output_rows),
            prefixes=address(self.prefixes),
            rows=address(rows),
            scale_offset=block.scale_offset,
            width_bytes=block.row_bytes,
            dtype=_DTYPES[rows.dtype],
            as_int8=block.as_int8,
            max_ctas=max_ctas,
        )

    def sum(
        self, pairs: Tensor, sums: Sequence[int], *, block: RowBlock, max_ctas: int = 0
    ) -> None:
        """Add up each token's weighted results among pairs [P, D], in ascending k, in fp32.

        The sums go to `sums`, the address of a block for each rank's tokens; tokens without
        results here leave theirs as it is.
        """
        library().launch(
            "exchange_sum",
            pairs.device,
            pairs=address(pairs),
            sums=sums,
            chunk=self._fields,
            scale_offset=block.scale_offset,
            width_bytes=pairs.shape[1] * pairs.element_size(),
            dtype=_DTYPES[pairs.dtype],
            as_int8=block.as_int8,
            max_ctas=max_ctas,
        )

    def count(self, sent: Tensor, *, summed: bool) -> None:
        """Add to int64 [2, W] the rows, and the results or sums, that this rank sends to each."""
        library().launch(
            "exchange_count",
            sent.device,
            chunk=self._fields,
            rows_sent=address(sent[0]),
            results_sent=address(sent[1]),
            summed=summed,
        )


def give(pairs: Tensor, output_rows: Tensor, count: Tensor, max_ctas: int = 0) -> None:
    """Copy the first `count`, int32 [1] on the device, of pairs [P, D] to addresses int64 [P]."""
    library().launch(
        "exchange_give",
        pairs.device,
        pairs=address(pairs),
        output_rows=address(output_rows),
        num_pairs=address(count),
        most_pairs=len(pairs),
        width_bytes=pairs.shape[1] * pairs.element_size(),
        max_ctas=max_ctas,
    )


def publish_int8(hidden: Tensor, published: int, block: RowBlock) -> None:
    """Write hidden [N, D] as int8 into the block at an address."""
    library().launch(
        "permute_int8",
        hidden.device,
        rows=address(hidden),
        row_index=0,
        output=published,
        scales=published + block.scale_offset,
        num_rows=len(hidden),
        width=block.width,
        dtype=_DTYPES[hidden.dtype],
        max_ctas=0,
    )
