"""Rows packed in another order, as they are, as int8 with a scale a row or as e4m3 with one a row
or 128 elements, by liblight_ops.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lightmoe.errors import MachineError, UsageError
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
from lightmoe.kernels.reference import FP8_GROUP_SIZE

MAX_WIDTH_OF_A_SCALE = 16384
_FIRST_WITH_FP8 = 89


def permute(
    rows: Tensor,
    row_index: Tensor,
    *,
    row_count: Tensor | None = None,
    max_ctas: int | None = None,
) -> Tensor:
    """[R, D], int32 [N] -> [N, D], of any dtype whose rows are a multiple of 16 bytes.

    `row_index` may be of another integer type at the cost of a copy. With `row_count`, int32 [1] on
    the GPU, only so many rows are there: the others have no index, and are left. `max_ctas` bounds
    the thread blocks. UsageError names the tensor that does not fit.
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
            row_count=address(row_count),
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
    _require_one_scale(stem, rows)
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


def permute_fp8(
    rows: Tensor,
    row_index: Tensor | None = None,
    *,
    group_size: int | None = FP8_GROUP_SIZE,
    max_ctas: int | None = None,
) -> tuple[Tensor, Tensor]:
    """[R, D] of 16-bit floats, int32 [N] -> float8_e4m3fn [N, D], fp32 [N, ceil(D / 128)] or [N].

    D is a multiple of 8, with one scale a row (`group_size` None) at most 16384. MachineError where
    the kernels are older than sm_89's. The rest is reference.permute_fp8's.
    """
    stem = "permute_fp8"
    require_half(stem, "rows", rows)
    if group_size not in (FP8_GROUP_SIZE, None):
        raise UsageError(f"{stem}: group_size is {group_size}; give {FP8_GROUP_SIZE} or None")
    row_index = _check(stem, rows, row_index, 8)
    if group_size is None:
        _require_one_scale(stem, rows)
    name = library().architecture_of(rows.device)
    if int(name.removesuffix("ptx")) < _FIRST_WITH_FP8:
        raise MachineError(
            f"{stem}: kernels for sm_{name} cannot convert to e4m3; it needs a card of compute"
            f" capability 8.9 or later, and kernels for sm_{_FIRST_WITH_FP8} or later"
        )
    num_rows, width = len(rows if row_index is None else row_index), rows.shape[1]
    codes = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=rows.device)
    scale_shape = (num_rows,) if group_size is None else (num_rows, -(-width // group_size))
    scales = torch.empty(scale_shape, dtype=torch.float32, device=rows.device)
    if num_rows:
        library().launch(
            stem,
            rows.device,
            rows=address(rows),
            row_index=address(row_index),
            output=address(codes),
            scales=address(scales),
            num_rows=num_rows,
            width=width,
            group_size=group_size or 0,
            dtype=HALF_DTYPES[rows.dtype],
            max_ctas=max_ctas or 0,
        )
    return codes, scales


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


_Index = TypeVar("_Index", Tensor, Tensor | None)


def _check(stem: str, rows: Tensor, row_index: _Index, multiple: int) -> _Index:
    """The index as the kernels take it."""
    require_shape(stem, "rows", rows, None, None)
    require_multiple(stem, "rows", rows, 1, multiple)
    require_rows(stem, "rows", rows)
    if row_index is not None:
        require_shape(stem, "row_index", row_index, None)
    require_cuda(stem, rows=rows, row_index=row_index)
    return None if row_index is None else row_index.to(torch.int32).contiguous()


def _require_one_scale(stem: str, rows: Tensor) -> None:
    """UsageError unless a thread block's registers hold a row."""
    if rows.shape[1] > MAX_WIDTH_OF_A_SCALE:
        raise UsageError(
            f"{stem}: rows has size {rows.shape[1]} in dimension 1;"
            f" it takes up to {MAX_WIDTH_OF_A_SCALE}"
        )
