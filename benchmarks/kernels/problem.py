"""One set of inputs of one MoE layer on the card, and what a layer should make of them.

A `Problem` is what every implementation of the layer bench is given; nothing in it depends on who
computes. Several sets of one problem rotate past the L2.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from floors import GROUP_SIZE, WEIGHT_BYTES, Shape
from torch import Tensor

if TYPE_CHECKING:
    from lightmoe.quant.fp8 import Fp8ExpertLayout

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NUM_BITS = {"int4": 4, "int8": 8}
MAX_SETS = 16
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Codes:
    """Symmetric weight-only quantisation of one stack of matrices, before anyone packs it.

    values: uint8 [E, N, D], code + 2 ** (num_bits - 1); scales: [E, N, D / group_size].
    """

    values: Tensor
    scales: Tensor
    num_bits: int
    group_size: int


@dataclass(frozen=True)
class Fp8Experts:
    """Experts in e4m3, scaled by blocks: uint8 blobs [E, bytes] of a layout."""

    layout: Fp8ExpertLayout
    blobs: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [E, 2F, D] (gate rows, then up rows) and down [E, D, F]; with codes where quantised:
    then the matrices hold what the codes stand for. In e4m3 they are empty. `prepared` is for
    implementations, under their own names: what they make of the weights and need for every
    problem."""

    gate_up: Tensor
    down: Tensor
    gate_up_codes: Codes | None = None
    down_codes: Codes | None = None
    fp8: Fp8Experts | None = None
    prepared: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are not 16-bit numbers."""
        return self.gate_up_codes is not None or self.fp8 is not None

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """The numbers of one expert: gate_up [2F, D] and down [D, F]."""
        if self.fp8 is None:
            return self.gate_up[expert], self.down[expert]
        gate_up, down = self.fp8.layout.views(self.fp8.blobs)
        return gate_up.dense(expert), down.dense(expert)

    def rolled(self, shift: int) -> ExpertWeights:
        """Another set in memory of its own: the same experts, each `shift` places further."""

        def roll(codes: Codes | None) -> Codes | None:
            if codes is None:
                return None
            values, scales = codes.values.roll(shift, 0), codes.scales.roll(shift, 0)
            return dataclasses.replace(codes, values=values, scales=scales)

        return ExpertWeights(
            self.gate_up.roll(shift, 0),
            self.down.roll(shift, 0),
            roll(self.gate_up_codes),
            roll(self.down_codes),
            self.fp8 and Fp8Experts(self.fp8.layout, self.fp8.blobs.roll(shift, 0)),
        )


@dataclass(frozen=True)
class Problem:
    """One layer's inputs, and the tensor its output goes to.

    hidden [T, D] of 16-bit floats, logits fp32 [T, E], output [T, D] like hidden; `mode` is
    "deterministic" or "free".
    """

    shape: Shape
    mode: str
    hidden: Tensor
    logits: Tensor
    weights: ExpertWeights
    output: Tensor

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]


def make_weights(
    shape: Shape, dtype: str, activation: torch.dtype, seed: int, device: str = "cuda"
) -> ExpertWeights:
    """Random experts, scaled so that every product keeps the size of its input."""
    sizes = (
        (shape.num_experts, 2 * shape.expert_size, shape.hidden_size),
        (shape.num_experts, shape.hidden_size, shape.expert_size),
    )
    generator = torch.Generator(device).manual_seed(seed)
    if dtype == "fp8":
        return make_fp8_weights(shape, activation, generator)
    gate_up, down = (
        torch.empty(size, dtype=activation, device=device).normal_(
            0, 1 / math.sqrt(size[2]), generator=generator
        )
        for size in sizes
    )
    if dtype not in NUM_BITS:
        return ExpertWeights(gate_up, down)
    bits = NUM_BITS[dtype]
    codes = (quantize(gate_up, bits, GROUP_SIZE), quantize(down, bits, GROUP_SIZE))
    return ExpertWeights(gate_up, down, *codes)


def make_fp8_weights(
    shape: Shape, activation: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    """make_weights in e4m3, one expert at a time: only the blobs are kept."""
    from lightmoe.quant.fp8 import Fp8ExpertLayout

    device, width, expert_width = generator.device, shape.hidden_size, shape.expert_size
    layout = Fp8ExpertLayout(width, expert_width, "block")
    size = (shape.num_experts, layout.num_elements)
    blobs = torch.zeros(size, dtype=torch.uint8, device=device)

    def random(num_rows: int, depth: int) -> Tensor:
        return torch.randn(num_rows, depth, generator=generator, device=device) / math.sqrt(depth)

    for blob in blobs:
        gate, up = random(2 * expert_width, width).chunk(2)
        layout.write(blob, gate, up, random(width, expert_width))
    none = torch.empty(0, dtype=activation, device=device)
    return ExpertWeights(none, none, fp8=Fp8Experts(layout, blobs))


def quantize(weight: Tensor, num_bits: int, group_size: int) -> Codes:
    """Symmetric codes of [E, N, D]; `weight` becomes what they stand for."""
    from lightmoe.quant.quantize import dequantize, quantize_groups

    values = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = weight.new_empty(*weight.shape[:2], weight.shape[2] // group_size)
    for expert in range(weight.shape[0]):  # one at a time: the fp32 copies stay small
        values[expert], scales[expert], _ = quantize_groups(
            weight[expert], num_bits, group_size, symmetric=True, dtype=weight.dtype
        )
        weight[expert] = dequantize(values[expert], scales[expert], None, num_bits, group_size)
    return Codes(values, scales, num_bits, group_size)


def make_logits(
    shape: Shape, num_tokens: int, routing: str, seed: int, device: str = "cuda"
) -> Tensor:
    """fp32 [T, E] whose top K follow `routing`: "uniform" or "zipf:<exponent>".

    Log popularity plus Gumbel noise: the K largest are K draws without replacement from the
    popularities, which a random order of experts shares out.
    """
    generator = torch.Generator(device).manual_seed(seed)
    uniform = torch.rand(num_tokens, shape.num_experts, generator=generator, device=device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    popularity = popularities(shape.num_experts, routing).to(device)
    order = torch.randperm(shape.num_experts, generator=generator, device=device)
    return (popularity.log()[order] + noise).contiguous()


def popularities(num_experts: int, routing: str) -> Tensor:
    """Share of each expert, most popular first: fp32 [E]."""
    kind, _, exponent = routing.partition(":")
    if kind not in ("uniform", "zipf"):
        raise ValueError(f"routing {routing!r}: expected uniform or zipf:<exponent>")
    power = float(exponent or 1.0) if kind == "zipf" else 0.0
    weight = torch.arange(1, num_experts + 1, dtype=torch.float32) ** -power
    return weight / weight.sum()


def num_sets_needed(
    shape: Shape, dtype: str, num_active: float, l2_bytes: int, memory_bytes: int
) -> int:
    """Sets of weights whose touched experts exceed three times the L2 together.

    At most as many as fit `memory_bytes`, of which a quantised set also needs its codes and the
    matrices they stand for.
    """
    touched = num_active * shape.num_weights * WEIGHT_BYTES[dtype]
    bytes_held = 3.6 if dtype in NUM_BITS else WEIGHT_BYTES[dtype]
    held = shape.num_experts * shape.num_weights * bytes_held
    needed = math.ceil(3 * l2_bytes / touched)
    return max(1, min(needed, MAX_SETS, int(memory_bytes / held)))


def route(problem: Problem) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, K] and float64 weights [T, K] as the logits say."""
    scores = problem.logits.double().softmax(-1)
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    top = problem.shape.num_experts_per_token
    weights = best.values[:, :top]
    if problem.shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return best.indices[:, :top].contiguous(), weights


