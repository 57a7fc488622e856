"""Row-invariant products: right, and the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch

from lightmoe import kernels
from tests.kernels.rows import DTYPES, NUM_ROWS, assert_row_invariant, random_rows

SIZES = [(16, 16), (64, 48), (1, 1), (7, 5), (33, 20), (100, 129), (256, 1000), (515, 96)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 40])
def test_products_are_right(sizes: tuple[int, int], num_rows: int) -> None:
    width, num_outputs = sizes
    rows, weight = random_rows(num_rows, width), random_rows(num_outputs, width, seed=1)

    product = kernels.matmul(rows, weight)

    wanted = (rows.double() @ weight.double().t()).float()
    torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-6 * width)
    assert product.dtype == rows.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    width, num_outputs = sizes
    weight = random_rows(num_outputs, width, seed=1, dtype=dtype)
    rows = random_rows(NUM_ROWS, width, dtype=dtype)

    assert_row_invariant(lambda rows: kernels.matmul(rows, weight), rows)


def test_neighbours_that_are_not_finite_spoil_nobody_else() -> None:
    rows, weight = random_rows(20, 24), random_rows(12, 24, seed=1)
    spoilt = rows.clone()
    spoilt[3] = float("nan")
    spoilt[19] = float("inf")

    product, wanted = kernels.matmul(spoilt, weight), kernels.matmul(rows, weight)

    others = [row for row in range(20) if row not in (3, 19)]
    assert torch.equal(product[others], wanted[others])
