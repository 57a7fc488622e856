"""One rank on one GPU, end to end. Run where there is a card: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from lightmoe import LLM, SamplingParams
from tests.test_end_to_end import launched

pytestmark = pytest.mark.gpu

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def __init__", "for i in range("]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def cpu() -> Iterator[LLM]:
    with LLM("mixtral-lite", gpus=1, device="cpu") as llm:
        yield llm


def first_tokens(llm: LLM) -> list[tuple[int, float]]:
    """The most likely first token of every prompt, and how far ahead of the next it is."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    found = []
    for output in llm.generate(PROMPTS, params):
        assert output.outputs[0].logprobs is not None
        (best, second) = output.outputs[0].logprobs[0].values()
        found.append((output.outputs[0].token_ids[0], best.logprob - second.logprob))
    return found


def test_float32_on_the_gpu_gives_the_tokens_of_the_cpu(cpu: LLM) -> None:
    with LLM("mixtral-lite", gpus=1, device="cuda", dtype="float32") as gpu:
        assert gpu.summary.startswith("cuda")
        assert "kernels: reference (float32)" in gpu.summary
        there = [output.outputs[0].token_ids for output in gpu.generate(PROMPTS, GREEDY)]
    assert there == [output.outputs[0].token_ids for output in cpu.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("deterministic", ["on", "off"])
def test_auto_takes_the_gpu_for_one_rank_and_agrees_where_the_choice_is_clear(
    cpu: LLM, deterministic: str
) -> None:
    with LLM("mixtral-lite", gpus=1, deterministic=deterministic) as gpu:
        assert gpu.summary.startswith("cuda")
        assert "kernels: liblight_ops sm_" in gpu.summary
        there = first_tokens(gpu)
    for (token, _), (expected, gap) in zip(there, first_tokens(cpu), strict=True):
        assert token == expected or gap <= 0.25


def test_several_ranks_take_the_cpu_and_say_so() -> None:
    with LLM("mixtral-lite", gpus=2) as llm:
        assert llm.summary.startswith("cpu (1 GPU(s) found")


def test_greedy_decoding_through_the_server_is_that_of_the_library() -> None:
    with LLM("mixtral-lite", gpus=1, device="cuda") as llm:
        wanted = [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]
    with launched("--gpus", "1", "--device", "cuda") as server:
        body = {"model": "mixtral-lite", "temperature": 0, "max_tokens": 16}
        found = [
            httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": prompt}, timeout=60)
            for prompt in PROMPTS
        ]
    assert [answer.json()["choices"][0]["text"] for answer in found] == wanted
