"""Implementations beside ours: what needs no GPU computes the layer, the rest says why not."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from adapters import Unsupported, grouped_mm, lightmoe_layer, transformers_experts, vllm_layer
from checking import PEER_LIMIT, poisoned
from floors import Shape
from problem import Problem, make_logits, make_weights, reference, relative_error


def a_problem(dtype: str = "bf16", *, renormalize: bool = True) -> Problem:
    shape = Shape("tiny", 128, 256, 6, 2, renormalize)
    hidden = torch.randn(11, 128).bfloat16()
    weights = make_weights(shape, dtype, torch.bfloat16, seed=5, device="cpu")
    logits = make_logits(shape, 11, "uniform", seed=7, device="cpu")
    return Problem(shape, "free", hidden, logits, weights, torch.empty_like(hidden))


@pytest.mark.parametrize("renormalize", [True, False])
def test_transformers_experts_compute_the_layer(renormalize: bool) -> None:
    problem = a_problem(renormalize=renormalize)
    call = transformers_experts.make(problem)
    assert relative_error(poisoned(call, problem), reference(problem)) < PEER_LIMIT


@pytest.mark.parametrize("dtype", ["bf16", "int4", "fp8"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_our_own_layer_by_the_reference_road(dtype: str, renormalize: bool) -> None:
    problem = a_problem(dtype, renormalize=renormalize)
    call = lightmoe_layer.make(problem)
    assert relative_error(poisoned(call, problem), reference(problem)) < PEER_LIMIT
    assert call.tile == "reference"  # type: ignore[attr-defined]
    assert list(lightmoe_layer.steps(problem)) == ["route", "gate_up", "down", "combine"]


def test_what_an_implementation_lacks_it_says() -> None:
    with pytest.raises(Unsupported, match="int4"):
        transformers_experts.make(a_problem("int4"))
    for dtype in ("int4", "fp8"):
        with pytest.raises(Unsupported, match="int4 or e4m3"):
            grouped_mm.make(a_problem(dtype))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_left_out_where_it_is_not_installed() -> None:
    for make in (vllm_layer.make_fused, vllm_layer.make_marlin):
        with pytest.raises(Unsupported, match="not installed"):
            make(a_problem())
