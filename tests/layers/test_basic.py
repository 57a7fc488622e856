"""Norm, rotary positions and products: right, and the same bits for a row in any company."""

from __future__ import annotations

import math

import pytest
import torch

from lightmoe import kernels
from lightmoe.kernels import rotate
from lightmoe.layers.basic import HeadLinear, Linear, RMSNorm, Rotary
from tests.kernels.rows import DTYPES, NUM_ROWS, assert_row_invariant, random_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [16, 33, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_a_row_depends_on_that_row_only(dtype: torch.dtype, width: int) -> None:
    norm = RMSNorm(random_rows(1, width, seed=1, dtype=dtype)[0], 1e-5)

    assert_row_invariant(norm, 3.0 * random_rows(NUM_ROWS, width, dtype=dtype))


def test_norm_divides_by_the_root_mean_square() -> None:
    rows, weight = 3.0 * random_rows(5, 12), random_rows(1, 12, seed=1)[0]

    wide = rows.double()
    wanted = weight * wide / torch.sqrt((wide**2).mean(dim=1, keepdim=True) + 1e-5)
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(rows).double(), wanted, rtol=1e-5, atol=1e-6)


def test_norm_of_heads_works_over_the_last_axis() -> None:
    heads = random_rows(6, 8).view(2, 3, 8)
    norm = RMSNorm(torch.ones(8), 1e-5)

    assert torch.equal(norm(heads).view(6, 8), norm(heads.view(6, 8)))


@pytest.mark.parametrize("head_dim", [8, 32, 6])
def test_rotation_turns_pairs_by_position_times_frequency(head_dim: int) -> None:
    theta, positions = 10000.0, torch.tensor([0, 1, 5, 90])
    heads = random_rows(4 * 3, head_dim).view(4, 3, head_dim)

    turned = rotate(heads, Rotary(head_dim, theta, 100, CPU).tables(positions, torch.float32))

    half = head_dim // 2
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position / theta ** (2 * i / head_dim)
            first, second = heads[token, :, i], heads[token, :, i + half]
            cos, sin = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(
                turned[token, :, i], first * cos - second * sin, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                turned[token, :, i + half], second * cos + first * sin, rtol=1e-4, atol=1e-5
            )


def test_rotation_of_a_token_depends_on_that_token_only() -> None:
    rotary, head_dim = Rotary(24, 10000.0, NUM_ROWS, CPU), 24
    tagged = torch.cat(
        [random_rows(NUM_ROWS, 2 * head_dim), torch.arange(NUM_ROWS)[:, None]], dim=1
    )

    def turn(tagged: torch.Tensor) -> torch.Tensor:
        tables = rotary.tables(tagged[:, -1].long(), torch.float32)
        return rotate(tagged[:, :-1].reshape(len(tagged), 2, head_dim), tables)

    assert_row_invariant(turn, tagged)


def test_linear_multiplies_by_the_transposed_weight() -> None:
    rows, weight = random_rows(5, 12), random_rows(7, 12, seed=1)

    torch.testing.assert_close(Linear(weight)(rows), rows @ weight.t())


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_heads_of_any_number_of_tokens_are_packed_rows(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    product = kernels.grouped_gemm
    monkeypatch.setattr(
        kernels, "grouped_gemm", lambda rows, *rest: given.append(rows) or product(rows, *rest)
    )
    heads = random_rows(num_tokens, 4 * 24).view(num_tokens, 4, 24)[:, :, :16]  # of wider rows
    weights = random_rows(4 * 8, 16, seed=1).view(4, 8, 16)

    products = HeadLinear(weights)(heads)

    assert given[0].stride() == (16, 1)
    wanted = torch.einsum("thd,hnd->thn", heads.double(), weights.double())
    torch.testing.assert_close(products.double(), wanted, rtol=1e-5, atol=1e-5)
