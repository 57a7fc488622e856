"""Attention over the pages of a KV cache by liblight_ops, without gathering them."""

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

SECTION = 256
"""Positions whose softmax is one chain: kSection of cute_kernels/paged_attention_sizes.h."""

MAX_WIDTH = 256
MAX_WIDTH_OF_LATENTS = 576
_STEM = "paged_attention"
_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    *,
    max_queries: int,
) -> Tensor:
    """[T, H, width] over 16-bit pages [blocks, block size, KV heads, width] -> [T, H, width].

    The rest is reference.paged_attention's; here the tables int32 [B, blocks], starts int32
    [B + 1] and lengths int32 [B] are read when the kernels run, so a captured graph replays with
    others, of `max_queries` queries of a sequence at most; on Hopper perhaps while the kernel in
    front still runs, so that must not write them. Each row's bits depend only on what it
    sees: not on other rows, nor on whether it is decoded or part of a prompt. Rows that are no
    sequence's are left.

    Widths are multiples of 8 up to 256, up to 576 where `values` are `keys`; a block has a power
    of two of positions, 8 to 256. The query's tokens may lie apart. UsageError names what does not
    fit.
    """
    _check_cache(query, keys, values)
    _check_tables(block_tables, query_starts, lengths)
    require_cuda(
        _STEM,
        query=query,
        keys=keys,
        values=values,
        block_tables=block_tables,
        query_starts=query_starts,
        lengths=lengths,
    )
    num_tokens, num_heads, width = query.shape
    num_sequences, max_blocks = block_tables.shape
    output = torch.empty(num_tokens, num_heads, width, dtype=query.dtype, device=query.device)
    if not (num_tokens and num_sequences):
        return output
    block_size = keys.shape[1]
    workspace = _workspace(num_sequences, num_heads, width, max_blocks * block_size, query.device)
    library().launch(
        _STEM,
        query.device,
        query=address(query),
        keys=address(keys),
        values=address(values),
        block_tables=address(block_tables),
        query_starts=address(query_starts),
        lengths=address(lengths),
        output=address(output),
        workspace=address(workspace),
        workspace_bytes=workspace.nbytes,
        query_stride=_token_stride(query),
        scale=width**-0.5 if scale is None else scale,
        sizes=(
            num_tokens,
            num_sequences,
            num_heads,
            keys.shape[2],
            width,
            block_size,
            max_blocks,
            max_queries,
        ),
        dtype=HALF_DTYPES[query.dtype],
    )
    return output


def _workspace(
    num_sequences: int, num_heads: int, width: int, max_positions: int, device: torch.device
) -> Tensor:
    """What the sections of sequences with one query leave: two sums and an output row each."""
    num_sections = -(-max_positions // SECTION)
    rows = num_sequences * num_heads * num_sections if num_sections > 1 else 0
    return torch.empty(rows * (width + 2), dtype=torch.float32, device=device)


def _check_cache(query: Tensor, keys: Tensor, values: Tensor) -> None:
    require_half(_STEM, "query", query)
    require_shape(_STEM, "query", query, None, None, None)
    num_heads, width = query.shape[1:]
    require_shape(_STEM, "keys", keys, None, None, None, width)
    require_shape(_STEM, "values", values, *keys.shape)
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        require_dtype(_STEM, name, tensor, query.dtype)
        require_multiple(_STEM, name, tensor, tensor.dim() - 1, 8)
        require_rows(_STEM, name, tensor)
    _require_pages("keys", keys)
    _require_pages("values", values)
    if _token_stride(query) % 8:
        raise UsageError(
            f"{_STEM}: query has tokens {query.stride(0)} elements apart; it needs a multiple of 8"
        )
    num_kv_heads = keys.shape[2]
    if num_heads % num_kv_heads:
        raise UsageError(
            f"{_STEM}: query has {num_heads} heads over {num_kv_heads} of keys; it takes a multiple"
        )
    widest = MAX_WIDTH_OF_LATENTS if keys.data_ptr() == values.data_ptr() else MAX_WIDTH
    if width > widest:
        raise UsageError(f"{_STEM}: query has width {width}; it takes up to {widest}")


def _token_stride(query: Tensor) -> int:
    """Elements from one token to the next; what torch says of a single one may be anything."""
    return query.stride(0) if len(query) > 1 else query.shape[1] * query.shape[2]


def _require_pages(name: str, pages: Tensor) -> None:
    if not pages.is_contiguous():
        raise UsageError(f"{_STEM}: {name} has gaps between its pages; give .contiguous()")
    if pages.shape[1] not in _BLOCK_SIZES:
        raise UsageError(
            f"{_STEM}: {name} has blocks of {pages.shape[1]} positions; it takes {_BLOCK_SIZES}"
        )


def _check_tables(block_tables: Tensor, query_starts: Tensor, lengths: Tensor) -> None:
    require_shape(_STEM, "block_tables", block_tables, None, None)
    num_sequences = len(block_tables)
    require_shape(_STEM, "query_starts", query_starts, num_sequences + 1)
    require_shape(_STEM, "lengths", lengths, num_sequences)
    tables = {"block_tables": block_tables, "query_starts": query_starts, "lengths": lengths}
    for name, table in tables.items():
        require_dtype(_STEM, name, table, torch.int32)
        if not table.is_contiguous():
            raise UsageError(f"{_STEM}: {name} has gaps; give .contiguous()")
