"""Tokens and logits equal transformers', for any number of ranks and either placement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightmoe.config import LaunchConfig
from lightmoe.core import SamplingParams
from tests.oracle import MIXTRAL_LITE, NUM_TOKENS, Answers, greedy_answers, mixtral_lite_answers
from tests.worker.groups import generate, new_config, recorded_logits, running_engine

MAX_LOGIT_DIFFERENCE = 1e-4
MAX_NUM_BATCHED_TOKENS = 96


def assert_equal_answers(
    folder: Path, wanted: Answers, num_ranks: int, num_spares: int, max_model_len: int
) -> None:
    # Few ranks have requests that wait; many, slow as threads, run all of them at once.
    max_num_seqs = {1: 12, 2: 6, 3: 4, 7: 3, 10: 2}[num_ranks]
    config = new_config(folder, num_ranks, num_spares, max_model_len, max_num_seqs)
    params = SamplingParams(temperature=0.0, max_tokens=len(wanted.tokens[0]), ignore_eos=True)
    with (
        running_engine(config, max_num_seqs, MAX_NUM_BATCHED_TOKENS) as engine,
        recorded_logits() as recorder,
    ):
        tokens = generate(engine, wanted.prompts, params)
        stats = engine.stats()
    for place, (ours, theirs) in enumerate(zip(tokens, wanted.tokens, strict=True)):
        assert ours == theirs, f"prompt {place}"
        difference = np.abs(recorder.of_sequence(place) - wanted.logits[place]).max()
        assert difference <= MAX_LOGIT_DIFFERENCE, f"prompt {place}"
    assert stats.num_preemptions == 0
    # Prompts longer than the budget ran in chunks.
    assert max(map(len, wanted.prompts)) > MAX_NUM_BATCHED_TOKENS


@pytest.mark.parametrize(
    ("num_ranks", "placement", "spares"),
    [
        # Below four ranks there are no spares unless asked for: both placements are the same.
        (1, "spare", None),
        (2, "spread", None),
        (2, "spare", 1),
        (3, "spread", None),
        (3, "spare", 1),
        (7, "spread", None),
        (7, "spare", None),
        (10, "spread", None),
        (10, "spare", None),
    ],
)
def test_mixtral_lite(num_ranks: int, placement: str, spares: int | None) -> None:
    launch = LaunchConfig(
        model=str(MIXTRAL_LITE), gpus=num_ranks, placement=placement, spares=spares
    )
    wanted = mixtral_lite_answers()
    assert len(wanted.prompts) == 20
    assert all(len(tokens) == NUM_TOKENS for tokens in wanted.tokens)

    assert_equal_answers(MIXTRAL_LITE, wanted, num_ranks, launch.num_spares, max_model_len=1024)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}


def save_random(model: PreTrainedModel, folder: Path) -> Path:
    """Random weights wide enough that the best token is far from the second; norms not one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(noise * scale + (parameter.dim() == 1))
    model.eval()
    model.save_pretrained(folder)
    return folder


def random_prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 100, size=size).tolist() for size in (1, 7, 40, 130)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_random_mixtral_with_and_without_a_head_of_its_own(
    tmp_path: Path, num_ranks: int, tied: bool
) -> None:
    config = MixtralConfig(
        **SMALL, intermediate_size=28, num_local_experts=5, tie_word_embeddings=tied
    )
    model = MixtralForCausalLM(config)
    folder = save_random(model, tmp_path)

    wanted = greedy_answers(model, random_prompts(), 16)

    assert_equal_answers(folder, wanted, num_ranks, 0, max_model_len=256)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_spares"), [(1, 0), (3, 1)])
def test_a_random_qwen3_moe(
    tmp_path: Path, num_ranks: int, num_spares: int, norm_topk_prob: bool
) -> None:
    config = Qwen3MoeConfig(
        **SMALL,
        moe_intermediate_size=20,
        num_experts=9,
        num_experts_per_tok=3,
        norm_topk_prob=norm_topk_prob,
    )
    model = Qwen3MoeForCausalLM(config)
    folder = save_random(model, tmp_path)

    wanted = greedy_answers(model, random_prompts(), 16)

    assert_equal_answers(folder, wanted, num_ranks, num_spares, max_model_len=256)
