"""Attention over a paged KV cache, many sequences in one SDPA call: the road of GPUs.

All sequences that decode run together, a prompt's chunk by itself. The bits of a position still
depend on that position only, because one kernel serves all calls (`one_kernel`): memory-efficient
attention (Rabe and Staats 2021) walks the keys in tiles from the first position on, each query row
for itself, and a tile that a row must not see leaves its sums as they were, exactly.

Shapes: B sequences of a group, N queries of each, M positions that are gathered, H heads, G query
heads that share a KV head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightmoe.kernels.checks import is_native
from lightmoe.layers.attention import KVCache


def one_kernel(cache: KVCache) -> AbstractContextManager[None]:
    """While it holds, SDPA over a cache that is read this way is the same kernel for all shapes."""
    if not is_native(cache.keys):
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    return context


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries that one SDPA call serves: one of each of B sequences, or N of a single one.

    `past_rows` [B x M] are the cache's rows of positions 0, 1, ...; its zero row beyond the last.
    `bias` [B, 1, N, M] is 0 where a query sees a position, -inf where not.
    """

    tokens: slice
    past_rows: Tensor
    bias: Tensor


def group_queries(
    tokens: slice, positions: Tensor, block_tables: Tensor, cache: KVCache
) -> QueryGroup:
    """The group of the step's rows `tokens`, at `positions` [B, N], of sequences whose blocks are
    `block_tables` [B, blocks], padded with any block."""
    offsets = torch.arange(cache.block_size, device=positions.device)
    rows = (block_tables[:, :, None] * cache.block_size + offsets).flatten(1)  # [B, M]
    seen = torch.arange(rows.shape[1], device=positions.device) <= positions[:, :, None]
    # What a page holds beyond the last position may be another request's, and a NaN there would
    # get through any mask.
    rows = torch.where(seen[:, -1], rows, cache.zero_row)
    bias = torch.where(seen, 0.0, float("-inf")).to(cache.keys.dtype)
    return QueryGroup(tokens, rows.flatten(), bias[:, None])


class AttendTogether:
    """`Attend` over groups that cover the rows of a step in order."""

    def __init__(self, groups: tuple[QueryGroup, ...]) -> None:
        self.groups = groups

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
    ) -> Tensor:
        """As `Attend` says."""
        parts = [_attend_group(query, keys, values, group, scale) for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_group(
    query: Tensor, keys: Tensor, values: Tensor, group: QueryGroup, scale: float | None
) -> Tensor:
    num_sequences, _, num_queries, _ = group.bias.shape
    past_keys = _gather(keys, group.past_rows, num_sequences)  # [B, KV heads, M, width]
    past_values = past_keys if values is keys else _gather(values, group.past_rows, num_sequences)
    rows = query[group.tokens].unflatten(1, (past_keys.shape[1], -1))  # [B x N, KV heads, G, width]
    if num_queries == 1:
        # The G heads over one KV head are queries beside each other: no copy of keys for each.
        attended = scaled_dot_product_attention(
            rows, past_keys, past_values, attn_mask=group.bias, scale=scale
        )
        return attended.flatten(1, 2)
    # A single sequence: the G heads are its batch, over keys that are there once.
    num_shared = rows.shape[2]
    attended = scaled_dot_product_attention(
        rows.permute(2, 1, 0, 3),
        past_keys.expand(num_shared, -1, -1, -1),
        past_values.expand(num_shared, -1, -1, -1),
        attn_mask=group.bias,
        scale=scale,
    )
    return attended.permute(2, 1, 0, 3).flatten(1, 2)


def _gather(pages: Tensor, past_rows: Tensor, num_sequences: int) -> Tensor:
    """[blocks, block size, KV heads, width] -> [B, KV heads, M, width]."""
    past = pages.flatten(0, 1).index_select(0, past_rows)
    gathered: Tensor = past.unflatten(0, (num_sequences, -1))
    return gathered.transpose(1, 2)
