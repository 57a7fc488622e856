"""The sampler of whole batches: the tokens of the sampler of single rows, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.core import SamplingStep
from lightmoe.worker.device_sampler import sample_rows, stays_on_device
from lightmoe.worker.sampler import INVALID_TOKEN, sample

VOCAB_SIZE = 40
FIELDS = {
    "temperature": st.sampled_from([0.0, 1e-5, 0.3, 1.0, 2.0]),
    "top_k": st.sampled_from([-1, 0, 1, 2, 7, VOCAB_SIZE, 10 * VOCAB_SIZE]),
    "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "seed": st.integers(-(2**31), 2**31 - 1),
    "position": st.integers(0, 1000),
}
STEPS = st.builds(SamplingStep, **FIELDS)
PLAIN = SamplingStep(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=1, position=0)


def random_logits(num_rows: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (3.0 * generator.standard_normal((num_rows, VOCAB_SIZE))).astype(np.float32)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(steps=st.lists(STEPS, min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_a_batch_gets_the_tokens_of_its_rows_alone(steps: list[SamplingStep], seed: int) -> None:
    logits = random_logits(len(steps), seed)

    tokens = sample_rows(torch.from_numpy(logits), steps).tolist()

    pairs = list(zip(logits, steps, strict=True))
    assert tokens == [sample(0, row, step).token_id for row, step in pairs]
    for row, step, token in zip(logits, steps, tokens, strict=True):
        assert sample_rows(torch.from_numpy(row[None]), [step]).tolist() == [token]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_logits_of_greedy_rows_go_to_the_lowest_token(temperature: float) -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, [7, 11]] = 60.0
    steps = [
        SamplingStep(temperature, top_p=1.0, top_k=1, min_p=0.0, seed=place, position=0)
        for place in range(2)
    ]

    assert sample_rows(logits, steps).tolist() == [7, 7]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_row_that_is_not_finite_gets_no_token_and_spoils_no_other(
    poison: float, top_k: int
) -> None:
    logits = torch.from_numpy(random_logits(3, seed=5))
    steps = [
        SamplingStep(1.0, top_p=1.0, top_k=top_k, min_p=0.0, seed=place, position=0)
        for place in range(3)
    ]
    clean = sample_rows(logits, steps).tolist()
    logits[1, 4] = poison

    assert sample_rows(logits, steps).tolist() == [clean[0], INVALID_TOKEN, clean[2]]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    num_draws = 4000
    logits = torch.from_numpy(random_logits(1, seed=0) / 2)
    steps = [
        SamplingStep(1.0, top_p=1.0, top_k=0, min_p=0.0, seed=11, position=place)
        for place in range(num_draws)
    ]

    drawn = np.bincount(sample_rows(logits.expand(num_draws, -1), steps), minlength=VOCAB_SIZE)

    shares = logits[0].double().softmax(dim=0).numpy()
    deviation = np.sqrt(shares * (1 - shares) * num_draws)
    assert (np.abs(drawn - shares * num_draws) < 5 * deviation + 1).all()


@pytest.mark.parametrize(
    ("step", "stays"),
    [
        (PLAIN, True),
        (SamplingStep(0.0, 0.9, 5, 0.1, seed=0, position=3), True),
        (SamplingStep(0.0, 1.0, 0, 0.0, seed=0, position=0, num_logprobs=0), False),
        (SamplingStep(0.0, 1.0, 0, 0.0, seed=0, position=0, history=(1,)), False),
        (SamplingStep(0.0, 1.0, 0, 0.0, seed=0, position=0, banned_ids=(2,)), False),
    ],
)
def test_what_needs_more_than_its_row_goes_to_the_host(step: SamplingStep, stays: bool) -> None:
    assert stays_on_device(step) is stays
