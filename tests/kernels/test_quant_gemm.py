"""Products with quantised experts: grouped_gemm with the numbers that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.reference import grouped_gemm, quant_gemm
from lightmoe.quant.packing import QuantizedExpertLayout
from lightmoe.quant.quantize import NUM_BITS
from tests.kernels.rows import assert_row_invariant, random_rows

WIDTH, EXPERT_WIDTH, NUM_SLOTS = 40, 24, 4


def quantized_blobs(layout: QuantizedExpertLayout) -> torch.Tensor:
    """One random expert in each slot."""
    blobs = torch.zeros(NUM_SLOTS, layout.num_elements, dtype=torch.uint8)
    for slot, blob in enumerate(blobs):
        gate_up = random_rows(2 * layout.expert_size, layout.hidden_size, seed=slot)
        down = random_rows(layout.hidden_size, layout.expert_size, seed=slot + 50)
        layout.write(blob, *gate_up.chunk(2), down)
    return blobs


@pytest.mark.parametrize("num_bits", NUM_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=NUM_SLOTS))
def test_the_products_are_those_of_the_dense_numbers(
    num_bits: int, symmetric: bool, counts: list[int]
) -> None:
    layout = QuantizedExpertLayout(
        WIDTH, EXPERT_WIDTH, num_bits, 32, symmetric=symmetric, dtype=torch.float16
    )
    gate_up, down = layout.views(quantized_blobs(layout))
    groups = PairGroups.from_counts([3, 0, 2, 1][: len(counts)], counts)
    rows = random_rows(9, WIDTH)
    pair_row = torch.arange(groups.num_pairs) * 5 % 9
    pair_weight = random_rows(1, groups.num_pairs).squeeze(0).abs()

    hidden = quant_gemm(rows, gate_up, groups, pair_row)
    result = quant_gemm(hidden, down, groups, pair_weight=pair_weight)

    dense = [torch.stack([m.dense(slot).float() for slot in range(4)]) for m in (gate_up, down)]
    expected = grouped_gemm(rows, dense[0], groups, pair_row, swiglu=True)
    assert hidden.shape == (groups.num_pairs, EXPERT_WIDTH)
    assert torch.equal(hidden, expected)
    assert torch.equal(result, grouped_gemm(expected, dense[1], groups, pair_weight=pair_weight))


def test_no_groups_make_no_product() -> None:
    layout = QuantizedExpertLayout(WIDTH, EXPERT_WIDTH, 4, 32, symmetric=True, dtype=torch.bfloat16)
    gate_up, _ = layout.views(quantized_blobs(layout))

    product = quant_gemm(random_rows(3, WIDTH), gate_up, PairGroups.from_counts([], []))

    assert product.shape == (0, EXPERT_WIDTH)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    layout = QuantizedExpertLayout(WIDTH, EXPERT_WIDTH, 4, 32, symmetric=True, dtype=torch.bfloat16)
    gate_up, _ = layout.views(quantized_blobs(layout))
    rows = random_rows(37, WIDTH, dtype=torch.bfloat16)

    assert_row_invariant(
        lambda some: quant_gemm(some, gate_up, PairGroups.from_counts([2], [len(some)])), rows
    )
