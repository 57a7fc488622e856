"""Grouped products: each pair with its own slot's weight, whatever the groups look like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe import kernels
from lightmoe.kernels import PairGroups
from tests.kernels.rows import random_rows

NUM_SLOTS = 6
SIZES = [(32, 48), (20, 33), (7, 5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(pairs_per_slot=st.lists(st.integers(0, 40), min_size=NUM_SLOTS, max_size=NUM_SLOTS))
def test_a_pair_has_the_bits_of_its_own_product(
    sizes: tuple[int, int], pairs_per_slot: list[int]
) -> None:
    width, num_outputs = sizes
    weights = random_rows(NUM_SLOTS * num_outputs, width).view(NUM_SLOTS, num_outputs, width)
    slots = [3, 0, 5, 1, 4, 2]  # any order, and groups without pairs
    counts = [pairs_per_slot[slot] for slot in slots]
    rows = random_rows(sum(counts), width, seed=2)

    product = kernels.grouped_gemm(rows, weights, PairGroups.from_counts(slots, counts))

    assert product.shape == (sum(counts), num_outputs)
    slot_of_pair = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    for pair, slot in enumerate(slot_of_pair):
        assert torch.equal(
            product[pair : pair + 1], kernels.matmul(rows[pair : pair + 1], weights[slot])
        )


def test_row_index_gathers_the_row_of_each_pair() -> None:
    weights = random_rows(3 * 8, 12).view(3, 8, 12)
    rows = random_rows(5, 12, seed=1)
    row_index = torch.tensor([4, 0, 0, 3, 2])
    groups = PairGroups.from_counts([0, 2], [2, 3])

    product = kernels.grouped_gemm(rows, weights, groups, row_index)

    assert torch.equal(product, kernels.grouped_gemm(rows[row_index], weights, groups))


def test_swiglu_is_applied_to_the_product_of_gate_rows_and_up_rows() -> None:
    weights = random_rows(2 * 16, 12).view(2, 16, 12)
    rows = random_rows(5, 12, seed=1)
    groups = PairGroups.from_counts([1, 0], [3, 2])

    inner = kernels.grouped_gemm(rows, weights, groups, swiglu=True)

    assert torch.equal(inner, kernels.swiglu(kernels.grouped_gemm(rows, weights, groups)))
    assert inner.shape == (5, 8)


def test_pair_weight_multiplies_each_pairs_result() -> None:
    weights = random_rows(2 * 8, 12).view(2, 8, 12)
    rows = random_rows(5, 12, seed=1)
    pair_weight = torch.tensor([0.5, 0.25, 0.0, 2.0, 3.0])
    groups = PairGroups.from_counts([1, 0], [3, 2])

    weighted = kernels.grouped_gemm(rows, weights, groups, pair_weight=pair_weight)

    plain = kernels.grouped_gemm(rows, weights, groups)
    assert torch.equal(weighted, plain * pair_weight[:, None])


def test_no_pairs_make_no_product() -> None:
    product = kernels.grouped_gemm(
        random_rows(4, 12), torch.zeros(2, 8, 12), PairGroups.from_counts([], [])
    )

    assert product.shape == (0, 8)


def test_slots_and_counts_must_match() -> None:
    with pytest.raises(AssertionError, match="one slot and one count"):
        PairGroups.from_counts([0], [2, 2])
