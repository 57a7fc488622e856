"""The gate's rules on any numbers: sigmoid scores, bias, groups, what is not finite, ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.kernels import reference
from tests.kernels.gate_oracle import gate_row
from tests.kernels.rows import NUM_ROWS, assert_row_invariant, random_rows

NOT_FINITE = [math.nan, math.inf, -math.inf]
GROUPS = [(6, 1, 1, 2), (8, 4, 2, 3), (12, 3, 1, 4), (12, 6, 3, 2)]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_any_logits_choose_as_said(
    scoring: str, groups: tuple[int, int, int, int], data: st.DataObject
) -> None:
    num_experts, num_groups, num_groups_per_token, num_chosen = groups
    # Quarters: many ties, and sums of scores whose order rounding does not change.
    number = st.integers(-12, 12).map(lambda value: value / 4) | st.sampled_from(NOT_FINITE)
    row = data.draw(st.lists(number, min_size=num_experts, max_size=num_experts))
    rule = {
        "renormalize": data.draw(st.booleans()),
        "scale": 2.5,
        "num_groups": num_groups,
        "num_groups_per_token": num_groups_per_token,
        "scoring": scoring,
    }

    experts, weights = reference.topk_gate(
        None, None, num_chosen, logits=torch.tensor([row]), **rule
    )

    wanted, wanted_weights = gate_row(row, num_chosen, **rule)
    assert experts.tolist() == [wanted]
    assert weights[0].tolist() == pytest.approx(wanted_weights, rel=1e-5, abs=1e-9)


def test_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([1.0, 0.0, 0.0, -1.0])

    experts, weights = reference.topk_gate(
        None, None, 2, logits=logits, renormalize=False, scoring="sigmoid", bias=bias
    )

    assert experts.tolist() == [[0, 2]]
    assert weights[0].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2.0))])


def test_groups_count_their_best_two_with_sigmoid_and_the_best_with_softmax() -> None:
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    rule = {"renormalize": True, "num_groups": 2, "num_groups_per_token": 1}

    by_best, _ = reference.topk_gate(None, None, 2, logits=logits, **rule)
    by_two, _ = reference.topk_gate(None, None, 2, logits=logits, scoring="sigmoid", **rule)

    assert by_best.tolist() == [[0, 1]]
    assert by_two.tolist() == [[2, 3]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("poison", NOT_FINITE)
def test_weights_are_finite_whatever_the_logits(scoring: str, poison: float) -> None:
    logits = torch.full((1, 5), poison)

    experts, weights = reference.topk_gate(
        None, None, 3, logits=logits, renormalize=False, scoring=scoring
    )

    assert experts.tolist() == [[0, 1, 2]]
    score = 0.2 if scoring == "softmax" else float(poison == math.inf)
    assert weights[0].tolist() == pytest.approx([score] * 3)


def test_scores_that_are_all_zero_renormalise_to_zero() -> None:
    logits = torch.full((1, 4), -math.inf)

    _, weights = reference.topk_gate(
        None, None, 2, logits=logits, renormalize=True, scoring="sigmoid"
    )

    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("num_experts", [7, 8, 33])
def test_sigmoid_choices_are_the_same_in_any_company(num_experts: int) -> None:
    logits = random_rows(NUM_ROWS, num_experts)
    for part in (0, 1):
        assert_row_invariant(
            lambda rows, part=part: reference.topk_gate(
                None, None, 3, logits=rows, renormalize=True, scoring="sigmoid"
            )[part],
            logits,
        )
