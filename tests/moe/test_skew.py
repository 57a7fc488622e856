"""The made-up gate: its distribution, and that a choice depends on token, layer and seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightmoe.core import SamplingParams
from lightmoe.moe.gate import Choice, Gate
from lightmoe.moe.load import LoadCounter
from lightmoe.moe.skew import RoutingSkew, SkewGate, draw_ranks
from tests.models.folders import write_config
from tests.worker.groups import generate, new_config, running_engine

NUM_EXPERTS = 16
MIN_P = 1e-3


def new_gate(
    exponent: float = 1.0,
    *,
    layer: int = 0,
    seed: int = 0,
    k: int = 2,
    width: int = 96,
    **how: Any,
) -> SkewGate:
    router = torch.zeros(NUM_EXPERTS, width)
    gate = Gate(router, k, **({"renormalize": True} | how))
    return RoutingSkew(exponent, seed).instead_of(gate, layer)


def random_hidden(num_tokens: int, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num_tokens, width, generator=generator).to(dtype)


def weights_of(exponent: float, num_experts: int = NUM_EXPERTS) -> np.ndarray:
    weights = np.arange(1.0, num_experts + 1) ** -exponent
    return weights / weights.sum()


def order_of(gate: SkewGate) -> np.ndarray:
    """expert of rank i - 1, as the first expert of many tokens shows it under a steep skew."""
    first = gate(random_hidden(40_000)).experts[:, 0]
    return np.argsort(-np.bincount(first, minlength=NUM_EXPERTS), kind="stable")


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 2.0])
def test_the_first_expert_has_weight_one_over_its_rank_to_the_exponent(exponent: float) -> None:
    ranks = draw_ranks(RoutingSkew(exponent, seed=3), NUM_EXPERTS, 3)
    counts = np.bincount(ranks[:, 0], minlength=NUM_EXPERTS)
    assert chisquare(counts, weights_of(exponent) * counts.sum()).pvalue > MIN_P


def test_the_second_expert_is_drawn_from_those_left() -> None:
    ranks = draw_ranks(RoutingSkew(1.0, seed=4), NUM_EXPERTS, 2)
    p = weights_of(1.0)
    pairs = p[:, None] * p[None, :] / (1 - p[:, None])
    np.fill_diagonal(pairs, 0.0)
    counts = np.zeros_like(pairs)
    np.add.at(counts, (ranks[:, 0], ranks[:, 1]), 1)
    off = ~np.eye(NUM_EXPERTS, dtype=bool)
    assert chisquare(counts[off], pairs[off] * len(ranks)).pvalue > MIN_P
    assert not counts.diagonal().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_any_dtype_take_draws_evenly(dtype: torch.dtype) -> None:
    gate = new_gate(1.0, seed=5)
    experts = gate(random_hidden(20_000, dtype=dtype)).experts
    order = order_of(gate)
    counts = np.bincount(experts[:, 0], minlength=NUM_EXPERTS)[order]
    drawn = np.bincount(draw_ranks(RoutingSkew(1.0, 5), NUM_EXPERTS, 2)[:, 0])
    expected = np.sort(drawn)[::-1] / drawn.sum() * counts.sum()
    assert chisquare(np.sort(counts)[::-1], expected).pvalue > MIN_P


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    num_per_token=st.integers(1, 8),
    width=st.integers(1, 80),
    scale=st.floats(0.5, 4.0),
)
def test_every_token_has_k_distinct_experts_of_equal_weight(
    num_tokens: int, num_per_token: int, width: int, scale: float
) -> None:
    gate = new_gate(1.5, k=num_per_token, width=width, scale=scale)
    choice = gate(random_hidden(num_tokens, width))
    assert choice.experts.shape == choice.weights.shape == (num_tokens, num_per_token)
    assert choice.weights.dtype == torch.float32
    assert all(len(set(row)) == num_per_token for row in choice.experts.tolist())
    assert all(0 <= expert < NUM_EXPERTS for expert in choice.experts.flatten().tolist())
    torch.testing.assert_close(choice.weights.sum(dim=1), torch.full((num_tokens,), scale))


def test_a_token_chooses_the_same_alone_in_any_batch_and_again() -> None:
    hidden = random_hidden(300)
    together = new_gate()(hidden).experts
    again = new_gate()(hidden.flip(0)).experts.flip(0)
    alone = torch.cat([new_gate()(hidden[row : row + 1]).experts for row in range(300)])
    assert torch.equal(together, again)
    assert torch.equal(together, alone)


def test_the_order_is_permuted_per_layer_and_by_seed() -> None:
    orders = [
        tuple(order_of(new_gate(2.0, layer=layer, seed=seed))[:4])
        for layer, seed in ((0, 0), (1, 0), (2, 0), (0, 1))
    ]
    assert len(set(orders)) == 4


def test_layers_draw_apart_from_each_other() -> None:
    hidden = random_hidden(20_000)
    first, second = (new_gate(0.0, layer=layer)(hidden).experts[:, 0] for layer in (0, 1))
    table = np.zeros((NUM_EXPERTS, NUM_EXPERTS))
    np.add.at(table, (first.numpy(), second.numpy()), 1)
    assert chisquare(table.ravel()).pvalue > MIN_P


def test_half_precision_uses_no_more_columns_than_there_are() -> None:
    gate = new_gate(width=5)
    assert len(set(map(tuple, gate(random_hidden(200, 5, torch.bfloat16)).experts.tolist()))) > 20


class NoHost(TorchDispatchMode):
    """Fails at any operator that makes the host wait, or whose size depends on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "unique",
        "masked_select",
        "_to_copy",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    gate, hidden = new_gate(), random_hidden(9)
    with NoHost():
        choice = gate(hidden)
    assert isinstance(choice, Choice)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHost():
        choice.weights.sum().item()


def test_loads_of_a_layer_follow_the_skew() -> None:
    load = LoadCounter(1, NUM_EXPERTS, torch.device("cpu"))
    load.add(0, new_gate(1.0, k=1)(random_hidden(30_000)))
    counts = np.sort(load.take()[0])[::-1]
    np.testing.assert_allclose(counts / counts.sum(), weights_of(1.0), rtol=0.12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_on_a_gpu_chooses_as_the_cpu(dtype: torch.dtype) -> None:
    how = {"renormalize": True}
    gates = [
        RoutingSkew(1.0, 2).instead_of(
            Gate(torch.zeros(NUM_EXPERTS, 96, device=device), 4, **how), 1
        )
        for device in ("cpu", "cuda")
    ]
    hidden = random_hidden(64, dtype=dtype)
    on_gpu = hidden.cuda()
    gates[1](on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        choice = gates[1](on_gpu)
    graph.replay()
    assert choice.experts.cpu().tolist() == gates[0](hidden).experts.tolist()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_launch_counts_what_the_skew_drew(tmp_path: Path, num_ranks: int) -> None:
    folder = write_config(tmp_path, num_local_experts=8)
    config = new_config(folder, num_ranks, load_format="dummy", seed=4)
    prompts = [[token % 50 for token in range(start, start + 60)] for start in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    loads = []
    for exponent in (None, 0.0, 3.0):
        with running_engine(replace(config, routing_skew=exponent), 4, 64) as engine:
            generate(engine, prompts, params)
            loads.append(engine.load().expert_tokens)
    shares = [load.max(axis=1) / load.sum(axis=1) for load in loads]
    assert (shares[2] > 0.4).all()  # of the K = 2 experts a token one is nearly always the same
    assert (shares[1] < 0.3).all()
    assert loads[2][0].argmax() != loads[2][1].argmax()
    assert all(load.sum() == loads[0].sum() for load in loads)
