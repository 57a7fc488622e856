"""One product for all rows, by liblight_ops: a grouped product with a single group."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe.kernels.checks import (
    require_cuda,
    require_half,
    require_multiple,
    require_rows,
    require_shape,
)
from lightmoe.kernels.grouped_gemm import check_weights, launch_product, plan_weights

_STEM = "matmul"


def matmul(
    rows: Tensor,
    weight: Tensor,
    *,
    swiglu: bool = False,
    output_float32: bool = False,
    deterministic: bool = True,
) -> Tensor:
    """[R, D] x [N, D] -> [R, N], with `swiglu` [R, N / 2]; row-invariant where deterministic.

    Otherwise a plain product is torch's. `output_float32` leaves the fp32 sums as they are, and
    does not go with `swiglu`. UsageError names the tensor that does not fit.

    On Hopper the weight may be read while the kernel in front of this one still runs, so it must
    not be what that kernel writes.
    """
    require_shape(_STEM, "weight", weight, None, None)
    require_shape(_STEM, "rows", rows, None, weight.shape[1])
    require_half(_STEM, "rows", rows)
    require_multiple(_STEM, "rows", rows, 1, 8)
    require_rows(_STEM, "rows", rows)
    check_weights(_STEM, "weight", weight, rows.dtype, swiglu=swiglu)
    require_cuda(_STEM, rows=rows, weight=weight)
    assert not (swiglu and output_float32), "the gated product is rounded"
    if not deterministic and not swiglu:
        if output_float32:
            return torch.mm(rows, weight.t(), out_dtype=torch.float32)
        return torch.mm(rows, weight.t())
    num_rows = len(rows)
    output = torch.empty(
        num_rows,
        weight.shape[0] // (2 if swiglu else 1),
        dtype=torch.float32 if output_float32 else rows.dtype,
        device=rows.device,
    )
    if num_rows:
        plan = plan_weights(weight, num_rows, 1, swiglu=swiglu, deterministic=deterministic)
        launch_product((0, 0, 0, 0, 1, num_rows), plan, rows, weight, output, swiglu=swiglu)
    return output
