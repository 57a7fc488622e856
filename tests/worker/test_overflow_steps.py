"""Whole steps with `--overflow` on real ranks: levelled, counted, audited by token, recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from lightmoe.balancer.recorder import TraceRecorder
from lightmoe.balancer.trace import read_trace
from lightmoe.core import Batch, OverflowRule, Request, SamplingParams, StepOverflow, StepResult
from lightmoe.engine.engine import Engine
from lightmoe.errors import RankError
from lightmoe.moe.placement import initial_placement
from lightmoe.worker import channel, order_frames
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.engine.fakes import Answer
from tests.models.folders import write_config
from tests.worker.groups import generate, new_config, running_engine
from tests.worker.test_halves import prompts_of

NUM_RANKS = 4
PROMPTS = [[token % 50 for token in range(start, start + 60)] for start in range(8)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
MODES = pytest.mark.parametrize("mode", ["redirect", "drop"])


def crowded(folder: Path, mode: Literal["redirect", "drop"], factor: float = 1.0) -> WorkerConfig:
    """Two experts a rank, made-up routing of which half goes to one expert."""
    config = new_config(
        write_config(folder, num_local_experts=8), NUM_RANKS, load_format="dummy", seed=4
    )
    return replace(
        config,
        placement=initial_placement(len(config.placement.copies), 8, NUM_RANKS),
        deterministic=False,
        routing_skew=2.0,
        overflow=OverflowRule(mode, factor),
    )


def one_step(config: WorkerConfig) -> list[StepResult]:
    """Prompts of 5, 13, 21, 29 and 37 tokens on three of four ranks."""
    split = [[3, 0], [], [4, 2], [1]]
    plans = [prompts_of(numbers) for numbers in split]
    sizes = tuple(sum(len(part.token_ids) for part in plan) for plan in plans)
    group = LocalWorkerGroup(config)
    group.begin([Batch(0, sizes, plan) for plan in plans])
    results = group.finish()
    group.close()
    return results


@MODES
@pytest.mark.parametrize("overlap", ["off", "halves"])
def test_every_layer_of_a_step_is_within_capacity(
    tmp_path: Path, mode: Literal["redirect", "drop"], overlap: Literal["off", "halves"]
) -> None:
    config = replace(crowded(tmp_path, mode), overlap=overlap)
    crowd = one_step(replace(config, overflow=None))
    results = one_step(config)

    before = np.stack([result.layer_pairs for result in crowd])
    after = np.stack([result.layer_pairs for result in results])
    capacity = -(-before.sum(axis=0) // NUM_RANKS)
    steps = [result.overflow for result in results if result.overflow is not None]
    left = steps[0].num_left
    assert (before.max(axis=0) > 1.5 * capacity).all()
    # Each half rounds its capacity up; every token keeps one of its experts.
    assert (after.max(axis=0) <= capacity + (overlap == "halves") + left).all()
    assert left <= 2
    dropped = sum(int(step.moved_pairs.sum()) for step in steps) if mode == "drop" else 0
    assert before.sum() - after.sum() == dropped
    assert [len(step.moved_pairs) for step in steps] == [34, 0, 58, 13]
    assert {step.num_layers for step in steps} == {2 * (1 + (overlap == "halves"))}
    # The balancer sees what the gates chose; a layer's first is what it is without overflow.
    chosen = [sum(result.expert_tokens for result in both) for both in (crowd, results)]
    assert np.array_equal(chosen[0][0], chosen[1][0])
    assert (chosen[1].sum(axis=1) == 210).all()


@MODES
def test_an_engine_counts_in_all_and_by_token(
    tmp_path: Path, mode: Literal["redirect", "drop"]
) -> None:
    config = crowded(tmp_path, mode)
    with running_engine(config, 4, 64, overflow=config.overflow) as engine:
        answers = answer_all(engine)
        report = engine.load().overflow
    assert report is not None
    moved = [dict(pair for one in answer.outputs for pair in one.moved_pairs) for answer in answers]
    assert all(moved)
    assert all(0 <= position < 65 for one in moved for position in one)
    assert all(1 <= number <= 4 for one in moved for number in one.values())
    assert any(max(one) >= 60 for one in moved)  # tokens of an answer, too
    by_token = sum(sum(one.values()) for one in moved)
    # What a step ahead ran for a request that had ended is nobody's.
    assert by_token <= report.num_moved_pairs <= by_token + 4 * len(PROMPTS)
    assert report.num_layers > 0


def answer_all(engine: Engine) -> list[Answer]:
    answers = [Answer() for _ in PROMPTS]
    for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        engine.submit(
            Request(request_id=str(place), prompt_token_ids=tuple(prompt), params=PARAMS), answer
        )
    for answer in answers:
        answer.wait()
    return answers


def test_nothing_changes_where_nobody_passes_the_capacity(tmp_path: Path) -> None:
    config = crowded(tmp_path, "redirect", factor=float(NUM_RANKS))
    with running_engine(config, 4, 64, overflow=config.overflow) as engine:
        tokens = generate(engine, PROMPTS, PARAMS)
        report = engine.load().overflow
    with running_engine(replace(config, overflow=None), 4, 64) as engine:
        assert generate(engine, PROMPTS, PARAMS) == tokens
    assert report is not None
    assert (report.num_moved_pairs, report.num_layers, report.num_left) == (0, 0, 0)


def test_what_is_recorded_is_what_ran(tmp_path: Path) -> None:
    """Step by step and layer by layer, the recorded experts are as many as ranks computed."""
    config = replace(crowded(tmp_path, "redirect"), max_recorded_tokens=64)
    recorder = TraceRecorder(tmp_path / "trace.npz", 2, 8, 2)
    with running_engine(config, 4, 64, recorder=recorder, overflow=config.overflow) as engine:
        generate(engine, PROMPTS, PARAMS)
        load = engine.load()
    trace = read_trace(tmp_path / "trace.npz")
    ran = trace.counts(0, trace.num_steps)
    homes = np.array([[ranks[0] for ranks in layer] for layer in load.placement])
    for layer in range(2):
        by_rank = np.bincount(homes[layer], weights=ran[:, layer].sum(axis=0), minlength=NUM_RANKS)
        assert by_rank.tolist() == load.rank_pairs[:, layer].tolist()
    assert not np.array_equal(ran.sum(axis=0), load.expert_tokens)


def test_one_rank_alone_never_overflows(tmp_path: Path) -> None:
    config = crowded(tmp_path, "drop")
    alone = replace(config, placement=initial_placement(2, 8, 1))
    with running_engine(alone, 4, 64, overflow=config.overflow) as engine:
        generate(engine, PROMPTS, PARAMS)
        report = engine.load().overflow
    assert report is not None
    assert report.num_moved_pairs == 0


def test_what_a_rank_says_travels_and_nonsense_does_not() -> None:
    step = StepOverflow(np.array([0, 3, 1], dtype=np.int32), num_layers=2, num_left=1)
    counts = np.zeros((1, 2), dtype=np.int32)
    frame = channel.pack_result(StepResult(1, 2, (), counts, counts[0], overflow=step))

    found = channel.unpack_result(frame).overflow

    assert found is not None
    assert found.moved_pairs.tolist() == [0, 3, 1]
    assert (found.num_layers, found.num_left) == (2, 1)
    for fields in [(b"abc", 1, 1), (b"", -1, 0), (b"", 0), "", (b"", 0, True)]:
        with pytest.raises(RankError):
            order_frames.overflow_of(fields)
