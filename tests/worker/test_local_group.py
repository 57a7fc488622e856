"""Whole steps on real ranks: the bits of one sequence are its own, whoever runs beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightmoe.core import Batch, SamplingParams, SamplingStep, SequenceStep
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.models.folders import write_model
from tests.worker.groups import generate, new_config, recorded_logits, running_engine

GREEDY = SamplingStep(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=0)
PROMPTS = [tuple((7 * one + 3 * place) % 50 for place in range(5 + 8 * one)) for one in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), eos_token_id=None)


def blocks_of(first: int, num_positions: int) -> tuple[int, ...]:
    return tuple(range(first, first - (-num_positions // BLOCK_SIZE)))


def one_step(group: LocalWorkerGroup, per_rank: list[list[SequenceStep]]) -> dict[int, np.ndarray]:
    """Logits of every sequence that is sampled from in a step."""
    sizes = tuple(sum(len(part.token_ids) for part in parts) for parts in per_rank)
    with recorded_logits() as recorder:
        group.begin([Batch(0, sizes, tuple(parts)) for parts in per_rank])
        results = group.finish()
    num_pairs = sum(sizes) * 2  # two experts a token
    assert (sum(result.expert_tokens for result in results).sum(axis=1) == num_pairs).all()
    assert (sum(result.layer_pairs for result in results) == num_pairs).all()
    return {sequence_id: logits for (sequence_id, _), logits in recorder.logits.items()}


def test_a_sequence_has_the_same_logits_alone_and_beside_others_on_any_rank(folder: Path) -> None:
    prompts = [
        SequenceStep(one, prompt, 0, blocks_of(4 * one, len(prompt)), GREEDY)
        for one, prompt in enumerate(PROMPTS)
    ]
    decodes = [
        SequenceStep(one, (one + 1,), len(prompt), blocks_of(4 * one, len(prompt) + 1), GREEDY)
        for one, prompt in enumerate(PROMPTS)
    ]
    alone: list[dict[int, np.ndarray]] = []
    group = LocalWorkerGroup(new_config(folder, num_ranks=1, max_num_seqs=16))
    for parts in (prompts, decodes):
        alone.append({})
        for part in parts:
            alone[-1] |= one_step(group, [[part]])
    group.close()

    splits = {1: [[0, 1, 2, 3, 4]], 3: [[3, 0], [], [4, 2, 1]], 5: [[4], [0], [], [2, 1], [3]]}
    for num_ranks, split in splits.items():
        group = LocalWorkerGroup(
            new_config(folder, num_ranks, num_spares=num_ranks // 2, max_num_seqs=16)
        )
        for wanted, parts in zip(alone, (prompts, decodes), strict=True):
            found = one_step(group, [[parts[one] for one in share] for share in split])
            assert found.keys() == wanted.keys()
            for one, logits in found.items():
                assert np.array_equal(logits, wanted[one]), (num_ranks, one)
        group.close()


def test_a_step_without_tokens_touches_nothing(folder: Path) -> None:
    group = LocalWorkerGroup(new_config(folder, num_ranks=2))

    group.begin([Batch(5, (0, 0)), Batch(5, (0, 0))])
    results = group.finish()

    assert [result.step for result in results] == [5, 5]
    assert all(not result.tokens and not result.expert_tokens.any() for result in results)
    group.check()
    group.close()


def test_ranks_say_what_they_hold(folder: Path) -> None:
    config = new_config(folder, num_ranks=4, num_spares=1)
    group = LocalWorkerGroup(config)

    assert [rank.kind for rank in group.ranks] == ["home"] * 3 + ["spare"]
    assert [rank.num_slots for rank in group.ranks] == [4, 3, 3, 10]
    expert_bytes, dense_bytes = 3 * 24 * 20 * 4, config.model.dense_elements * 4
    for rank in group.ranks:
        assert rank.weight_bytes == rank.num_slots * expert_bytes + dense_bytes
    group.close()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(folder: Path, num_ranks: int) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=12, seed=42)

    with running_engine(new_config(folder, num_ranks), 4, 16) as engine:
        alone = [generate(engine, [prompt], params)[0] for prompt in PROMPTS]
        together = generate(engine, [*PROMPTS, *PROMPTS[::-1]], params)
        unseeded = SamplingParams(temperature=1.0, max_tokens=12)
        free = [generate(engine, [PROMPTS[0]], unseeded)[0] for _ in range(3)]

    assert together == [*alone, *alone[::-1]]
    assert len({tuple(tokens) for tokens in free}) > 1


def test_dummy_weights_are_the_same_for_any_number_of_ranks_and_differ_by_seed(
    folder: Path,
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8)

    def tokens(num_ranks: int, seed: int) -> list[list[int]]:
        config = new_config(folder, num_ranks, load_format="dummy", seed=seed)
        with running_engine(config, 4, 64) as engine:
            return generate(engine, PROMPTS, greedy)

    assert tokens(1, seed=0) == tokens(3, seed=0)
    assert tokens(1, seed=0) != tokens(1, seed=1)
