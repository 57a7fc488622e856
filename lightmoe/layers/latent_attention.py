"""Multi-head latent attention (DeepSeek-V2) over a paged cache of latents.

What is cached of a position is one latent for all heads and one rotary key. Keys and values are
never expanded: the key matrix of each head is applied to its query instead, and the value matrix
to what attention gathers. So all heads attend over the same rows, whose first R columns are the
values as well.

Shapes: T tokens on this rank, H heads, R width of a latent, P width of the rotary key, M positions
so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightmoe.kernels import rotate
from lightmoe.layers.attention import AttentionStep
from lightmoe.layers.basic import HeadLinear, Linear, RMSNorm, halves_from_pairs


class LatentAttention:
    """Attention whose cache holds R + P elements a position, whatever the number of heads.

    | argument | meaning |
    |---|---|
    | query | [T, D] -> [T, H x (width without positions + P)] |
    | compress | [T, D] -> [T, R + P], the latent before its norm and the rotary key |
    | keys, values | [H, R, width without positions] and [H, value width, R] |
    | score_scale | what scores are multiplied with before softmax |
    """

    def __init__(
        self,
        layer: int,
        query: Callable[[Tensor], Tensor],
        compress: Linear,
        latent_norm: RMSNorm,
        keys: HeadLinear,
        values: HeadLinear,
        output: Linear,
        score_scale: float,
    ) -> None:
        self._layer = layer
        self._query, self._compress, self._latent_norm = query, compress, latent_norm
        self._keys, self._values, self._output = keys, values, output
        self._score_scale = score_scale

    def __call__(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        """[T, D] -> [T, D]; writes this step's latents and rotary keys into the cache."""
        cache = step.cache.keys[self._layer]  # [blocks, block size, 1, R + P]
        cache.flatten(0, 2).index_copy_(0, step.cache_rows, self._cache_entries(hidden, step))
        query = self._latent_queries(hidden, step)  # [T, H, R + P]
        # Latents are the values as well. P columns too many cost less than a copy of the rest, and
        # a GPU then reads what are keys and values once.
        attended = step.attend(query, cache, cache, self._score_scale)
        attended = attended[..., : self._values.input_width]
        return self._output(self._values(attended).flatten(1))

    def _cache_entries(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        compressed = self._compress(hidden)
        latent = self._latent_norm(compressed[:, : self._values.input_width])
        rotary_key = halves_from_pairs(compressed[:, None, self._values.input_width :])
        return torch.cat([latent, rotate(rotary_key, step.rotary).squeeze(1)], dim=-1)  # [T, R + P]

    def _latent_queries(self, hidden: Tensor, step: AttentionStep) -> Tensor:
        query = self._query(hidden).unflatten(1, (self._keys.num_heads, -1))
        plain = query[..., : self._keys.input_width]
        rotary = halves_from_pairs(query[..., self._keys.input_width :])
        return torch.cat([self._keys(plain), rotate(rotary, step.rotary)], dim=-1)
