"""Which road an operator takes, as far as it shows without a GPU."""

from __future__ import annotations

import pytest
import torch

from lightmoe import kernels
from lightmoe.kernels import PairGroups, reference
from tests.kernels.rows import DTYPES, random_rows

GROUPS = PairGroups.from_counts([1, 0], [3, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_runs_the_reference_whatever_the_dtype_and_mode(dtype: torch.dtype) -> None:
    rows = random_rows(5, 16, dtype=dtype)
    weights = random_rows(2 * 32, 16, seed=1, dtype=dtype).view(2, 32, 16)
    router = random_rows(4, 16, seed=2, dtype=dtype)
    pair_index = torch.tensor([[0, 3], [4, 1]])

    for deterministic in (True, False):
        product = kernels.matmul(rows, weights[0], deterministic=deterministic)
        assert torch.equal(product, reference.matmul(rows, weights[0]))
        grouped = kernels.grouped_gemm(
            rows, weights, GROUPS, swiglu=True, max_ctas=7, deterministic=deterministic
        )
        assert torch.equal(grouped, reference.grouped_gemm(rows, weights, GROUPS, swiglu=True))
        experts, _ = kernels.topk_gate(
            rows, router, 2, renormalize=True, deterministic=deterministic
        )
        assert torch.equal(experts, reference.topk_gate(rows, router, 2, renormalize=True)[0])
    combined = kernels.combine(rows, pair_index, None, max_ctas=7)
    assert torch.equal(combined, reference.combine(rows, pair_index, None))
    assert torch.equal(kernels.permute(rows, pair_index[0]), rows[pair_index[0]])


def test_a_tile_of_the_reference_is_its_block() -> None:
    weights = random_rows(2 * 32, 16, dtype=torch.float16).view(2, 32, 16)

    assert kernels.tokens_per_tile(weights, 100, 2) == reference.BLOCK_ROWS


def test_products_leave_the_reference_in_float32_where_asked() -> None:
    rows, weight = (
        random_rows(3, 16, dtype=torch.bfloat16),
        random_rows(8, 16, dtype=torch.bfloat16),
    )

    product = kernels.matmul(rows, weight, output_float32=True)

    assert product.dtype == torch.float32
    assert torch.equal(product.bfloat16(), kernels.matmul(rows, weight))
