"""The operators of a model. Each takes the road of its tensors: float16 and bfloat16 on a GPU go to
liblight_ops, everything else to `reference`, the specification. There both modes of `deterministic`
are one: row-invariant.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.checks import is_native
from lightmoe.kernels.grouped_gemm import grouped_gemm as _grouped_gemm
from lightmoe.kernels.grouped_gemm import plan_weights
from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.matmul import matmul as _matmul
from lightmoe.kernels.quant_gemm import plan_quantized
from lightmoe.kernels.quant_gemm import quant_gemm as _quant_gemm
from lightmoe.kernels.reference import (
    QuantizedMatrix,
    combine,
    permute,
    route_tokens,
    sort_pairs,
    swiglu,
    topk_gate,
)

__all__ = [
    "PairGroups",
    "QuantizedMatrix",
    "combine",
    "equal_groups",
    "grouped_gemm",
    "matmul",
    "permute",
    "quant_gemm",
    "route_tokens",
    "sort_pairs",
    "swiglu",
    "tokens_per_tile",
    "topk_gate",
]


def matmul(
    rows: Tensor,
    weight: Tensor,
    *,
    swiglu: bool = False,
    output_float32: bool = False,
    deterministic: bool = True,
) -> Tensor:
    """rows @ weight.T: [R, D] x [N, D] -> [R, N], with `swiglu` silu(gate) * up [R, N / 2]."""
    if is_native(rows):
        return _matmul(
            rows,
            weight,
            swiglu=swiglu,
            output_float32=output_float32,
            deterministic=deterministic,
        )
    return reference.matmul(rows, weight, swiglu=swiglu, output_float32=output_float32)


def grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    swiglu: bool = False,
    pair_weight: Tensor | None = None,
    max_ctas: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """Products of sorted pairs, each with its group's slot: [R, D] x [S, N, D] -> [P, N].

    More in reference.grouped_gemm; `max_ctas` bounds the multiprocessors used on a GPU.
    """
    if is_native(rows):
        return _grouped_gemm(
            rows,
            weights,
            groups,
            row_index,
            swiglu=swiglu,
            pair_weight=pair_weight,
            max_ctas=max_ctas,
            deterministic=deterministic,
        )
    return reference.grouped_gemm(
        rows, weights, groups, row_index, swiglu=swiglu, pair_weight=pair_weight
    )


def quant_gemm(
    rows: Tensor,
    experts: QuantizedMatrix,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    pair_weight: Tensor | None = None,
    max_ctas: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """grouped_gemm with quantised weights: [R, D] -> [P, num_features]; reference.quant_gemm."""
    if is_native(rows):
        return _quant_gemm(
            rows,
            experts,
            groups,
            row_index,
            pair_weight=pair_weight,
            max_ctas=max_ctas,
            deterministic=deterministic,
        )
    return reference.quant_gemm(rows, experts, groups, row_index, pair_weight=pair_weight)


def tokens_per_tile(
    weights: Tensor | QuantizedMatrix,
    num_pairs: int,
    num_groups: int,
    *,
    swiglu: bool = False,
    deterministic: bool = True,
) -> int:
    """How many pairs a tile has in the product with these weights: what sorting needs to know."""
    if not isinstance(weights, Tensor):
        if not is_native(weights.scales):
            return reference.BLOCK_ROWS
        return plan_quantized(
            weights, num_pairs, num_groups, deterministic=deterministic
        ).tile.tokens
    if not is_native(weights):
        return reference.BLOCK_ROWS
    return plan_weights(
        weights, num_pairs, num_groups, swiglu=swiglu, deterministic=deterministic
    ).tile.tokens


def equal_groups(weights: Tensor, pairs_per_group: int) -> PairGroups:
    """Groups of as many pairs each for weights [G, N, D], group g with weight g."""
    num_groups = len(weights)
    tokens = tokens_per_tile(weights, num_groups * pairs_per_group, num_groups)
    return _equal_groups(num_groups, pairs_per_group, tokens, weights.device)


@functools.lru_cache(maxsize=256)
def _equal_groups(
    num_groups: int, pairs_per_group: int, tokens: int, device: torch.device
) -> PairGroups:
    return PairGroups.of_equal_size(num_groups, pairs_per_group, tokens, device)
