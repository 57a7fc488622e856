"""`LLM` on real Ray ranks: answers shaped like vLLM's, equal to transformers', and tidy ends."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import ray

from lightmoe import LLM, SamplingParams
from lightmoe.errors import RequestError, ShuttingDownError, UsageError
from tests.oracle import NUM_TOKENS, mixtral_lite_answers

PROMPT = "def fibonacci(n):"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Two homes and a spare, with room for few requests at once."""
    with LLM("mixtral-lite", gpus=3, spares=1, max_num_seqs=4, max_num_batched_tokens=96) as llm:
        yield llm


def encode(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text)


def test_greedy_tokens_equal_transformers(llm: LLM) -> None:
    wanted = mixtral_lite_answers()
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

    outputs = llm.generate(wanted.prompts, params)

    assert [output.outputs[0].token_ids for output in outputs] == wanted.tokens
    assert [output.prompt_token_ids for output in outputs] == wanted.prompts


def test_an_answer_has_the_fields_of_vllm(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, GREEDY)

    assert (output.prompt, output.prompt_token_ids) == (PROMPT, encode(llm, PROMPT))
    assert output.finished
    (answer,) = output.outputs
    assert answer.index == 0
    assert len(answer.token_ids) == 12
    assert llm.tokenizer is not None
    assert answer.text == llm.tokenizer.decode(answer.token_ids)
    assert (answer.finish_reason, answer.stop_reason) == ("length", None)
    assert (answer.logprobs, answer.cumulative_logprob) == (None, None)


def test_prompts_are_texts_ids_or_dicts(llm: LLM) -> None:
    ids = encode(llm, PROMPT)
    spellings = [
        PROMPT,
        [PROMPT],
        ids,
        tuple(ids),
        [ids],
        {"prompt": PROMPT},
        [{"prompt_token_ids": ids}],
    ]

    answers = [llm.generate(prompts, GREEDY) for prompts in spellings]

    assert [len(outputs) for outputs in answers] == [1] * len(spellings)
    assert len({tuple(outputs[0].outputs[0].token_ids) for outputs in answers}) == 1
    assert [outputs[0].prompt is None for outputs in answers] == [
        False,
        False,
        True,
        True,
        True,
        False,
        True,
    ]
    mixed = llm.generate([PROMPT, ids, {"prompt": PROMPT}], GREEDY)
    assert [output.outputs[0].text for output in mixed] == [answers[0][0].outputs[0].text] * 3
    assert llm.generate([], GREEDY) == []


def test_logprobs_are_dicts_of_the_most_likely(llm: LLM) -> None:
    greedy, sampled = llm.generate(
        [PROMPT, PROMPT],
        [
            SamplingParams(temperature=0.0, max_tokens=5, logprobs=3),
            SamplingParams(temperature=2.0, max_tokens=5, logprobs=0, seed=3),
        ],
    )

    (answer,) = greedy.outputs
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 5
    total = 0.0
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert [one.rank for one in entry.values()] == [1, 2, 3]
        values = [one.logprob for one in entry.values()]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0
        assert next(iter(entry)) == token  # greedy: the chosen one is the best
        assert llm.tokenizer is not None
        assert entry[token].decoded_token == llm.tokenizer.token_text(token)
        total += entry[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total)

    (answer,) = sampled.outputs
    assert answer.logprobs is not None
    assert [list(entry) for entry in answer.logprobs] == [[token] for token in answer.token_ids]
    assert all(entry[next(iter(entry))].rank is None for entry in answer.logprobs)


def test_n_answers_of_one_seed_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, temperature=1.0, max_tokens=12)

    first, again = (llm.generate(PROMPT, params)[0] for _ in range(2))

    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    texts = [answer.text for answer in first.outputs]
    assert len(set(texts)) == 3
    assert [answer.text for answer in again.outputs] == texts
    alone = SamplingParams(seed=8, temperature=1.0, max_tokens=12)
    assert llm.generate(PROMPT, alone)[0].outputs[0].text == texts[1]


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    whole = llm.generate(PROMPT, params)[0].outputs[0]
    word = max(whole.text.split(), key=len)
    stop = word[1:4]  # neither the beginning nor the end of a token, as a rule

    stopping = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=stop)
    answer = llm.generate(PROMPT, stopping)[0].outputs[0]

    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 40


