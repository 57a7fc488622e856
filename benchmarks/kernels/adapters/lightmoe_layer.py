"""Light-MoE's own layer: routing, product with gather and SwiGLU, product, combine: four launches.

In e4m3 the rows of each product are quantised first, by a launch of their own. The problem's mode
is the products' `deterministic`; the routing weights are applied in combine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from native import Launch
from packed import pack_codes
from problem import ExpertWeights, Problem
from torch import Tensor

from lightmoe import kernels
from lightmoe.kernels import PairGroups
from lightmoe.kernels.fp8_gemm import plan_fp8
from lightmoe.kernels.grouped_gemm import plan_weights
from lightmoe.kernels.quant_gemm import plan_quantized
from lightmoe.quant.fp8 import Fp8Matrix
from lightmoe.quant.fragments import PackedMatrix


@dataclass(frozen=True)
class Routing:
    """What route_tokens returns, by name."""

    weights: Tensor  # fp32 [T, K]
    groups: PairGroups
    pair_row: Tensor  # int32 [P]
    pair_index: Tensor  # int32 [T, K]


def make(problem: Problem) -> Callable[[], Tensor]:
    """The layer of a problem's mode."""
    experts = experts_of(problem.weights)
    tokens_per_tile = tile_tokens(problem, experts)

    def call() -> Tensor:
        routing = choose(problem, tokens_per_tile)
        inner = gate_up(problem, experts, routing)
        return combine(down(problem, experts, routing, inner), routing)

    call.tile = tile_names(problem, experts, tokens_per_tile)  # type: ignore[attr-defined]
    return call


def tile_names(problem: Problem, experts: Experts, tokens_per_tile: int) -> str:
    """The tiles of the two products, with the CTAs that share a tile's depth where they do."""
    if not problem.hidden.is_cuda:
        return "reference"
    sizes = (problem.num_tokens * problem.shape.num_experts_per_token, problem.shape.num_experts)
    names = []
    for weights, swiglu in ((experts.gate_up, True), (experts.down, False)):
        mode = {"deterministic": problem.mode == "deterministic"}
        if isinstance(weights, Tensor):
            make_plan = functools.partial(plan_weights, weights, *sizes, swiglu=swiglu, **mode)
        elif isinstance(weights, Fp8Matrix):
            make_plan = functools.partial(plan_fp8, weights, *sizes)
        else:
            make_plan = functools.partial(plan_quantized, weights, *sizes, **mode)
        plan = make_plan(tokens_per_tile=tokens_per_tile)
        names.append(str(Launch(plan.tile, plan.depth_splits)))
    return " ".join(names)


def steps(problem: Problem) -> dict[str, Callable[[], object]]:
    """The layer's launches, each on its own, over inputs computed once."""
    experts = experts_of(problem.weights)
    tokens_per_tile = tile_tokens(problem, experts)
    routing = choose(problem, tokens_per_tile)
    inner = gate_up(problem, experts, routing)
    pairs = down(problem, experts, routing, inner)
    return {
        "route": lambda: choose(problem, tokens_per_tile),
        "gate_up": lambda: gate_up(problem, experts, routing),
        "down": lambda: down(problem, experts, routing, inner),
        "combine": lambda: combine(pairs, routing),
    }


@dataclass(frozen=True)
class Experts:
    """Both matrices of all experts as the operators take them."""

    gate_up: Tensor | PackedMatrix | Fp8Matrix
    down: Tensor | PackedMatrix | Fp8Matrix


def experts_of(weights: ExpertWeights) -> Experts:
    """The problem's experts, packed where they are quantised; once per set of weights."""
    if weights.fp8 is not None:
        return Experts(*weights.fp8.layout.views(weights.fp8.blobs))
    if weights.gate_up_codes is None or weights.down_codes is None:
        return Experts(weights.gate_up, weights.down)
    if "lightmoe" not in weights.prepared:
        weights.prepared["lightmoe"] = Experts(
            pack_codes(weights.gate_up_codes, swiglu=True),
            pack_codes(weights.down_codes, swiglu=False),
        )
    experts: Experts = weights.prepared["lightmoe"]
    return experts


def tile_tokens(problem: Problem, experts: Experts) -> int:
    """Pairs per tile: the first product decides."""
    return kernels.tokens_per_tile(
        experts.gate_up,
        problem.num_tokens * problem.shape.num_experts_per_token,
        problem.shape.num_experts,
        swiglu=True,
        deterministic=problem.mode == "deterministic",
    )


@functools.lru_cache(maxsize=8)
def slots_of(num_experts: int, device: torch.device) -> Tensor:
    """Slot g for expert g: int32 [E]."""
    return torch.arange(num_experts, dtype=torch.int32, device=device)


def choose(problem: Problem, tokens_per_tile: int) -> Routing:
    """Scores, top-k and permutation from the logits."""
    shape = problem.shape
    _, weights, groups, pair_row, pair_index = kernels.route_tokens(
        problem.hidden,  # says which road; the logits are given
        None,
        shape.num_experts_per_token,
        logits=problem.logits,
        slots=slots_of(shape.num_experts, problem.hidden.device),
        tokens_per_tile=tokens_per_tile,
        renormalize=shape.renormalize,
    )
    return Routing(weights, groups, pair_row, pair_index)


def gate_up(problem: Problem, experts: Experts, routing: Routing) -> Tensor:
    """silu(gate) * up of every pair: [P, F]."""
    return _product(
        problem, problem.hidden, experts.gate_up, routing.groups, routing.pair_row, swiglu=True
    )


def down(problem: Problem, experts: Experts, routing: Routing, inner: Tensor) -> Tensor:
    """Every pair's output: [P, D]."""
    return _product(problem, inner, experts.down, routing.groups)


def _product(
    problem: Problem,
    rows: Tensor,
    weights: Tensor | PackedMatrix | Fp8Matrix,
    groups: PairGroups,
    row_index: Tensor | None = None,
    *,
    swiglu: bool = False,
) -> Tensor:
    if isinstance(weights, Fp8Matrix):
        quantized = kernels.permute_fp8(rows, row_index)  # older than it are the groups
        return kernels.fp8_gemm(*quantized, weights, groups, dtype=rows.dtype, groups_settled=True)
    how = {
        "deterministic": problem.mode == "deterministic",
        "groups_settled": row_index is None,  # the second product follows the first
    }
    if isinstance(weights, Tensor):
        return kernels.grouped_gemm(rows, weights, groups, row_index, swiglu=swiglu, **how)
    return kernels.quant_gemm(rows, weights, groups, row_index, **how)


def combine(pairs: Tensor, routing: Routing) -> Tensor:
    """Each token's weighted sum: [T, D]."""
    return kernels.combine(pairs, routing.pair_index, routing.weights)
