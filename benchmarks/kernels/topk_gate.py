"""The gate with its permutation: from given logits, and with the router product in the launch.

    python benchmarks/kernels/topk_gate.py [--shapes qwen3] [--tokens 1 256 4096] [--no-overlapped]

The error is the largest relative one of the weights; experts that are not the best count as 1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
from ceilings import Ceilings
from floors import Shape
from problem import make_logits
from row_stems import Measurement, num_sets, run
from torch import Tensor

from lightmoe.kernels.topk_gate import FUSED_TOKENS, route_tokens

TOKENS_PER_TILE = 64
ERROR_LIMIT = 2e-4  # of bf16 rows summed in fp32 in another order, seen through exp


def measure(shape: Shape, tokens: int, measured: Ceilings) -> Iterator[Measurement]:
    """From logits, then from hidden rows."""
    pairs = tokens * shape.num_experts_per_token
    written = 4 * (5 * pairs + 3 * shape.num_experts)
    options = {
        "slots": torch.arange(shape.num_experts, dtype=torch.int32, device="cuda"),
        "tokens_per_tile": TOKENS_PER_TILE,
        "renormalize": shape.renormalize,
    }
    top = shape.num_experts_per_token

    num_bytes = written + 4 * tokens * shape.num_experts
    logits = [
        make_logits(shape, tokens, "uniform", seed)
        for seed in range(num_sets(num_bytes, measured.l2_bytes))
    ]
    calls = [functools.partial(route_tokens, None, None, top, logits=x, **options) for x in logits]
    error = gate_error(shape, logits[0].double(), *calls[0]()[:2])
    yield Measurement("gate and sort from fp32 logits", "fp32", calls, num_bytes, error, 2e-6)

    width = shape.hidden_size
    num_bytes = written + 2 * width * (tokens + shape.num_experts)
    sets = [
        (rows(tokens, width, 1.0), rows(shape.num_experts, width, width**-0.5))
        for _ in range(num_sets(num_bytes, measured.l2_bytes))
    ]
    calls = [functools.partial(route_tokens, *inputs, top, **options) for inputs in sets]
    hidden, router = sets[0]
    error = gate_error(shape, hidden.double() @ router.double().t(), *calls[0]()[:2])
    launches = "one launch" if tokens <= FUSED_TOKENS else "two launches"
    kernel = f"router product, gate, sort: {launches}"
    yield Measurement(kernel, "bf16", calls, num_bytes, error, ERROR_LIMIT)


def rows(num_rows: int, width: int, scale: float) -> Tensor:
    """Normal bf16 rows."""
    return (torch.randn(num_rows, width, device="cuda") * scale).bfloat16()


def gate_error(shape: Shape, logits: Tensor, experts: Tensor, weights: Tensor) -> float:
    """Largest relative error of the weights; 1 where a choice is not as good as the best."""
    scores = logits.softmax(-1)
    chosen = scores.gather(1, experts.long())
    best = scores.topk(shape.num_experts_per_token, dim=1).values
    if not torch.allclose(chosen, best, rtol=ERROR_LIMIT):
        return 1.0
    exact = chosen / chosen.sum(1, keepdim=True) if shape.renormalize else chosen
    return float(((weights - exact) / exact).abs().max())


if __name__ == "__main__":
    sys.exit(run("topk_gate", measure, __doc__))
