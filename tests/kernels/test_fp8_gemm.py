"""Products in e4m3: exact against float64 sums, by blocks and by channels, whatever the company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightmoe.kernels.groups import PairGroups
from lightmoe.kernels.reference import fp8_gemm, permute_fp8
from lightmoe.quant.fp8 import Fp8ExpertLayout, Scaling
from tests.kernels.rows import assert_row_invariant, random_rows

WIDTH, EXPERT_WIDTH, NUM_SLOTS = 272, 144, 4
SCALINGS: list[Scaling] = ["block", "channel"]


def blobs_of(layout: Fp8ExpertLayout) -> Tensor:
    """One random expert in each slot."""
    blobs = torch.zeros(NUM_SLOTS, layout.num_elements, dtype=torch.uint8)
    for slot, blob in enumerate(blobs):
        gate_up = random_rows(2 * layout.expert_size, layout.hidden_size, seed=slot)
        down = random_rows(layout.hidden_size, layout.expert_size, seed=slot + 50)
        layout.write(blob, *gate_up.chunk(2), down)
    return blobs


def quantized(rows: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    return permute_fp8(rows, group_size=128 if scaling == "block" else None)


def numbers_of(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales stand for, float64 [R, D]."""
    each = scales[:, None] if scales.dim() == 1 else scales.repeat_interleave(128, dim=1)
    return codes.double() * each[:, : codes.shape[1]].double()


@pytest.mark.parametrize("scaling", SCALINGS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=NUM_SLOTS))
def test_the_products_are_those_of_the_numbers(scaling: Scaling, counts: list[int]) -> None:
    layout = Fp8ExpertLayout(WIDTH, EXPERT_WIDTH, scaling)
    gate_up, down = layout.views(blobs_of(layout))
    slots = [3, 0, 2, 1][: len(counts)]
    groups = PairGroups.from_counts(slots, counts)
    codes, scales = quantized(random_rows(9, WIDTH), scaling)
    pair_row = torch.arange(groups.num_pairs) * 5 % 9
    pair_weight = random_rows(1, groups.num_pairs).squeeze(0).abs()
    slot_of_pair = torch.tensor(slots).repeat_interleave(torch.tensor(counts))

    hidden = fp8_gemm(codes, scales, gate_up, groups, pair_row, dtype=torch.float32)
    inner = quantized(hidden, scaling)
    result = fp8_gemm(*inner, down, groups, dtype=torch.float32, pair_weight=pair_weight)

    assert hidden.shape == (groups.num_pairs, EXPERT_WIDTH)
    assert result.shape == (groups.num_pairs, WIDTH)
    dense = [torch.stack([m.dense(slot).double() for slot in range(4)]) for m in (gate_up, down)]
    rows = numbers_of(codes, scales)[pair_row]
    gate, up = torch.einsum("pd,pnd->pn", rows, dense[0][slot_of_pair]).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-4)
    summed = torch.einsum("pd,pnd->pn", numbers_of(*inner), dense[1][slot_of_pair])
    torch.testing.assert_close(
        result.double(), summed * pair_weight[:, None].double(), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_result_is_rounded_once(scaling: Scaling, dtype: torch.dtype) -> None:
    layout = Fp8ExpertLayout(WIDTH, EXPERT_WIDTH, scaling)
    _, down = layout.views(blobs_of(layout))
    groups = PairGroups.from_counts([1], [5])
    inputs = (*quantized(random_rows(5, EXPERT_WIDTH), scaling), down, groups)
    weight = random_rows(1, 5).squeeze(0)

    product = fp8_gemm(*inputs, dtype=dtype, pair_weight=weight)

    whole = fp8_gemm(*inputs, dtype=torch.float32, pair_weight=weight)
    assert product.dtype == dtype
    assert torch.equal(product, whole.to(dtype))


def test_a_sum_over_128_is_exact_and_those_are_added_in_float32() -> None:
    layout = Fp8ExpertLayout(256, 1, "block")
    blob = torch.zeros(1, layout.num_elements, dtype=torch.uint8)
    gate_up, _ = layout.views(blob)
    gate_up.scales.fill_(1.0)
    gate_up.codes[0, :, :2] = 448.0  # 448 * 448 - 448 * 448 + 2^-18 loses no bit in a block
    gate_up.codes[0, :, 2] = 2.0**-9
    gate_up.codes[0, :, 128] = 256.0  # 2^16 + 2^-18 does, in the sum of two
    rows = torch.zeros(1, 256)
    rows[0, :3] = torch.tensor([448.0, -448.0, 2.0**-9])
    codes = rows.to(torch.float8_e4m3fn)
    groups = PairGroups.from_counts([0], [1])

    def gate_of(codes: Tensor) -> float:
        """From silu(gate) * gate, which is gate^2 for a large gate and gate^2 / 2 for a small."""
        scales = torch.ones(1, 2)
        return float(fp8_gemm(codes, scales, gate_up, groups, dtype=torch.float32))

    small = 2.0**-18
    assert gate_of(codes) == pytest.approx(small**2 / 2, rel=1e-5)
    codes[0, 128] = 256.0
    assert gate_of(codes) == 2.0**32


def test_no_groups_make_no_product() -> None:
    layout = Fp8ExpertLayout(WIDTH, EXPERT_WIDTH, "block")
    gate_up, _ = layout.views(blobs_of(layout))
    codes, scales = permute_fp8(random_rows(3, WIDTH))

    product = fp8_gemm(codes, scales, gate_up, PairGroups.from_counts([], []), dtype=torch.bfloat16)

    assert product.shape == (0, EXPERT_WIDTH)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_row_has_the_same_bits_in_any_company(scaling: Scaling) -> None:
    layout = Fp8ExpertLayout(WIDTH, EXPERT_WIDTH, scaling)
    gate_up, _ = layout.views(blobs_of(layout))

    def product(rows: Tensor) -> Tensor:
        groups = PairGroups.from_counts([2], [len(rows)])
        return fp8_gemm(*quantized(rows, scaling), gate_up, groups, dtype=torch.bfloat16)

    assert_row_invariant(product, random_rows(37, WIDTH, dtype=torch.bfloat16))


def test_a_row_that_is_not_finite_makes_nan_of_its_products_only() -> None:
    layout = Fp8ExpertLayout(WIDTH, EXPERT_WIDTH, "block")
    gate_up, _ = layout.views(blobs_of(layout))
    rows = random_rows(3, WIDTH)
    rows[1, 200] = float("inf")
    groups = PairGroups.from_counts([0], [3])

    product = fp8_gemm(*permute_fp8(rows), gate_up, groups, dtype=torch.bfloat16)

    assert product[1].isnan().all()
    assert product[[0, 2]].isfinite().all()