def test_a_stop_token_ends_the_answer_and_is_not_spoken(llm: LLM) -> None:
    free = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    token = free.token_ids[3]
    first = free.token_ids.index(token)

    stopping = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(token,))
    answer = llm.generate(PROMPT, stopping)[0].outputs[0]

    assert answer.token_ids == free.token_ids[: first + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token)
    assert llm.tokenizer is not None
    assert answer.text == llm.tokenizer.decode(free.token_ids[:first])


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    each = [SamplingParams(temperature=0.0, max_tokens=size, ignore_eos=True) for size in (1, 9, 4)]

    outputs = llm.generate([PROMPT, "import os\n", "class A:"], each)

    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 9, 4]


def test_the_models_own_defaults_hold_without_params(llm: LLM) -> None:
    assert llm.default_sampling_params() == SamplingParams(temperature=0.0)

    (output,) = llm.generate(PROMPT)

    assert (
        output.outputs[0].token_ids
        == llm.generate(PROMPT, SamplingParams(temperature=0.0))[0].outputs[0].token_ids
    )


def test_a_chat_is_rendered_by_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "import os"}]

    (output,) = llm.chat(messages, GREEDY)

    assert llm.tokenizer is not None
    assert output.prompt_token_ids == llm.tokenizer.chat(messages)
    assert output.outputs[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "the prompt is empty"),
        ([[5, 3072]], GREEDY, "token id 3072 is not in 0 .. 3071"),
        ([[1] * 2048], GREEDY, "2048 tokens and max_tokens is 12, .* context of 2048"),
        ([PROMPT, PROMPT], [GREEDY], "2 prompts and 1 sampling_params"),
        ([{"text": PROMPT}], GREEDY, "a prompt is"),
        ([{"prompt_token_ids": []}], GREEDY, "the prompt is empty"),
        (5, GREEDY, "a prompt is"),
        ([[1, 2.5]], GREEDY, "a prompt is"),
        ([None], GREEDY, "a prompt is"),
        ([[1, True]], GREEDY, "a prompt is"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_one_served(
    llm: LLM, prompts: object, params: object, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)

    assert len(llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids) == 12


def test_one_bad_prompt_among_good_ones_ends_them_all_at_once(llm: LLM) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)

    with pytest.raises(RequestError, match="token id 9999"):
        llm.generate([[1, 2], [9999]], long)

    llm.generate(PROMPT, GREEDY)
    assert llm.expert_load().num_steps < 1000


def test_the_load_counts_every_pair_once(llm: LLM) -> None:
    before = llm.expert_load()

    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))

    after = llm.expert_load()
    num_tokens = len(output.prompt_token_ids) + 5  # the last token is not run
    tokens = after.expert_tokens - before.expert_tokens
    pairs = after.rank_pairs - before.rank_pairs
    assert tokens.sum(axis=1).tolist() == [2 * num_tokens] * 4
    assert pairs.sum(axis=0).tolist() == [2 * num_tokens] * 4
    assert after.rank_kinds == ["home", "home", "spare"]


def test_the_summary_says_what_was_chosen(llm: LLM) -> None:
    assert "cpu (" in llm.summary
    assert "float32, transport gloo, route waterfill" in llm.summary
    assert "2 homes + 1 spares" in llm.summary
    assert "kernels: reference (the CPU), deterministic on" in llm.summary
    assert llm.summary.endswith("no overlap: this transport waits for the host")


def test_close_ends_it_for_good_and_may_be_called_twice(llm: LLM) -> None:
    with LLM("mixtral-lite", gpus=1, max_model_len=256) as other:
        assert other.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
        assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids  # two live side by side
    other.close()

    with pytest.raises(ShuttingDownError):
        other.generate(PROMPT, GREEDY)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    assert ray.is_initialized()


def test_a_typo_in_an_option_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean max_num_seqs"):
        LLM("mixtral-lite", max_num_seq=4)
