"""The gate: softmax scores, the best first, ties to the lowest index."""

from __future__ import annotations

import pytest
import torch

from lightmoe import kernels
from tests.kernels.rows import NUM_ROWS, assert_row_invariant, random_rows


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_experts", "num_per_token"), [(8, 2), (7, 3), (128, 8), (1, 1)])
def test_the_best_experts_and_their_scores(
    num_experts: int, num_per_token: int, renormalize: bool
) -> None:
    hidden, router = random_rows(NUM_ROWS, 24), random_rows(num_experts, 24, seed=1)

    experts, weights = kernels.topk_gate(
        hidden, router, num_per_token, renormalize=renormalize, scale=1.5
    )

    scores = (hidden.double() @ router.double().t()).softmax(dim=1)
    best = scores.topk(num_per_token, dim=1)
    wanted = best.values / best.values.sum(dim=1, keepdim=True) if renormalize else best.values
    assert experts.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert torch.equal(experts, best.indices)
    torch.testing.assert_close(weights.double(), 1.5 * wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_experts", "width"), [(8, 64), (7, 33), (60, 20)])
def test_a_choice_is_the_same_in_any_company(
    num_experts: int, width: int, dtype: torch.dtype
) -> None:
    router = random_rows(num_experts, width, seed=1, dtype=dtype)
    hidden = random_rows(NUM_ROWS, width, dtype=dtype)

    for part in (0, 1):
        assert_row_invariant(
            lambda rows, part=part: kernels.topk_gate(rows, router, 3, renormalize=True)[part],
            hidden,
        )


def test_ties_go_to_the_lowest_index() -> None:
    router = torch.zeros(9, 4)
    router[3] = router[5] = router[8] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    hidden = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0]])

    experts, _ = kernels.topk_gate(hidden, router, 4, renormalize=True)

    assert experts.tolist() == [[0, 1, 2, 3], [3, 5, 8, 0], [0, 1, 2, 4]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_still_choose_experts_that_exist(poison: float) -> None:
    hidden, router = random_rows(5, 8), random_rows(6, 8, seed=1)
    clean, _ = kernels.topk_gate(hidden, router, 2, renormalize=True)
    hidden[2] = poison

    experts, _ = kernels.topk_gate(hidden, router, 2, renormalize=True)

    assert ((experts >= 0) & (experts < 6)).all()
    assert all(len(set(row)) == 2 for row in experts.tolist())
    others = [0, 1, 3, 4]
    assert torch.equal(experts[others], clean[others])


def test_no_tokens_make_no_choice() -> None:
    experts, weights = kernels.topk_gate(torch.empty(0, 8), random_rows(6, 8), 2, renormalize=True)

    assert experts.shape == weights.shape == (0, 2)
