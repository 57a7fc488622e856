"""Experts that take turns in a card's slots: the tokens of ranks that hold all. pytest -m gpu."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightmoe import LLM, SamplingParams
from lightmoe.models.find import find_model
from lightmoe.moe.placement import initial_placement
from lightmoe.moe.residency import Residency
from lightmoe.moe.tables import PlacementTables
from tests.gpus import half_dtypes
from tests.worker.groups import generate, new_config, running_engine

pytestmark = pytest.mark.gpu

PROMPTS = [tuple((7 * one + 3 * place) % 3000 for place in range(3 + 9 * one)) for one in range(6)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
ELEMENTS = 1 << 18


def answers(dtype: str, expert_slots: int | None) -> list[list[int]]:
    config = new_config(find_model("mixtral-lite"), 1, max_model_len=256, max_num_seqs=4)
    config = replace(config, device="cuda", dtype=dtype, expert_slots=expert_slots)
    with running_engine(config, 4, 48) as engine:
        tokens = generate(engine, PROMPTS, PARAMS)
        tier = engine.stats().host_tier
    assert (tier is None) == (expert_slots is None)
    if tier is not None:
        assert tier.num_misses > 0
        assert tier.fetched_bytes > 0
    return tokens


@pytest.mark.parametrize("dtype", ["float32", *half_dtypes()])
def test_one_rank_gives_the_tokens_of_one_that_holds_all(dtype: str) -> None:
    wanted = answers(dtype, None)

    for expert_slots in (8, 11, 32):
        assert answers(dtype, expert_slots) == wanted


def test_copies_that_race_with_the_layers_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(half_dtypes()[0], None)
    pace, copy = random.Random(0), Residency._copy

    def late(residency: Residency, slot: int, row: int, free: torch.cuda.Event | None) -> None:
        assert residency._stream is not None
        with torch.cuda.stream(residency._stream):
            residency._stream.wait_event(free)
            residency._blobs[slot].fill_(float("nan"))
            torch.cuda._sleep(pace.choice((0, 100_000, 1_000_000)))
        copy(residency, slot, row, free)

    monkeypatch.setattr(Residency, "_copy", late)

    assert answers(half_dtypes()[0], 11) == wanted


def test_two_ranks_over_nccl_give_the_tokens_of_one() -> None:
    with LLM("mixtral-lite", gpus=1, device="cuda", max_model_len=256) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    with LLM("mixtral-lite", gpus=2, oversubscribe=True, max_model_len=256, expert_slots=6) as llm:
        assert "transport nccl" in llm.summary
        assert "6 slots a rank, 20 of 32 experts live in the host" in llm.summary
        outputs = llm.generate(PROMPTS, PARAMS)
        tier = llm._launched.engine.stats().host_tier
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    assert tier is not None
    assert tier.num_hits > 0
    assert tier.num_misses > 0


def test_a_slot_is_written_only_when_the_step_has_read_it() -> None:
    """What is enqueued before the guess still reads the slot, long after the host has gone on."""
    device = torch.device("cuda")
    placement = initial_placement(3, 1, 1)
    tables = PlacementTables(placement, 0, device)
    host = torch.arange(1, 4).float()[:, None].expand(-1, ELEMENTS).contiguous().pin_memory()
    blobs = torch.zeros(1, ELEMENTS, device=device)
    residency = Residency(blobs, host, placement.slot_table[:, :, 0], tables)
    read = []
    for step in range(20):
        layer = step % 3
        residency.enter(layer, torch.tensor([[0, -1]]), 1)
        torch.cuda._sleep(2_000_000)
        read.append(blobs[0].clone())

    wanted = np.arange(20) % 3 + 1
    assert [float(one.min()) for one in read] == wanted.tolist()
    assert [float(one.max()) for one in read] == wanted.tolist()
