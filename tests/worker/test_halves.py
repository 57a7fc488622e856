"""Steps that run as two halves: the same logits, counts and cache as whole ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pytest

from lightmoe.core import Batch, SamplingStep, SequenceStep
from lightmoe.moe.overlap_model import LayerCosts, Overlap, StageCost
from lightmoe.worker import calibrate
from lightmoe.worker.calibrate import Stages, decide, fit_stages
from lightmoe.worker.config import BLOCK_SIZE
from lightmoe.worker.inputs import in_halves
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.models.folders import write_model
from tests.worker.groups import new_config, recorded_logits

GREEDY = SamplingStep(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=0)
PROMPTS = [tuple((7 * one + 3 * place) % 50 for place in range(5 + 8 * one)) for one in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), eos_token_id=None)


def prompts_of(numbers: list[int]) -> tuple[SequenceStep, ...]:
    steps = []
    for one in numbers:
        first = 4 * one
        blocks = tuple(range(first, first - (-len(PROMPTS[one]) // BLOCK_SIZE)))
        steps.append(SequenceStep(one, PROMPTS[one], 0, blocks, GREEDY))
    return tuple(steps)


def logits_of(folder: Path, split: list[list[int]], overlap: str) -> dict[int, np.ndarray]:
    """Logits of every prompt, and counts that were checked."""
    config = new_config(folder, len(split), max_num_seqs=16)
    group = LocalWorkerGroup(replace(config, overlap=overlap))
    sizes = tuple(sum(len(PROMPTS[one]) for one in numbers) for numbers in split)
    with recorded_logits() as recorder:
        group.begin([Batch(0, sizes, prompts_of(numbers)) for numbers in split])
        results = group.finish()
    group.close()
    num_pairs = 2 * sum(sizes)
    assert (sum(result.expert_tokens for result in results).sum(axis=1) == num_pairs).all()
    assert (sum(result.layer_pairs for result in results) == num_pairs).all()
    return {number: logits for (number, _), logits in recorder.logits.items()}


@pytest.mark.parametrize("split", [[[3, 0], [], [4, 2, 1]], [[0], [1]]])
def test_halves_change_no_bit(folder: Path, split: list[list[int]]) -> None:
    """Sequences are cut in the middle, and one rank has no tokens at all."""
    whole, halves = (logits_of(folder, split, overlap) for overlap in ("off", "halves"))
    assert whole.keys() == halves.keys() != set()
    for number, logits in whole.items():
        np.testing.assert_array_equal(halves[number], logits)


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 6, 17, 18])
def test_a_cut_step_has_every_token_once(num_tokens: int) -> None:
    """In order, each at its position, and only the end of a sequence is sampled."""
    sequences = prompts_of([0, 1])
    first, second = in_halves(sequences, num_tokens)
    assert sum(len(part.token_ids) for part in first) == num_tokens
    for sequence in sequences:
        parts = [p for p in (*first, *second) if p.sequence_id == sequence.sequence_id]
        assert sum((part.token_ids for part in parts), ()) == sequence.token_ids
        starts = [sequence.start + sum(len(p.token_ids) for p in parts[:i]) for i in range(2)]
        assert [part.start for part in parts] == starts[: len(parts)]
        assert [part.sampling for part in parts] == [None] * (len(parts) - 1) + [GREEDY]


CUT = Overlap(expert_ctas=116, up_share=0.65)


def costs(*stages: float, between: float = 1.2) -> LayerCosts:
    """Milliseconds of 1000 tokens in dispatch, up, down and combine, all of it by the token.

    `between` is half of what is between two layers.
    """
    dispatch, up, down, combine = (StageCost(1e-5, value / 1e6) for value in stages)
    return LayerCosts(dispatch, up, down, combine, between=StageCost(0.0, between / 1e6))


def test_halves_where_the_exchange_is_long_and_nothing_where_it_is_short() -> None:
    """By the times that were fitted; the reason names them."""
    beside = costs(2.2, 2, 1.5, 2.2)
    long = Stages(costs(2, 1.5, 1, 2), beside, beside)
    overlap, reason = decide(long, 8192, CUT)
    assert overlap == replace(CUT, halves_from=overlap.halves_from)
    assert overlap.cuts_in_two(8192)
    assert "two halves" in reason
    assert f"{8.192 * (6.5 + 2.4) + 0.04:.2f} ms a layer in turn" in reason
    beside = costs(0.03, 10.5, 9, 0.03)
    short = Stages(costs(0.01, 6, 3, 0.01), beside, beside)
    overlap, reason = decide(short, 8192, CUT)
    assert overlap == Overlap()
    assert reason.startswith("no overlap")


def test_chunks_where_halves_hide_no_more() -> None:
    """Nothing to speak of is between two layers, so both hide the same."""
    beside = costs(2.2, 2, 1.5, 2.2, between=0.0)
    overlap, reason = decide(Stages(costs(2, 3, 2, 2, between=0.0), beside, beside), 8192, CUT)
    assert overlap == replace(CUT, num_chunks=None, costs=beside)
    assert reason.startswith("chunks (")


@pytest.mark.parametrize(("up", "pay"), [(4.8, True), (5.0, False)])
def test_halves_must_save_more_than_what_the_times_are_wrong_by(up: float, pay: bool) -> None:
    """They take (7 + up) / 14 of the time in turn, of which they must save 15 %."""
    alone = costs(0.5, 4, 2, 0.5, between=0.0)
    beside, chunked = costs(0.5, up, 2, 0.5, between=0.0), costs(9, 9, 9, 9, between=0.0)
    overlap, reason = decide(Stages(alone, beside, chunked), 8192, CUT)
    assert f"{4.096 * (7 + up) + 0.05:.2f}" in reason
    assert (overlap.halves_from is not None) == pay


def test_halves_are_not_faster_than_the_host_enqueues_them() -> None:
    beside = replace(costs(2.2, 2, 1.5, 2.2), host=StageCost(0.0, 0.05))
    _, reason = decide(Stages(costs(2, 1.5, 1, 2), beside, beside), 8192, CUT)
    assert "100.00 ms in halves" in reason


@pytest.mark.parametrize("road", ["ipc", "host"])
@pytest.mark.parametrize("wanted", ["auto", "halves"])
def test_products_share_the_device_as_the_road_between_cards_says(
    monkeypatch: pytest.MonkeyPatch, road: str, wanted: Literal["auto", "halves"]
) -> None:
    shares = {"ipc": Overlap(expert_ctas=132), "host": Overlap(expert_ctas=128, up_share=0.7)}
    monkeypatch.setattr(calibrate, "overlap_beside", lambda _, road="ipc": shares[road])
    beside = costs(2.2, 2, 1.5, 2.2)
    stages = Stages(costs(2, 1.5, 1, 2), beside, beside)
    monkeypatch.setattr(calibrate, "_time_stages", lambda *_: stages)
    group = mock.MagicMock()
    group.peers.memory.road = road
    overlap, _ = calibrate.choose_overlap(mock.MagicMock(), group, 8192, wanted)
    assert overlap == replace(shares[road], halves_from=overlap.halves_from)


def test_an_upload_longer_than_the_gate_is_not_hidden() -> None:
    alone, beside = costs(2, 1.5, 1, 2), costs(2.2, 2, 1.5, 2.2)
    overlap, _ = decide(Stages(alone, beside, beside), 8192, CUT)
    slow = replace(beside, upload=StageCost(0.0, 4e-6))
    in_vain, _ = decide(Stages(alone, slow, slow), 8192, CUT)
    assert overlap.halves_from is not None
    assert in_vain.halves_from is None


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(
    ("rows", "results"), [(0.1, 0.1), (2.5, 0.1), (0.1, 2.5), (6.0, 5.0)], ids=str
)
def test_the_halves_of_a_layer_take_what_hides_their_exchange_or_that(
    in_turn: bool, rows: float, results: float
) -> None:
    """Milliseconds of half the tokens; rows are uploaded before they are pulled."""

    def of(*stages: float) -> LayerCosts:
        dispatch, up, down, combine = (StageCost(0.0, ms / 4096e3) for ms in stages)
        upload, between = StageCost(0.0, rows / 2 / 4096e3), StageCost(0.0, 0.5 / 4096e3)
        costs = LayerCosts(dispatch, up, down, combine, upload=upload, between=between)
        return replace(costs, in_turn=in_turn)

    alone, beside = of(1, 4, 2, 1), of(rows / 2, 5, 3, results)
    _, reason = decide(Stages(alone, beside, beside), 8192, CUT)
    dense = 1.0
    both = 4 + 2 if in_turn else max(5, 3)
    taken = max(4, rows) + both + max(2, results) + max(dense, results) + max(dense, rows)
    assert f"{taken:.2f} ms in halves" in reason


def test_each_stage_is_fitted_to_its_own_times() -> None:
    """Seconds of 100 and 200 tokens, stage by stage in the order of a layer."""
    tokens = (100, 200)
    fitted = fit_stages(
        tokens, [[stage * count * 1e-6 for stage in range(1, 7)] for count in tokens]
    )
    stages = (fitted.upload, fitted.gate, fitted.dispatch, fitted.up, fitted.down, fitted.combine)
    found = [stage.seconds_per_token for stage in stages]
    assert found == pytest.approx([stage * 1e-6 for stage in range(1, 7)])


def test_a_recorded_step_is_whole_and_the_reason_says_so(folder: Path) -> None:
    config = replace(new_config(folder, 2), max_recorded_tokens=64, overlap="halves")
    group = LocalWorkerGroup(config)
    group.close()

    reasons = {rank.overlap for rank in group.ranks}
    assert reasons == {"no overlap: a record of the routing takes each layer's tokens at once"}
