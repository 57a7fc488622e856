"""Permute, the activation between the products, and the weighted sum in ascending k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe import kernels
from lightmoe.kernels import reference
from tests.kernels.rows import NUM_ROWS, assert_row_invariant, random_rows


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), max_size=30))
def test_permute_packs_rows_in_the_order_given(row_index: list[int]) -> None:
    rows = random_rows(10, 5)

    packed = kernels.permute(rows, torch.tensor(row_index, dtype=torch.int64))

    assert packed.shape == (len(row_index), 5)
    assert all(torch.equal(packed[place], rows[row]) for place, row in enumerate(row_index))


@pytest.mark.parametrize("expert_width", [16, 33, 5])
def test_swiglu_gates_the_second_half_by_the_first(expert_width: int) -> None:
    gate_up = random_rows(NUM_ROWS, 2 * expert_width)

    gate, up = gate_up[:, :expert_width].double(), gate_up[:, expert_width:].double()
    wanted = gate / (1.0 + torch.exp(-gate)) * up
    torch.testing.assert_close(kernels.swiglu(gate_up).double(), wanted, rtol=1e-5, atol=1e-6)
    assert_row_invariant(kernels.swiglu, gate_up)


def test_combine_adds_in_ascending_k_in_fp32() -> None:
    # 1e8 + 1 - 1e8 is 0 in fp32 in this order, and 1 in another.
    pairs = torch.tensor([[1e8], [1.0], [-1e8]])
    weights = torch.ones(2, 3)
    pair_index = torch.tensor([[0, 1, 2], [0, 2, 1]])

    assert kernels.combine(pairs, pair_index, weights).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combine_is_the_weighted_sum_rounded_once(dtype: torch.dtype) -> None:
    num_tokens, num_per_token, width = 9, 3, 7
    pairs = random_rows(num_tokens * num_per_token, width, dtype=dtype)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2))
    weights = random_rows(num_tokens, num_per_token, seed=3).softmax(dim=1)

    combined = kernels.combine(pairs, order.view(num_tokens, num_per_token), weights)

    picked = pairs[order].float().view(num_tokens, num_per_token, width)
    total = torch.zeros(num_tokens, width)
    for k in range(num_per_token):
        total = total + weights[:, k, None] * picked[:, k]
    assert torch.equal(combined, total.to(dtype))


def test_combine_of_no_tokens_is_empty() -> None:
    empty = torch.empty(0, 2, dtype=torch.int64)

    assert kernels.combine(torch.empty(0, 5), empty, torch.empty(0, 2)).shape == (0, 5)


def test_the_addend_comes_last() -> None:
    # 1e8 - 1e8 + 1 is 1 in fp32, and 0 where the 1 comes before.
    pairs, addend = torch.tensor([[1e8], [-1e8]]), torch.tensor([[1.0]])

    combined = reference.combine(pairs, torch.tensor([[0, 1]]), torch.ones(1, 2), addend)

    assert combined.tolist() == [[1.0]]
