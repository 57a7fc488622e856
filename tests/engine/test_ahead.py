"""The engine plans a step while the one before it runs, and nobody sees it in the answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fakes import EOS, Answer, FakeWorkers, expected_tokens, new_engine, new_request

PROMPT = (1, 2, 3)


def answers_of(
    workers: FakeWorkers, requests: Sequence[dict[str, object]], **limits: int
) -> list[Answer]:
    """All at once."""
    engine = new_engine(workers, **limits)
    answers = [Answer() for _ in requests]
    for number, (options, answer) in enumerate(zip(requests, answers, strict=True)):
        engine.submit(new_request(str(number), **options), answer)
    engine.start()
    try:
        return [answer.wait() for answer in answers]
    finally:
        engine.close()


def test_two_steps_are_under_way() -> None:
    workers = FakeWorkers()

    (answer,) = answers_of(workers, [{"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}])

    assert answer.token_ids == expected_tokens(PROMPT, 8)
    assert workers.most_under_way == 2
    assert len(workers.batches) == 8, "nothing is run behind the last token"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_where_the_next_token_depends_on_the_last_one_is(penalty: str) -> None:
    workers = FakeWorkers()

    (answer,) = answers_of(workers, [{"prompt": PROMPT, "max_tokens": 8, penalty: 0.5}])

    assert len(answer.token_ids) <= 8
    assert workers.most_under_way == 1


def test_a_token_behind_the_end_is_nobodys() -> None:
    prompt = next((one, 5) for one in range(50) if EOS in expected_tokens((one, 5), 20)[2:10])
    workers = FakeWorkers()

    (answer,) = answers_of(workers, [{"prompt": prompt, "max_tokens": 40}])

    wanted = expected_tokens(prompt, 40, (EOS,))
    assert answer.token_ids == wanted
    assert len(workers.batches) == len(wanted) + 1


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 49), min_size=1, max_size=18).map(tuple),
        "max_tokens": st.integers(1, 20),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 1),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    }
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    asked=st.lists(requests, min_size=1, max_size=9),
    num_blocks=st.integers(10, 24),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 16),
)
def test_answers_are_those_of_one_step_at_a_time(
    asked: list[dict[str, object]], num_blocks: int, max_num_seqs: int, budget: int
) -> None:
    """Preempted or not, in whatever company, and though blocks change hands under way."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    workers = FakeWorkers(num_ranks=2, num_blocks=num_blocks, **limits)

    answers = answers_of(workers, asked, max_model_len=40, **limits)

    for options, answer in zip(asked, answers, strict=True):
        stops = () if options["ignore_eos"] else (EOS,)
        prompt, most = options["prompt"], options["max_tokens"]
        least = options["min_tokens"]
        assert answer.token_ids == expected_tokens(prompt, most, stops, least)  # type: ignore[arg-type]
