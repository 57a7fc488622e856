"""combine against the reference, bit by bit; needs `make kernels`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.combine import combine
from tests.gpus import half_dtypes

pytestmark = pytest.mark.gpu
SIZES = [(1, 8, 1), (5, 40, 3), (64, 4096, 2), (777, 2048, 8), (3, 7168, 16)]


def rows_of(num_rows: int, width: int, dtype_name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(num_rows, width, device="cuda", generator=generator)
    return rows.to(getattr(torch, dtype_name))


@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("dtype_name", half_dtypes())
@pytest.mark.parametrize(("num_tokens", "width", "num_per_token"), SIZES)
def test_combine_has_the_bits_of_the_reference(
    num_tokens: int,
    width: int,
    num_per_token: int,
    dtype_name: str,
    with_weights: bool,
    with_addend: bool,
) -> None:
    pairs = rows_of(num_tokens * num_per_token, width, dtype_name)
    order = torch.randperm(len(pairs), device="cuda").int().view(num_tokens, num_per_token)
    weights = torch.rand(num_tokens, num_per_token, device="cuda") if with_weights else None
    addend = rows_of(num_tokens, width, dtype_name, seed=1) if with_addend else None

    combined = combine(pairs, order, weights, addend)

    wanted = reference.combine(
        pairs.cpu(),
        order.cpu(),
        None if weights is None else weights.cpu(),
        None if addend is None else addend.cpu(),
    )
    assert torch.equal(combined.cpu(), wanted)
    assert torch.equal(combine(pairs, order, weights, addend, max_ctas=2), combined)
    few = slice(0, 1)
    alone = combine(
        pairs,
        order[few],
        None if weights is None else weights[few],
        None if addend is None else addend[few],
    )
    assert torch.equal(alone, combined[few])


def test_nothing_to_combine() -> None:
    none = torch.empty(0, 2, dtype=torch.int32, device="cuda")

    assert combine(rows_of(4, 16, "float16"), none, None).shape == (0, 16)


def test_a_pair_that_does_not_exist_adds_nothing() -> None:
    pairs = rows_of(4, 16, "float16")
    index = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32, device="cuda")

    combined = combine(pairs, index, None)

    assert torch.equal(combined[0], pairs[1])
    assert not combined[1].any()
