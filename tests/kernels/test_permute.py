"""Rows to int8 and back: within half a step, ties to even, zeros and what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.kernels import reference
from tests.kernels.rows import DTYPES, random_rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(row_index=st.lists(st.integers(0, 9), max_size=20), exponent=st.integers(-20, 10))
def test_values_come_back_within_half_a_step(
    dtype: torch.dtype, row_index: list[int], exponent: int
) -> None:
    rows = (random_rows(10, 24) * 2.0**exponent).to(dtype)

    packed, scales = reference.permute_int8(rows, torch.tensor(row_index, dtype=torch.int64))

    assert packed.dtype == torch.int8
    assert packed.shape == (len(row_index), 24)
    picked = rows[row_index].double()
    magnitude = picked.abs().amax(dim=1) if len(row_index) else picked.new_empty(0)
    torch.testing.assert_close(scales.double(), magnitude / 127, rtol=1e-6, atol=0.0)
    error = (packed.double() * scales.double()[:, None] - picked).abs()
    assert (error <= 0.5001 * magnitude[:, None] / 127).all()
    assert (packed.abs().amax(dim=1) == 127).all() if len(row_index) else True


def test_ties_go_to_even() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])

    packed, scales = reference.permute_int8(rows, torch.tensor([0]))

    assert packed.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scales.tolist() == [1.0]


def test_zeros_have_scale_zero_and_rows_that_are_not_finite_come_back_as_nan() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, 0.0], [1.0, nan], [-inf, 1.0], [2.0, -2.0]])

    packed, scales = reference.permute_int8(rows, torch.arange(4))
    back = reference.dequantize_rows(packed, scales, torch.float32)

    assert packed.tolist() == [[0, 0], [0, 0], [0, 0], [127, -127]]
    assert back[0].tolist() == [0.0, 0.0]
    assert back[1:3].isnan().all()
    assert back[3].tolist() == pytest.approx([2.0, -2.0])


def test_dequantising_may_reorder() -> None:
    packed, scales = reference.permute_int8(random_rows(5, 8), torch.arange(5))
    order = torch.tensor([4, 0, 0])

    back = reference.dequantize_rows(packed, scales, torch.bfloat16, order)

    whole = reference.dequantize_rows(packed, scales, torch.bfloat16)
    assert torch.equal(back, whole[order])