def reference(problem: Problem, accumulate: torch.dtype = torch.float64) -> Tensor:
    """The layer's output [T, D] in `accumulate`, expert by expert, CHUNK_ROWS rows at a time."""
    experts, pair_weights = route(problem)
    out = torch.zeros(problem.hidden.shape, dtype=accumulate, device=problem.hidden.device)
    for expert in torch.unique(experts).tolist():
        gate_up, down = (matrix.to(accumulate) for matrix in problem.weights.dense(expert))
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        for rows, places in zip(tokens.split(CHUNK_ROWS), choice.split(CHUNK_ROWS), strict=True):
            hidden = _as_multiplied(problem, problem.hidden[rows], accumulate)
            gate, up = (hidden @ gate_up.t()).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            pairs = _as_multiplied(problem, inner, accumulate) @ down.t()
            out.index_add_(0, rows, pairs * pair_weights[rows, places, None].to(accumulate))
    return out


def _as_multiplied(problem: Problem, rows: Tensor, accumulate: torch.dtype) -> Tensor:
    """Rows as a product takes them: in e4m3 rounded to 16 bits, then to codes, scaled by 128."""
    if problem.weights.fp8 is None:
        return rows.to(accumulate)
    from lightmoe.kernels.reference import permute_fp8

    codes, scales = permute_fp8(rows.to(problem.hidden.dtype))
    each = scales.repeat_interleave(GROUP_SIZE, dim=1)[:, : rows.shape[1]]
    return codes.to(accumulate) * each.to(accumulate)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN where any element of `out` was not written."""
    difference = out.to(expected.dtype) - expected
    return float(difference.norm() / expected.norm())
