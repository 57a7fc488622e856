"""The sampler against plain references: what may be chosen, how often, and by which number."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from lightmoe.core import SamplingStep
from lightmoe.worker.sampler import INVALID_TOKEN, sample

VOCAB_SIZE = 40


def random_logits(seed: int, spread: float = 3.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (spread * generator.standard_normal(VOCAB_SIZE)).astype(np.float32)


def new_step(**changes: object) -> SamplingStep:
    values = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 11,
        "position": 0,
    }
    return SamplingStep(**{**values, **changes})


def kept_shares(logits: np.ndarray, step: SamplingStep) -> list[tuple[int, float]]:
    """(token, share) of what may be chosen, best first: the filters one token at a time."""
    scaled = [float(logit) / step.temperature for logit in logits]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if step.top_k:
        order = order[: step.top_k]
    total = sum(weights[token] for token in order)
    nucleus, mass = [], 0.0
    for token in order:
        if step.top_p < 1.0 and mass >= step.top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    kept = [token for token in nucleus if weights[token] >= step.min_p * weights[order[0]]]
    left = sum(weights[token] for token in kept)
    return [(token, weights[token] / left) for token in kept]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_temperature_zero_takes_the_best_and_the_first_among_equals(seed: int) -> None:
    logits = random_logits(seed)
    assert sample(4, logits, new_step(temperature=0.0)).token_id == int(logits.argmax())

    logits[[30, 12, 21]] = logits.max() + 1
    token = sample(4, logits, new_step(temperature=0.0))
    assert (token.sequence_id, token.token_id) == (4, 12)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.05, 2.0),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB_SIZE, 10 * VOCAB_SIZE]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
    position=st.integers(0, 1000),
)
def test_the_choice_is_where_the_random_number_falls_among_what_is_kept(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, position: int
) -> None:
    logits = random_logits(seed)
    step = new_step(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed - 2**31,
        position=position,
    )

    token = sample(0, logits, step).token_id

    key = np.array([step.seed, step.position], dtype=np.int64).view(np.uint64)
    point = np.random.Generator(np.random.Philox(key=key)).random()
    tokens, shares = zip(*kept_shares(logits, step), strict=True)
    place = int(np.searchsorted(np.cumsum(shares), point, side="right"))
    assert token == tokens[min(place, len(tokens) - 1)]


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5}], ids=str
)
def test_tokens_come_as_often_as_their_probability_says(filters: dict[str, float]) -> None:
    logits, num_draws = random_logits(0, spread=1.5), 4000

    drawn = Counter(
        sample(0, logits, new_step(position=place, **filters)).token_id
        for place in range(num_draws)
    )

    shares = dict(kept_shares(logits, new_step(**filters)))
    assert set(drawn) <= set(shares)
    for token, share in shares.items():
        deviation = math.sqrt(num_draws * share * (1 - share))
        assert abs(drawn[token] - num_draws * share) <= 5 * deviation + 1e-9


def test_seed_and_position_decide_alone() -> None:
    logits = random_logits(1, spread=1.0)

    def draw(**changes: object) -> list[int]:
        return [sample(0, logits, new_step(position=p, **changes)).token_id for p in range(30)]

    assert draw(seed=5) == draw(seed=5)
    assert draw(seed=5) == [
        sample(9, logits, new_step(seed=5, position=p, num_logprobs=3)).token_id for p in range(30)
    ]
    assert draw(seed=5) != draw(seed=6)
    assert draw(seed=-5) != draw(seed=5)
    assert len(set(draw(seed=5))) > 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-6])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    logits = random_logits(2)

    assert sample(0, logits, new_step(temperature=temperature)).token_id == int(logits.argmax())


@pytest.mark.parametrize("history", [(), (3,), (1, 2, 3, 3, 5, 39)])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(
    history: tuple[int, ...], penalty: float
) -> None:
    if not history or penalty == 1.0:
        adjusted = random_logits(3)
    else:
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        adjusted = processor(torch.tensor([history]), torch.from_numpy(random_logits(3))[None])[0]
        adjusted = adjusted.numpy()

    for place in range(20):
        step = new_step(position=place, repetition_penalty=penalty, history=history)
        token = sample(0, random_logits(3), step).token_id
        assert token == sample(0, adjusted, new_step(position=place)).token_id


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    history=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
    num_prompt_tokens=st.integers(0, 30),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_presence_and_frequency_count_the_answer_only(
    history: list[int], num_prompt_tokens: int, presence: float, frequency: float
) -> None:
    logits = random_logits(4)
    adjusted = logits.astype(np.float64)
    for token, count in Counter(history[num_prompt_tokens:]).items():
        adjusted[token] -= presence + frequency * count

    step = new_step(
        temperature=0.0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        history=tuple(history),
        num_prompt_tokens=num_prompt_tokens,
    )

    assert sample(0, logits, step).token_id == int(adjusted.argmax())


def test_banned_tokens_are_never_chosen() -> None:
    logits = random_logits(5)
    best = [int(token) for token in np.argsort(-logits)]
    banned = tuple(best[:3])

    assert sample(0, logits, new_step(temperature=0.0, banned_ids=banned)).token_id == best[3]
    for place in range(200):
        assert sample(0, logits, new_step(position=place, banned_ids=banned)).token_id not in banned


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(num_logprobs: int) -> None:
    logits = random_logits(6)
    step = new_step(
        temperature=0.3,
        top_k=4,
        num_logprobs=num_logprobs,
        presence_penalty=1.0,
        history=(1, 2),
        num_prompt_tokens=1,
    )

    token = sample(0, logits, step)

    wanted = torch.from_numpy(logits).double().log_softmax(dim=0)
    best = wanted.topk(num_logprobs)
    assert [candidate for candidate, _ in token.top] == best.indices.tolist()
    assert [logprob for _, logprob in token.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert token.logprob == pytest.approx(wanted[token.token_id].item(), abs=1e-9)


def test_no_logprobs_unless_asked() -> None:
    token = sample(0, random_logits(7), new_step())

    assert (token.logprob, token.top) == (0.0, ())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_choose_no_token(poison: float, temperature: float) -> None:
    logits = random_logits(8)
    logits[17] = poison

    token = sample(3, logits, new_step(temperature=temperature, num_logprobs=2))

    assert (token.sequence_id, token.token_id) == (3, INVALID_TOKEN)
