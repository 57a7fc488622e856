"""Tokens that only the device knows, where the next step finds them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.core import UNKNOWN_TOKEN, SequenceStep
from lightmoe.worker.chosen import ChosenTokens


def step_of(sequence_id: int, *token_ids: int) -> SequenceStep:
    return SequenceStep(sequence_id, token_ids, 0, (0,))


@given(
    tokens=st.dictionaries(st.integers(0, 99), st.integers(0, 1000), min_size=1, max_size=20),
    data=st.data(),
)
def test_every_sequence_finds_its_own_token(tokens: dict[int, int], data: st.DataObject) -> None:
    chosen = ChosenTokens(32, torch.device("cpu"))
    chosen.put(torch.tensor(list(tokens.values())))
    chosen.belong_to(list(tokens))
    order = data.draw(st.permutations(list(tokens)))

    steps = [chosen.named(step_of(one, 7, 8, UNKNOWN_TOKEN)) for one in order]

    found = chosen.fill(torch.tensor([token for step in steps for token in step.token_ids]))
    assert found.tolist() == [token for one in order for token in (7, 8, tokens[one])]


def test_known_tokens_stay_as_they_are() -> None:
    chosen = ChosenTokens(4, torch.device("cpu"))
    step = step_of(3, 5, 6)

    assert chosen.named(step) is step
    assert chosen.fill(torch.tensor([5, 6])).tolist() == [5, 6]


def test_what_was_no_token_is_one_that_exists() -> None:
    chosen = ChosenTokens(4, torch.device("cpu"))
    chosen.put(torch.tensor([-1, 9]))

    assert chosen.fill(torch.tensor([-1, -2])).tolist() == [0, 9]
    assert chosen.first(2).tolist() == [-1, 9]
