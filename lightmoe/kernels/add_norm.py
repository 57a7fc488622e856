"""A residual add and the RMS norm of the sum in one launch, by liblight_ops."""

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

_STEM = "add_norm"


def add_norm(
    hidden: Tensor, addend: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """[T, D], [T, D], [D] of 16 bits -> hidden + addend, rounded, and its norm: [T, D] each.

    The norm is computed in fp32 of the rounded sum, weighted and then rounded once. A row's bits
    depend on that row only. D is a multiple of 8. UsageError names the tensor that does not fit.
    """
    require_half(_STEM, "hidden", hidden)
    require_shape(_STEM, "hidden", hidden, None, None)
    require_multiple(_STEM, "hidden", hidden, 1, 8)
    num_rows, width = hidden.shape
    require_shape(_STEM, "addend", addend, num_rows, width)
    require_shape(_STEM, "weight", weight, width)
    rows = {"hidden": hidden, "addend": addend, "weight": weight[None]}
    for name, tensor in rows.items():
        require_dtype(_STEM, name, tensor, hidden.dtype)
        require_rows(_STEM, name, tensor)
    require_cuda(_STEM, hidden=hidden, addend=addend, weight=weight)
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    if num_rows:
        library().launch(
            _STEM,
            hidden.device,
            hidden=address(hidden),
            addend=address(addend),
            weight=address(weight),
            sum=address(total),
            normed=address(normed),
            epsilon=epsilon,
            num_rows=num_rows,
            width=width,
            dtype=HALF_DTYPES[hidden.dtype],
        )
    return total, normed
