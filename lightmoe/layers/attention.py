"""Attention over a paged KV cache, each sequence by itself.

Data parallel: a rank holds the cache of its own sequences only. SDPA runs over one sequence's
gathered pages, QUERY_ROWS positions at a time, at fixed borders and padded: so the bits of a
position depend neither on other sequences nor on how a prompt was cut, nor on whether the position
was decoded or, after a preemption, computed again as part of a prompt. That is `AttendOneByOne`;
batched_attention.py has the other way, for GPUs.

Shapes: T tokens on this rank, H heads, N tokens of one sequence in this step, M positions so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightmoe import kernels
from lightmoe.layers.basic import Linear, RMSNorm

QUERY_ROWS = 8
"""Positions that one SDPA call serves. Each call costs a launch, each padded row some work."""


class KVCache:
    """Keys and values of one rank in blocks: [L, blocks + 1, block size, heads, width] each.

    The last block is no sequence's: it is for rows that nobody reads. The two widths need not be
    equal; a model that finds its values in the keys has value width 0.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        key_width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert block_size % QUERY_ROWS == 0, "the last page must hold the padded positions"
        shape = (num_layers, num_blocks + 1, block_size, num_heads)
        # Pages that no sequence has touched cost no memory on a CPU.
        self.keys = torch.empty(*shape, key_width, dtype=dtype, device=device)
        self.values = torch.empty(*shape, value_width, dtype=dtype, device=device)
        self.keys[:, num_blocks:], self.values[:, num_blocks:] = 0, 0
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.scratch_row = num_blocks * block_size


class Attend(Protocol):
    """The queries of a step, each over its own sequence's cache."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
    ) -> Tensor:
        """[T, H, width] over one layer's pages [blocks, block size, KV heads, width] each
        -> [T, H, value width]; scores are multiplied with `scale`, None: 1 / sqrt(width)."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence in a step: rows begin .. end, which end at position `num_positions`.

    `masks` has one [QUERY_ROWS, positions it sees] for each group of QUERY_ROWS positions that
    the rows fall into: 0 where a query sees a position, -inf where not.
    """

    begin: int
    end: int
    num_positions: int
    blocks: Tensor  # [blocks of the sequence]
    masks: tuple[Tensor, ...]


def view_sequence(
    begin: int, end: int, num_positions: int, blocks: Tensor, dtype: torch.dtype
) -> SequenceView:
    """The view of rows begin .. end of a step as the last of `num_positions` positions."""
    first = num_positions - (end - begin)
    starts = range(first - first % QUERY_ROWS, num_positions, QUERY_ROWS)
    masks = tuple(_causal_mask(start, dtype, blocks.device) for start in starts)
    return SequenceView(begin, end, num_positions, blocks, masks)


def _causal_mask(start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Queries at positions start .. start + QUERY_ROWS see what is not after them."""
    mask = torch.full((QUERY_ROWS, start + QUERY_ROWS), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(start + 1)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention of every layer needs to know of a step, made once.

    `cache_rows` [T] is where each token's key goes; `rotary` the tables of its positions.
    """

    cache: KVCache
    cache_rows: Tensor
    rotary: tuple[Tensor, Tensor]
    attend: Attend


class Attention:
    """Grouped-query attention with rotary positions, and query and key norms where given.

    `query_key_value` is one product, [T, D] -> [T, (H + 2 KV heads) x head_dim]; the cache says how
    wide a head is and how many have keys. `norms` are those of queries and of keys.
    """

    def __init__(
        self,
        layer: int,
        query_key_value: Linear,
        output: Linear,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> None:
        self._layer = layer
        self._query_key_value, self._output = query_key_value, output
        self._norm_weights, self._epsilon = None, 0.0
        if norms is not None:
            query_norm, key_norm = norms
            assert query_norm.epsilon == key_norm.epsilon, "the kernel takes one"
            self._norm_weights = (query_norm.weight, key_norm.weight)
            self._epsilon = query_norm.epsilon

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """[T, D] -> [T, D]; writes this step's keys and values into the cache."""
        keys, values = step.cache.keys[self._layer], step.cache.values[self._layer]
        query = kernels.rotary_cache(
            self._query_key_value(hidden),
            step.rotary,
            step.cache_rows,
            keys,
            values,
            self._norm_weights,
            self._epsilon,
        )
        return self._output(step.attend(query, keys, values).flatten(1))


class AttendOneByOne:
    """Every sequence by itself, in padded groups of QUERY_ROWS positions."""

    def __init__(self, sequences: tuple[SequenceView, ...]) -> None:
        self._sequences = sequences

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
    ) -> Tensor:
        """As `Attend` says."""
        parts = []
        for sequence in self._sequences:
            past_keys = gather(keys, sequence)
            past_values = past_keys if values is keys else gather(values, sequence)
            rows = query[sequence.begin : sequence.end]
            parts.append(attend(rows, past_keys, past_values, sequence, scale))
        return torch.cat(parts)


def gather(pages: Tensor, sequence: SequenceView) -> Tensor:
    """A sequence's cache in order, with zeros up to a multiple of QUERY_ROWS: -> [M padded, ...].

    Zeros, because what a page holds beyond the last position may be another request's, and a NaN
    there would get through any mask.
    """
    past = pages[sequence.blocks].flatten(0, 1)
    past[sequence.num_positions :] = 0
    return past[: -(-sequence.num_positions // QUERY_ROWS) * QUERY_ROWS]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: SequenceView,
    scale: float | None = None,
) -> Tensor:
    """One sequence's queries over its gathered cache.

    [N, H, width], [M padded, KV heads, width], [M padded, KV heads, value width]
    -> [N, H, value width]
    """
    num_tokens = len(query)
    lead = (sequence.num_positions - num_tokens) % QUERY_ROWS
    padded = query.new_zeros(len(sequence.masks) * QUERY_ROWS, *query.shape[1:])
    padded[lead : lead + num_tokens] = query
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    groups = [
        scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys[:, :, : mask.shape[1]],
            values[:, :, : mask.shape[1]],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        for queries, mask in zip(padded.split(QUERY_ROWS), sequence.masks, strict=True)
    ]
    return torch.cat(groups, dim=2).squeeze(0).transpose(0, 1)[lead : lead + num_tokens]
