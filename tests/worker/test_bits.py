"""A request's logits, to the bit, however it was batched, cut, preempted and spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightmoe.core import SamplingParams
from tests.models.folders import write_model
from tests.worker.groups import generate, new_config, recorded_logits, running_engine

PROMPTS = [tuple((7 * one + 3 * place) % 50 for place in range(3 + 9 * one)) for one in range(6)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def logits_of_all(
    folder: Path, num_ranks: int, max_num_seqs: int, budget: int, num_kv_blocks: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Every request's logits [positions, V] in one way to run them, and how many preemptions."""
    config = new_config(folder, num_ranks, max_num_seqs=max_num_seqs)
    if num_kv_blocks is not None:
        config = replace(config, num_kv_blocks=num_kv_blocks)
    with running_engine(config, max_num_seqs, budget) as engine, recorded_logits() as recorder:
        generate(engine, PROMPTS, PARAMS)
        preemptions = engine.stats().num_preemptions
    return [recorder.of_sequence(place) for place in range(len(PROMPTS))], preemptions


@pytest.fixture(scope="module")
def one_after_the_other(folder: Path) -> list[np.ndarray]:
    return logits_of_all(folder, num_ranks=1, max_num_seqs=1, budget=512)[0]


@pytest.mark.parametrize(
    ("num_ranks", "max_num_seqs", "budget"), [(1, 6, 512), (1, 6, 7), (3, 2, 11), (4, 2, 512)]
)
def test_the_way_requests_are_batched_changes_no_bit(
    folder: Path,
    one_after_the_other: list[np.ndarray],
    num_ranks: int,
    max_num_seqs: int,
    budget: int,
) -> None:
    found, _ = logits_of_all(folder, num_ranks, max_num_seqs, budget)
    for ours, alone in zip(found, one_after_the_other, strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_preemption_and_recomputation_change_no_bit(
    folder: Path, one_after_the_other: list[np.ndarray]
) -> None:
    found, num_preemptions = logits_of_all(
        folder, num_ranks=1, max_num_seqs=6, budget=64, num_kv_blocks=9
    )
    assert num_preemptions > 0
    for ours, alone in zip(found, one_after_the_other, strict=True):
        np.testing.assert_array_equal(ours, alone)
