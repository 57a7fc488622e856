"""The weighted sum of each token's pairs, by liblight_ops: the bits of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.kernels.checks import (
    HALF_DTYPES,
    require_cuda,
    require_dtype,
    require_half,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.library import address, library

_STEM = "combine"


def combine(
    pairs: Tensor,
    pair_index: Tensor,
    weights: Tensor | None,
    addend: Tensor | None = None,
    *,
    max_ctas: int | None = None,
) -> Tensor:
    """[P, D], int32 [T, K], fp32 [T, K] or None -> [T, D]; `addend` [T, D] is added last, in fp32.

    `pair_index` may be of another integer type at the cost of a copy; a negative one adds nothing.
    `max_ctas` bounds the thread blocks. UsageError names the tensor that does not fit.
    """
    require_shape(_STEM, "pairs", pairs, None, None)
    require_half(_STEM, "pairs", pairs)
    require_multiple(_STEM, "pairs", pairs, 1, 8)
    require_rows(_STEM, "pairs", pairs)
    require_shape(_STEM, "pair_index", pair_index, None, None)
    num_tokens, num_pairs_per_token = pair_index.shape
    if weights is not None:
        require_shape(_STEM, "weights", weights, num_tokens, num_pairs_per_token)
        require_dtype(_STEM, "weights", weights, torch.float32)
        weights = weights.contiguous()
    if addend is not None:
        require_shape(_STEM, "addend", addend, num_tokens, pairs.shape[1])
        require_dtype(_STEM, "addend", addend, pairs.dtype)
        require_rows(_STEM, "addend", addend)
    require_cuda(_STEM, pairs=pairs, pair_index=pair_index, weights=weights, addend=addend)
    pair_index = pair_index.to(torch.int32).contiguous()
    output = pairs.new_empty(num_tokens, pairs.shape[1])
    if num_tokens:
        library().launch(
            _STEM,
            pairs.device,
            pairs=address(pairs),
            pair_index=address(pair_index),
            weights=address(weights),
            addend=address(addend),
            output=address(output),
            num_tokens=num_tokens,
            num_pairs_per_token=num_pairs_per_token,
            width=pairs.shape[1],
            dtype=HALF_DTYPES[pairs.dtype],
            max_ctas=max_ctas or 0,
        )
    return output
