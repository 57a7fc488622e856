"""Ranks with fewer slots than experts: the tokens of ranks that hold all, counts that add up."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightmoe import LLM
from lightmoe.core import EngineStats, HostTierCounts, SamplingParams, StepResult
from lightmoe.models.find import find_model
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.residency import Key, Residency
from lightmoe.worker import channel
from lightmoe.worker.config import WorkerConfig
from tests.worker.groups import generate, new_config, running_engine

PROMPTS = [tuple((7 * one + 3 * place) % 3000 for place in range(3 + 9 * one)) for one in range(6)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
EXPERT_BYTES = 3 * 256 * 256 * 4  # of mixtral-lite in float32


def tier_config(num_ranks: int, expert_slots: int | None) -> WorkerConfig:
    config = new_config(find_model("mixtral-lite"), num_ranks, max_model_len=128, max_num_seqs=4)
    placement = initial_placement(len(config.model.moe_layers), 8, num_ranks)
    return replace(config, placement=placement, expert_slots=expert_slots)


def answers(num_ranks: int, expert_slots: int | None) -> tuple[list[list[int]], EngineStats]:
    with running_engine(tier_config(num_ranks, expert_slots), 4, 24) as engine:
        return generate(engine, PROMPTS, PARAMS), engine.stats()


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    tokens, stats = answers(1, None)
    assert stats.host_tier is None
    return tokens


@pytest.mark.parametrize(("num_ranks", "expert_slots"), [(1, 8), (1, 11), (4, 2), (4, 3), (3, 99)])
def test_tokens_are_those_of_ranks_that_hold_all(
    wanted: list[list[int]], num_ranks: int, expert_slots: int
) -> None:
    """The fewest slots that there may be, a third of the experts, and more than enough."""
    found, stats = answers(num_ranks, expert_slots)

    assert found == wanted
    tier = stats.host_tier
    assert tier is not None
    assert tier.num_misses > 0
    if expert_slots == 99:
        assert tier.fetched_bytes <= 32 * EXPERT_BYTES
        assert tier.hit_rate > 0.9
    else:
        assert 0 < tier.num_prefetched <= tier.num_hits
        assert tier.fetched_bytes > 32 * EXPERT_BYTES
    assert tier.fetched_bytes % EXPERT_BYTES == 0


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_slow_and_wrong_guesses_change_no_token(
    wanted: list[list[int]], num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies race with the layers, and what is fetched ahead is drawn at random."""
    pace, copy, ahead = random.Random(0), Residency._copy, Residency._fetch_ahead

    def late(residency: Residency, slot: int, row: int, free: torch.cuda.Event | None) -> None:
        residency._blobs[slot].fill_(float("nan"))
        time.sleep(pace.choice((0.0, 0.0002, 0.001)))
        copy(residency, slot, row, free)

    def wrong(
        residency: Residency, layer: int, needed: Sequence[int], wanted: Sequence[Key]
    ) -> None:
        held = [tuple(key) for key in np.argwhere(residency._rows >= 0).tolist()]
        ahead(residency, layer, needed, [key for key in pace.sample(held, 4) if key[0] != layer])

    monkeypatch.setattr(Residency, "_copy", late)
    monkeypatch.setattr(Residency, "_fetch_ahead", wrong)

    found, stats = answers(num_ranks, 11 if num_ranks == 1 else 3)

    assert found == wanted
    assert stats.host_tier is not None
    assert stats.host_tier.waited_seconds > 0


def test_processes_give_the_same_tokens_and_say_what_lives_in_the_host(
    wanted: list[list[int]],
) -> None:
    with LLM("mixtral-lite", gpus=4, device="cpu", expert_slots=3, max_model_len=128) as llm:
        assert "3 slots a rank, 20 of 32 experts live in the host" in llm.summary
        assert "4 homes + 0 spares" in llm.summary
        outputs = llm.generate(PROMPTS, PARAMS)
        assert [output.outputs[0].token_ids for output in outputs] == wanted
        tier = llm._launched.engine.stats().host_tier
    assert tier is not None
    assert tier.num_hits > tier.num_misses > 0


@pytest.mark.parametrize("counts", [None, HostTierCounts(5, 3, 2, 1 << 40, 0.25)])
def test_a_step_says_it_to_the_driver(counts: HostTierCounts | None) -> None:
    zeros = np.zeros((2, 3), dtype=np.int32)
    result = StepResult(1, 7, (), zeros, zeros[:, 0], host_tier=counts)

    assert channel.unpack_result(channel.pack_result(result)).host_tier == counts


def test_counts_add_up() -> None:
    total = HostTierCounts(3, 1, 2, 10, 0.5) + HostTierCounts(6, 2, 0, 5, 0.25)

    assert total == HostTierCounts(9, 3, 2, 15, 0.75)
    assert total.hit_rate == 0.75
    assert HostTierCounts().hit_rate == 1.0
