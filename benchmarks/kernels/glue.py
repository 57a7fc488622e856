"""The unfused steps between two products: what a fused kernel saves."""

from __future__ import annotations

import torch
from compiled import kernel
from torch import Tensor

THREADS = 256


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up: bf16 [P, 2F] -> [P, F], into `out` where given; F a multiple of 8."""
    num_pairs, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(num_pairs, width)
    num_threads = num_pairs * (width // 8)
    kernel("glue.cu", "silu_and_mul")(
        -(-num_threads // THREADS), THREADS, gate_up, out, num_pairs, width // 8
    )
    return out


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index]: bf16 [R, D], int32 [N] -> [N, D]; D a multiple of 8."""
    out = torch.empty(len(index), rows.shape[1], dtype=rows.dtype, device=rows.device)
    num_threads = len(index) * (rows.shape[1] // 8)
    kernel("glue.cu", "gather")(
        -(-num_threads // THREADS), THREADS, rows, index, out, len(index), rows.shape[1] // 8
    )
    return out
