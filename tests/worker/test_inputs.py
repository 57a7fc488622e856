"""A plan as tensors: who attends together, how rows lie, and that neither changes a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightmoe.core import SamplingParams, SamplingStep, SequenceStep
from lightmoe.layers.attention import KVCache
from lightmoe.layers.basic import Rotary
from lightmoe.layers.batched_attention import AttendTogether
from lightmoe.worker import inputs
from lightmoe.worker.inputs import step_inputs
from tests.models.folders import write_model
from tests.worker.groups import generate, new_config, running_engine

CPU = torch.device("cpu")
BLOCK_SIZE = 8
GREEDY = SamplingStep(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=0)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: sequences attend in groups."""
    monkeypatch.setattr(inputs, "is_native", lambda _: True)


def decode(sequence_id: int, position: int) -> SequenceStep:
    blocks = tuple(range(10 * sequence_id, 10 * sequence_id + position // BLOCK_SIZE + 2))
    return SequenceStep(sequence_id, (100 + sequence_id,), position, blocks, GREEDY)


def inputs_of(sequences: list[SequenceStep]) -> inputs.StepInputs:
    cache = KVCache(1, 100, BLOCK_SIZE, 1, 4, 4, torch.float32, CPU)
    return step_inputs(sequences, cache, Rotary(4, 10000.0, 256, CPU))


def test_rows_say_where_each_token_goes_and_who_is_sampled() -> None:
    prompt = SequenceStep(7, (1, 2, 3), 6, (70, 71), None)

    found = inputs_of([prompt, decode(2, 9)])

    assert found.token_ids.tolist() == [1, 2, 3, 102]
    assert found.attention.cache_rows.tolist() == [566, 567, 568, 169]
    assert found.sampled == ((2, GREEDY),)
    assert found.last_rows.tolist() == [3]


@pytest.mark.usefixtures("together")
def test_all_sequences_attend_together_in_their_order() -> None:
    prompt = SequenceStep(7, (1, 2, 3), 6, (70, 71), GREEDY)

    found = inputs_of([decode(2, 17), prompt, decode(4, 7)])

    assert [sequence_id for sequence_id, _ in found.sampled] == [2, 7, 4]
    assert found.token_ids.tolist() == [102, 1, 2, 3, 104]
    assert found.last_rows.tolist() == [0, 3, 4]
    attend = found.attention.attend
    assert isinstance(attend, AttendTogether)
    assert attend.query_starts.tolist() == [0, 1, 4, 5]
    assert attend.lengths.tolist() == [18, 9, 8]
    assert attend.block_tables.tolist() == [[20, 21, 22], [70, 71, 0], [40, 0, 0]]
    tables = (attend.query_starts, attend.lengths, attend.block_tables)
    assert {table.dtype for table in tables} == {torch.int32}
    assert attend.max_queries == 3


@pytest.mark.usefixtures("together")
def test_no_sequences_attend_to_nothing() -> None:
    attend = inputs_of([]).attention.attend

    assert isinstance(attend, AttendTogether)
    assert attend.block_tables.shape == (0, 0)
    pages = torch.zeros(1, BLOCK_SIZE, 1, 4)
    assert attend(torch.zeros(0, 2, 4), pages, pages).shape == (0, 2, 4)


def test_no_sequences_make_empty_inputs() -> None:
    found = inputs_of([])

    assert found.token_ids.shape == found.last_rows.shape == (0,)
    assert found.sampled == ()


def test_attending_together_gives_the_tokens_of_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = new_config(write_model(tmp_path, eos_token_id=None), num_ranks=1, max_num_seqs=6)
    prompts = [
        tuple((7 * one + 3 * place) % 50 for place in range(3 + 9 * one)) for one in range(6)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with running_engine(config, 6, 40) as engine:
        wanted = generate(engine, prompts, params)

    monkeypatch.setattr(inputs, "is_native", lambda _: True)
    with running_engine(config, 6, 40) as engine:
        assert generate(engine, prompts, params) == wanted
