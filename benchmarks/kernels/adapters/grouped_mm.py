"""torch's grouped_mm for both products, everything around it in single CUDA kernels.

Routing, sorting, gather and combine are this project's own kernels, so the difference to
"lightmoe" is the products and what they fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from glue import silu_and_mul
from problem import Problem
from torch import Tensor

from adapters import Unsupported
from adapters.lightmoe_layer import choose


def make(problem: Problem) -> Callable[[], Tensor]:
    """The layer as route_tokens, permute, grouped_mm, SwiGLU, grouped_mm, combine."""
    from lightmoe import kernels

    if problem.weights.is_quantized:
        raise Unsupported("grouped_mm has no int4 or e4m3 weights")
    if problem.hidden.dtype != torch.bfloat16:
        raise Unsupported("grouped_mm takes bfloat16")
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    gate_up = problem.weights.gate_up.transpose(-2, -1)
    down = problem.weights.down.transpose(-2, -1)

    def call() -> Tensor:
        routing = choose(problem, tokens_per_tile=128)
        ends = routing.groups.offsets[1:]
        rows = kernels.permute(problem.hidden, routing.pair_row)
        hidden = silu_and_mul(grouped_mm(rows, gate_up, offs=ends))
        pairs = grouped_mm(hidden, down, offs=ends)
        return kernels.combine(pairs, routing.pair_index, routing.weights)

    return call
