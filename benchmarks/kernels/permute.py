"""Rows packed for the wire: copied, to int8 with a scale a row, and back.

python benchmarks/kernels/permute.py [--shapes qwen3] [--tokens 16384]

T counts rows here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
from ceilings import Ceilings
from floors import Shape
from row_stems import Measurement, num_sets, run

from lightmoe.kernels.permute import dequantize_rows, permute, permute_int8


def measure(shape: Shape, tokens: int, measured: Ceilings) -> Iterator[Measurement]:
    """The three kernels on the same rows, in random order."""
    width = shape.hidden_size
    count = num_sets(3 * tokens * width, measured.l2_bytes)
    sets = [torch.randn(tokens, width, device="cuda").bfloat16() for _ in range(count)]
    order = torch.randperm(tokens, device="cuda").int()
    exact = sets[0][order.long()].double()

    calls = [functools.partial(permute, rows, order) for rows in sets]
    error = float((calls[0]().double() - exact).abs().max())
    num_bytes = 4 * tokens * width + 4 * tokens
    yield Measurement("permute", "bf16", calls, num_bytes, error, 0.0)

    calls = [functools.partial(permute_int8, rows, order) for rows in sets]
    packed = [call() for call in calls]
    steps = exact.abs().amax(dim=1, keepdim=True) / 127
    error = float(((packed[0][0].double() * packed[0][1][:, None] - exact) / steps).abs().max())
    num_bytes = 3 * tokens * width + 8 * tokens
    yield Measurement("permute to int8", "bf16", calls, num_bytes, error, 0.501)

    calls = [functools.partial(dequantize_rows, *rows, torch.bfloat16) for rows in packed]
    error = float((calls[0]().double() - exact).norm() / exact.norm())
    yield Measurement("int8 to bf16", "bf16", calls, num_bytes, error, 1.5e-2)


if __name__ == "__main__":
    sys.exit(run("permute", measure, __doc__))
