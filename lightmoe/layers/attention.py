"""Attention over a paged KV cache, each sequence by itself.

Data parallel: a rank holds the cache of its own sequences only. SDPA runs once per sequence over
its gathered pages, so that the bits of one sequence never depend on its neighbours.

Shapes: T tokens on this rank, H heads, N tokens of one sequence in this step, M positions so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightmoe.layers.basic import Linear, RMSNorm, rotate


class KVCache:
    """Keys and values of one rank in blocks: [L, blocks, block size, heads, width] each.

    The two widths need not be equal; a model that finds its values in the keys has value width 0.
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
        shape = (num_layers, num_blocks, block_size, num_heads)
        # Pages that no sequence has touched cost no memory on a CPU.
        self.keys = torch.empty(*shape, key_width, dtype=dtype, device=device)
        self.values = torch.empty(*shape, value_width, dtype=dtype, device=device)
        self.block_size = block_size


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence in a step: rows begin .. end, which see `num_positions` positions."""

    begin: int
    end: int
    num_positions: int
    blocks: Tensor  # [blocks of the sequence]
    mask: Tensor | None  # [N, M] bool, None where every position is seen


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention of every layer needs to know of a step, made once.

    `cache_rows` [T] is where each token's key goes; `rotary` the tables of its positions.
    """

    cache: KVCache
    cache_rows: Tensor
    rotary: tuple[Tensor, Tensor]
    sequences: tuple[SequenceView, ...]


def causal_mask(num_tokens: int, num_positions: int, device: torch.device) -> Tensor | None:
    """The last `num_tokens` of `num_positions` see what came before them; None for one token."""
    if num_tokens == 1:
        return None
    mask = torch.ones(num_tokens, num_positions, dtype=torch.bool, device=device)
    return mask.tril(num_positions - num_tokens)


class Attention:
    """Grouped-query attention with rotary positions, and query and key norms where given."""

    def __init__(
        self,
        layer: int,
        query: Linear,
        key: Linear,
        value: Linear,
        output: Linear,
        head_dim: int,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self._layer = layer
        self._query, self._key, self._value, self._output = query, key, value, output
        self._head_dim = head_dim
        self._query_norm, self._key_norm = query_norm, key_norm

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """[T, D] -> [T, D]; writes this step's keys and values into the cache."""
        query = self._query(hidden).unflatten(1, (-1, self._head_dim))  # [T, H, head_dim]
        key = self._key(hidden).unflatten(1, (-1, self._head_dim))  # [T, KV heads, head_dim]
        value = self._value(hidden).unflatten(1, (-1, self._head_dim))
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        query, key = rotate(query, step.rotary), rotate(key, step.rotary)
        keys, values = step.cache.keys[self._layer], step.cache.values[self._layer]
        keys.flatten(0, 1).index_copy_(0, step.cache_rows, key)
        values.flatten(0, 1).index_copy_(0, step.cache_rows, value)
        attended = torch.empty_like(query)
        for sequence in step.sequences:
            attended[sequence.begin : sequence.end] = _attend(query, keys, values, sequence)
        return self._output(attended.flatten(1))


def _attend(query: Tensor, keys: Tensor, values: Tensor, sequence: SequenceView) -> Tensor:
    """One sequence's tokens over its pages: -> [N, H, head_dim]."""
    seen = sequence.num_positions
    past_keys = keys[sequence.blocks].flatten(0, 1)[:seen]  # [M, KV heads, head_dim]
    past_values = values[sequence.blocks].flatten(0, 1)[:seen]
    attended = scaled_dot_product_attention(
        query[sequence.begin : sequence.end].transpose(0, 1).unsqueeze(0),
        past_keys.transpose(0, 1).unsqueeze(0),
        past_values.transpose(0, 1).unsqueeze(0),
        attn_mask=sequence.mask,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)
