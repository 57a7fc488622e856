"""Ten ranks on one GPU, end to end over NCCL: the tokens of the CPU. Run with pytest -m gpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightmoe import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def __init__", "for i in range("]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def wanted() -> Iterator[list[list[int]]]:
    with LLM("mixtral-lite", gpus=1, device="cpu") as llm:
        yield tokens_of(llm)


@pytest.mark.parametrize("placement", ["spare", "spread"])
def test_ten_ranks_on_a_gpu_give_the_tokens_of_the_cpu(
    wanted: list[list[int]], placement: str
) -> None:
    with LLM(
        "mixtral-lite",
        gpus=10,
        device="cuda",
        oversubscribe=True,
        dtype="float32",
        transport="nccl",
        placement=placement,
    ) as llm:
        assert "transport nccl" in llm.summary
        assert llm.summary.startswith("cuda (10 ranks on ")
        assert tokens_of(llm) == wanted
        assert tokens_of(llm) == wanted


def test_sixteen_bits_are_those_of_one_rank() -> None:
    with LLM("mixtral-lite", gpus=1, device="cuda") as llm:
        alone = tokens_of(llm)
    with LLM("mixtral-lite", gpus=10, oversubscribe=True, transport="nccl") as llm:
        assert "transport nccl" in llm.summary
        assert "kernels: liblight_ops" in llm.summary
        assert tokens_of(llm) == alone
