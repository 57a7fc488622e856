"""Attention over a paged KV cache, all sequences of a step in one launch: the road of GPUs.

The kernels read the pages where they lie. A position's bits depend on what it sees only, whichever
sequences run beside it and however its own was cut (cute_kernels/paged_attention.cu).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightmoe.kernels import paged_attention


@dataclass(frozen=True, slots=True)
class AttendTogether:
    """`Attend` over the queries of B sequences, which follow each other in the step.

    All tensors are int32: `block_tables` [B, blocks], padded with any block; `query_starts`
    [B + 1], the first row of each sequence and the end of all; `lengths` [B], positions with those
    of this step. They are read when attention runs: a recorded graph replays with what they hold
    then, of up to `max_queries` rows of a sequence.
    """

    block_tables: Tensor
    query_starts: Tensor
    lengths: Tensor
    max_queries: int

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
    ) -> Tensor:
        """As `Attend` says."""
        tables = (self.block_tables, self.query_starts, self.lengths)
        return paged_attention(query, keys, values, *tables, scale, max_queries=self.max_queries)
