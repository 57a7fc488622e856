"""Queries and keys turned by their positions, keys and values put into the cache's pages, in one
launch of liblight_ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.errors import UsageError
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

_STEM = "rotary_cache"


def rotary_cache(
    product: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache_rows: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """[T, (H + 2 KV heads) x width] of 16 bits -> queries [T, H, width]; keys, values are written.

    The rest is reference.rotary_cache's, with its roundings but for that of the norms, which are
    weighted in fp32. `rotary` has the product's dtype, width is a multiple of 8. A token's bits
    depend on that token only; of tokens with the same cache row any may be what the pages keep.
    UsageError names the tensor that does not fit.
    """
    num_heads = _check_heads(product, keys, values)
    _check_rows(product, rotary, cache_rows, keys.shape[3])
    query_weight, key_weight = norms or (None, None)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None:
            require_shape(_STEM, name, weight, keys.shape[3])
            require_dtype(_STEM, name, weight, product.dtype)
            require_rows(_STEM, name, weight[None])
    cos, sin = rotary
    require_cuda(
        _STEM,
        product=product,
        cos=cos,
        sin=sin,
        cache_rows=cache_rows,
        keys=keys,
        values=values,
        query_weight=query_weight,
        key_weight=key_weight,
    )
    num_tokens, (num_kv_heads, width) = len(product), keys.shape[2:]
    query = product.new_empty(num_tokens, num_heads, width)
    if num_tokens:
        library().launch(
            _STEM,
            product.device,
            heads=address(product),
            query_weight=address(query_weight),
            key_weight=address(key_weight),
            cos=address(cos),
            sin=address(sin),
            cache_rows=address(cache_rows),
            query=address(query),
            keys=address(keys),
            values=address(values),
            table_stride=cos.stride(0),
            epsilon=epsilon,
            sizes=(num_tokens, num_heads, num_kv_heads, width),
            dtype=HALF_DTYPES[product.dtype],
        )
    return query


def _check_heads(product: Tensor, keys: Tensor, values: Tensor) -> int:
    """The number of query heads."""
    require_half(_STEM, "product", product)
    require_shape(_STEM, "product", product, None, None)
    require_rows(_STEM, "product", product)
    require_shape(_STEM, "keys", keys, None, None, None, None)
    require_shape(_STEM, "values", values, *keys.shape)
    for name, pages in (("keys", keys), ("values", values)):
        require_dtype(_STEM, name, pages, product.dtype)
        require_multiple(_STEM, name, pages, 3, 8)
        require_rows(_STEM, name, pages)
        if not pages.is_contiguous():
            raise UsageError(f"{_STEM}: {name} has gaps between its pages; give .contiguous()")
    num_kv_heads, width = keys.shape[2:]
    num_heads = product.shape[1] // width - 2 * num_kv_heads
    if num_heads < 1 or product.shape[1] % width:
        raise UsageError(
            f"{_STEM}: product has {product.shape[1]} columns; it needs heads of width {width},"
            f" more than {2 * num_kv_heads} of them"
        )
    return num_heads


def _check_rows(
    product: Tensor, rotary: tuple[Tensor, Tensor], cache_rows: Tensor, width: int
) -> None:
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        require_shape(_STEM, name, table, len(product), 1, width)
        require_dtype(_STEM, name, table, product.dtype)
        require_rows(_STEM, name, table)
    strides = [table.stride(0) for table in rotary]
    if strides[0] != strides[1] or strides[0] % 8:
        raise UsageError(
            f"{_STEM}: cos and sin have tokens {strides} elements apart;"
            " it needs the same multiple of 8"
        )
    require_shape(_STEM, "cache_rows", cache_rows, len(product))
    require_dtype(_STEM, "cache_rows", cache_rows, torch.int64)
    if not cache_rows.is_contiguous():
        raise UsageError(f"{_STEM}: cache_rows has gaps; give .contiguous()")
