"""Rows packed in another order, as they are or as int8 with a scale a row, by liblight_ops."""

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

MAX_INT8_WIDTH = 16384


def permute(rows: Tensor, row_index: Tensor, *, max_ctas: int | None = None) -> Tensor:
    """[R, D], int32 [N] -> [N, D], of any dtype whose rows are a multiple of 16 bytes.

    `row_index` may be of another integer type at the cost of a copy. `max_ctas` bounds the thread
    blocks. UsageError names the tensor that does not fit.
    """
    row_index = _check("permute", rows, row_index, 16 // rows.element_size())
    packed = rows.new_empty(len(row_index), rows.shape[1])
    if len(row_index):
        library().launch(
            "permute",
            rows.device,
            rows=address(rows),
            row_index=address(row_index),
            output=address(packed),
            num_rows=len(row_index),
            width_bytes=rows.shape[1] * rows.element_size(),
            max_ctas=max_ctas or 0,
        )
    return packed


def permute_int8(
    rows: Tensor, row_index: Tensor, *, max_ctas: int | None = None
) -> tuple[Tensor, Tensor]:
    """[R, D] of 16-bit floats, int32 [N] -> int8 [N, D], scales fp32 [N].

    D is a multiple of 8, at most 16384. The rest is reference.permute_int8's.
    """
    stem = "permute_int8"
    require_half(stem, "rows", rows)
    row_index = _check(stem, rows, row_index, 8)
    if rows.shape[1] > MAX_INT8_WIDTH:
        raise UsageError(
            f"{stem}: rows has size {rows.shape[1]} in dimension 1; it takes up to {MAX_INT8_WIDTH}"
        )
    packed = torch.empty(len(row_index), rows.shape[1], dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(row_index), dtype=torch.float32, device=rows.device)
    if len(row_index):
        library().launch(
            stem,
            rows.device,
            rows=address(rows),
            row_index=address(row_index),
            output=address(packed),
            scales=address(scales),
            num_rows=len(row_index),
            width=rows.shape[1],
            dtype=HALF_DTYPES[rows.dtype],
            max_ctas=max_ctas or 0,
        )
    return packed, scales


def dequantize_rows(
    packed: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    row_index: Tensor | None = None,
    *,
    max_ctas: int | None = None,
) -> Tensor:
    """int8 [R, D], fp32 [R] -> scale * value in `dtype` [R, D], or its rows `row_index` [N]."""
    stem = "dequantize_rows"
    require_shape(stem, "packed", packed, None, None)
    require_dtype(stem, "packed", packed, torch.int8)
    require_shape(stem, "scales", scales, len(packed))
    require_dtype(stem, "scales", scales, torch.float32)
    if dtype not in HALF_DTYPES:
        raise UsageError(f"{stem}: dtype is {dtype}; it needs float16 or bfloat16")
    require_multiple(stem, "packed", packed, 1, 8)
    require_rows(stem, "packed", packed)
    require_cuda(stem, packed=packed, scales=scales, row_index=row_index)
    if row_index is not None:
        require_shape(stem, "row_index", row_index, None)
        row_index = row_index.to(torch.int32).contiguous()
    num_rows = len(packed) if row_index is None else len(row_index)
    rows = torch.empty(num_rows, packed.shape[1], dtype=dtype, device=packed.device)
    packed_scales = scales.contiguous()  # kept until the launch is enqueued
    if num_rows:
        library().launch(
            stem,
            packed.device,
            rows=address(packed),
            row_index=address(row_index),
            output=address(rows),
            scales=address(packed_scales),
            num_rows=num_rows,
            width=packed.shape[1],
            dtype=HALF_DTYPES[dtype],
            max_ctas=max_ctas or 0,
        )
    return rows


def _check(stem: str, rows: Tensor, row_index: Tensor, multiple: int) -> Tensor:
    require_shape(stem, "rows", rows, None, None)
    require_multiple(stem, "rows", rows, 1, multiple)
    require_rows(stem, "rows", rows)
    require_shape(stem, "row_index", row_index, None)
    require_cuda(stem, rows=rows, row_index=row_index)
    return row_index.to(torch.int32).contiguous()
