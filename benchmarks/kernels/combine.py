"""The weighted sum of each token's pairs.

python benchmarks/kernels/combine.py [--shapes qwen3] [--tokens 16384]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
from ceilings import Ceilings
from floors import Shape
from row_stems import Measurement, num_sets, run

from lightmoe.kernels.combine import combine

ERROR_LIMIT = 4e-3


def measure(shape: Shape, tokens: int, measured: Ceilings) -> Iterator[Measurement]:
    """K rows read and one written per token, at random places."""
    top, width = shape.num_experts_per_token, shape.hidden_size
    num_pairs = tokens * top
    num_bytes = 2 * width * (num_pairs + tokens) + 8 * num_pairs
    calls = []
    for _ in range(num_sets(num_bytes, measured.l2_bytes)):
        pairs = torch.randn(num_pairs, width, device="cuda").bfloat16()
        index = torch.randperm(num_pairs, device="cuda").int().view(tokens, top)
        weights = torch.rand(tokens, top, device="cuda")
        calls.append(functools.partial(combine, pairs, index, weights))
    pairs, index, weights = calls[0].args
    checked = slice(0, 256)
    exact = torch.einsum(
        "tk,tkd->td", weights[checked].double(), pairs[index[checked].long()].double()
    )
    error = float((calls[0]()[checked].double() - exact).norm() / exact.norm())
    yield Measurement("combine", "bf16", calls, num_bytes, error, ERROR_LIMIT)


if __name__ == "__main__":
    sys.exit(run("combine", measure, __doc__))
