"""The two grouped products of a layer, each on its own: operands, check and shares.

Product 1 gathers the token rows, multiplies with gate and up and applies SwiGLU; product 2 is down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ceilings import Ceilings
from checking import poisoned
from floors import Shape, floor, instruction_of, product_work
from native import Groups
from packed import pack_codes
from problem import (
    ExpertWeights,
    Problem,
    make_logits,
    make_weights,
    num_sets_needed,
    relative_error,
    route,
)
from timing import time_graph
from torch import Tensor

from lightmoe.quant.fragments import PackedMatrix

CHECKED_ROWS = 256


@dataclass(frozen=True)
class Case:
    """One product of one layer: sorted pairs and operands, the latter once per set of inputs."""

    product: int
    dtype: str
    counts: Tensor  # pairs per expert [E]
    rows: list[Tensor]
    pair_row: Tensor | None
    weights: list[ExpertWeights]
    packed: list[PackedMatrix]  # empty unless the weights are quantised
    output: Tensor

    @property
    def swiglu(self) -> bool:
        """Whether this is product 1."""
        return self.product == 1

    @property
    def num_active(self) -> int:
        """Experts with pairs."""
        return int((self.counts > 0).sum())

    @property
    def activation(self) -> str:
        """bf16 or fp16."""
        return "bf16" if self.output.dtype == torch.bfloat16 else "fp16"

    def matrix(self, index: int) -> Tensor:
        """The product's weights [E, N, D] of a set; what they stand for where quantised."""
        weights = self.weights[index]
        return weights.gate_up if self.swiglu else weights.down


def make_cases(
    shape: Shape,
    num_tokens: int,
    dtype: str,
    activation: torch.dtype,
    routing: str,
    l2_bytes: int,
    products: Sequence[int] = (1, 2),
) -> list[Case]:
    """The products' operands, in as many sets as it takes to leave the L2."""
    logits = make_logits(shape, num_tokens, routing, seed=1)
    hidden = torch.randn(num_tokens, shape.hidden_size, device="cuda").to(activation)
    problem = Problem(shape, "free", hidden, logits, ExpertWeights(hidden, hidden), hidden)
    experts = route(problem)[0].flatten()
    counts = torch.bincount(experts, minlength=shape.num_experts)
    order = torch.sort(experts, stable=True).indices
    free_bytes = torch.cuda.mem_get_info()[0] // 2
    active = int((counts > 0).sum())
    num_sets = num_sets_needed(shape, dtype, active, l2_bytes, free_bytes)
    first_set = make_weights(shape, dtype, activation, seed=0)
    weights = [first_set, *(first_set.rolled(index) for index in range(1, num_sets))]

    def random(num_rows: int, width: int) -> Tensor:
        return torch.randn(num_rows, width, device="cuda").to(activation)

    cases = []
    for product in products:
        first = product == 1
        sizes = (num_tokens, shape.hidden_size) if first else (len(order), shape.expert_size)
        codes = [w.gate_up_codes if first else w.down_codes for w in weights]
        features = shape.expert_size if first else shape.hidden_size
        cases.append(
            Case(
                product,
                dtype,
                counts,
                [random(*sizes) for _ in range(num_sets)],
                (order // shape.num_experts_per_token).int() if first else None,
                weights,
                [pack_codes(code, swiglu=first) for code in codes if code is not None],
                torch.empty(len(order), features, dtype=activation, device="cuda"),
            )
        )
    return cases


def measure(
    case: Case,
    calls: Sequence[Callable[[], Tensor | None]],
    path: str,
    measured: Ceilings,
    seconds: float,
) -> dict[str, Any]:
    """Check the first call, which returns its output or fills the case's; time all: one row."""
    error = check(case, poisoned(calls[0], case))
    timing = time_graph(calls, seconds)
    depth, features = case.matrix(0).shape[2], case.output.shape[1]
    num_rows = case.rows[0].shape[0]
    work = product_work(
        len(case.output), num_rows, case.num_active, depth, features, case.dtype, case.swiglu
    )
    least = floor(work, measured.matmul[case.activation], measured.bandwidth)
    rate = measured.rate(instruction_of(case.activation, path))
    return {
        "product": case.product,
        **asdict(timing),
        "floor_ms": least.ms,
        "bound": least.bound,
        "share_of_floor": least.ms / timing.ms,
        "share_of_instruction": work.flops / (1e-3 * timing.ms) / rate,
        "tflops": work.flops / timing.ms / 1e9,
        "gb_per_second": work.num_bytes / timing.ms / 1e6,
        "intensity": work.intensity,
        "error": error,
    }


def check(case: Case, output: Tensor) -> float:
    """Error of set 0 against float64, over the first and last rows of the experts with the fewest
    and the most pairs; NaN where any output was not written."""
    if not torch.isfinite(output).all():
        return float("nan")
    ends = case.counts.cumsum(0)
    loaded = case.counts.nonzero().flatten()
    order = loaded[case.counts[loaded].argsort(stable=True)]
    worst = 0.0
    for expert in {int(order[0]), int(order[-1])}:
        end = int(ends[expert])
        begin = end - int(case.counts[expert])
        for first in {begin, max(begin, end - CHECKED_ROWS)}:
            pairs = slice(first, min(end, first + CHECKED_ROWS))
            index = pairs if case.pair_row is None else case.pair_row[pairs].long()
            product = case.rows[0][index].double() @ case.matrix(0)[expert].double().t()
            if case.swiglu:
                gate, up = product.chunk(2, dim=-1)
                product = torch.nn.functional.silu(gate) * up
            worst = max(worst, relative_error(output[pairs], product))
    return worst


def groups_of(case: Case, tokens_per_tile: int) -> Groups:
    """The case's pairs with a tile table."""
    return Groups.from_counts(case.counts, tokens_per_tile)
