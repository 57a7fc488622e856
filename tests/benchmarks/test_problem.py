"""The layer bench's inputs, and the reference that everyone is checked against."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checking import PEER_LIMIT, error_limit, poisoned, reference_dtype
from floors import GROUP_SIZE, SHAPES, Shape, layer_work
from packed import pack_codes
from problem import (
    ExpertWeights,
    Problem,
    make_logits,
    make_weights,
    num_sets_needed,
    popularities,
    quantize,
    reference,
    relative_error,
    route,
)
from torch import Tensor

TINY = Shape("tiny", 128, 256, 6, 2, True)


def tiny_problem(dtype: str = "bf16", routing: str = "uniform", num_tokens: int = 9) -> Problem:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, TINY.hidden_size, generator=generator).bfloat16()
    weights = make_weights(TINY, dtype, torch.bfloat16, seed=5, device="cpu")
    logits = make_logits(TINY, num_tokens, routing, seed=7, device="cpu")
    return Problem(TINY, "free", hidden, logits, weights, torch.empty_like(hidden))


def token_by_token(problem: Problem) -> Tensor:
    """The layer with nothing grouped."""
    out = torch.zeros(problem.hidden.shape, dtype=torch.float64)
    for token, (row, logits) in enumerate(zip(problem.hidden, problem.logits, strict=True)):
        scores = logits.double().softmax(0)
        experts = scores.argsort(descending=True)[: TINY.num_experts_per_token]
        for expert in experts.tolist():
            gate, up = (problem.weights.gate_up[expert].double() @ row.double()).chunk(2)
            inner = gate * torch.sigmoid(gate) * up
            pair = problem.weights.down[expert].double() @ inner
            out[token] += pair * scores[expert] / scores[experts].sum()
    return out


@pytest.mark.parametrize("dtype", ["bf16", "int4", "int8"])
def test_reference_is_the_layer_token_by_token(dtype: str) -> None:
    problem = tiny_problem(dtype)
    assert relative_error(reference(problem), token_by_token(problem)) < 1e-12
    assert relative_error(reference(problem, torch.float32), token_by_token(problem)) < 1e-5


def test_the_reference_in_e4m3_rounds_both_rows_and_weights() -> None:
    problem = tiny_problem("fp8")
    assert problem.weights.fp8 is not None
    gate_up, down = problem.weights.fp8.layout.views(problem.weights.fp8.blobs)
    dense = [torch.stack([m.dense(expert) for expert in range(6)]) for m in (gate_up, down)]
    unrounded = dataclasses.replace(problem, weights=ExpertWeights(*dense))

    error = relative_error(reference(problem), reference(unrounded))

    assert 0.01 < error < 0.08, "two roundings of rows to three bits behind the first"
    assert error_limit("lightmoe", "bf16", "fp8") < error
    rolled = problem.weights.rolled(2)
    for expert in range(6):
        for matrix, same in zip(
            rolled.dense((expert + 2) % 6), problem.weights.dense(expert), strict=True
        ):
            assert torch.equal(matrix, same)


def test_weights_keep_the_size_of_their_input() -> None:
    weights = make_weights(TINY, "bf16", torch.float32, seed=1, device="cpu")
    rows = torch.randn(1000, TINY.hidden_size)
    assert (rows @ weights.gate_up[0].t()).std() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("num_bits", "limit"), [(4, 0.15), (8, 0.01)])
def test_quantised_weights_become_what_their_codes_stand_for(num_bits: int, limit: float) -> None:
    plain = torch.randn(2, 16, 2 * GROUP_SIZE).bfloat16()
    weight = plain.clone()
    codes = quantize(weight, num_bits, GROUP_SIZE)
    spread = codes.scales.float().repeat_interleave(GROUP_SIZE, dim=2)
    stands_for = (codes.values.float() - (1 << (num_bits - 1))) * spread
    assert torch.equal(weight, stands_for.bfloat16())
    assert 0 < relative_error(weight.float(), plain.float()) < limit


@pytest.mark.parametrize("swiglu", [True, False])
def test_packed_experts_hold_the_same_numbers_in_one_blob(swiglu: bool) -> None:
    weight = torch.randn(3, 64, 2 * GROUP_SIZE).bfloat16()
    codes = quantize(weight, 4, GROUP_SIZE)
    packed = pack_codes(codes, swiglu=swiglu)
    for expert in range(3):
        assert torch.equal(packed.dense(expert), weight[expert])
    slot_bytes = packed.packed.stride(0)
    assert packed.scales.stride(0) * 2 == slot_bytes
    assert packed.scales.data_ptr() - packed.packed.data_ptr() == packed.packed[0].nbytes


def test_a_rolled_set_is_another_copy_of_the_experts() -> None:
    weights = make_weights(TINY, "int4", torch.bfloat16, seed=5, device="cpu")
    other = weights.rolled(2)
    assert torch.equal(other.gate_up[2], weights.gate_up[0])
    assert torch.equal(other.down[0], weights.down[4])
    assert other.down.data_ptr() != weights.down.data_ptr()
    assert other.down_codes is not None
    assert weights.down_codes is not None
    assert torch.equal(other.down_codes.values[2], weights.down_codes.values[0])
    assert torch.equal(other.down_codes.scales[2], weights.down_codes.scales[0])


def test_zipf_loads_experts_by_rank_and_uniform_evenly() -> None:
    shape = dataclasses.replace(SHAPES["qwen3"], num_experts_per_token=1)
    for routing, most in (("uniform", 1 / 128), ("zipf:1.0", float(popularities(128, "zipf")[0]))):
        logits = make_logits(shape, 40_000, routing, seed=2, device="cpu")
        counts = torch.bincount(logits.argmax(-1), minlength=128).sort(descending=True).values
        assert counts[0] / 40_000 == pytest.approx(most, rel=0.25)
    assert popularities(4, "zipf:1.0").tolist() == pytest.approx([0.48, 0.24, 0.16, 0.12])


def test_unknown_routing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uniform or zipf"):
        popularities(4, "normal")


def test_route_takes_the_best_in_order_and_renormalises() -> None:
    problem = tiny_problem(routing="zipf:1.0")
    experts, weights = route(problem)
    assert torch.equal(experts, problem.logits.topk(2).indices)
    assert torch.allclose(weights.sum(-1), torch.ones(9, dtype=torch.float64))
    plain = dataclasses.replace(problem, shape=dataclasses.replace(TINY, renormalize=False))
    assert torch.allclose(route(plain)[1], problem.logits.double().softmax(-1).topk(2).values)


def test_sets_together_exceed_three_times_the_l2() -> None:
    l2, memory = 50 << 20, 60 << 30
    for name, shape in SHAPES.items():
        for dtype in ("bf16", "int4"):
            active = shape.num_experts_per_token
            sets = num_sets_needed(shape, dtype, active, l2, memory)
            touched = layer_work(shape, 1, active, dtype).num_bytes
            assert sets * touched > 3 * l2
            assert sets == 1 or (sets - 1) * touched < 3.1 * l2, (name, dtype)
    assert num_sets_needed(SHAPES["mixtral"], "bf16", 2, l2, memory) == 1
    assert num_sets_needed(SHAPES["qwen3"], "int4", 8, l2, 0) == 1


def test_unwritten_output_is_an_error() -> None:
    problem = tiny_problem()
    right = reference(problem)

    def half() -> Tensor:
        problem.output[:4] = right[:4].bfloat16()
        return problem.output

    def whole() -> Tensor:
        fresh = torch.empty_like(problem.output)
        assert fresh.isnan().all(), "what a call allocates is poisoned too"
        return fresh.copy_(right)

    limit = error_limit("lightmoe", "bf16")
    assert not relative_error(poisoned(half, problem), right) <= PEER_LIMIT
    assert relative_error(poisoned(whole, problem), right) <= limit
    assert not torch.are_deterministic_algorithms_enabled()
    assert error_limit("lightmoe", "fp16") < limit < error_limit("transformers", "bf16")


def test_reference_precision_follows_the_card() -> None:
    problem = tiny_problem()
    assert reference_dtype(problem, 75) == torch.float64
    big = dataclasses.replace(problem, shape=SHAPES["mixtral"], hidden=torch.empty(4096, 1))
    assert reference_dtype(big, 75) == torch.float32
    assert reference_dtype(big, 90) == torch.float64
