"""The simulated pipeline: conservation, bounds, and what overlap must and cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightmoe.balancer.calibrate import (
    KNOWN_SHAPES,
    calibrate,
    nonnegative,
    read_rows,
    setup_of,
)
from lightmoe.balancer.pipeline_tasks import (
    Calibration,
    LayerShape,
    StageFit,
    chunk_load,
    draw_choices,
)
from lightmoe.balancer.simulate import Setup, run_setup, simulate, simulated_seconds, summary
from lightmoe.errors import UsageError
from tests.topology.machines import box, linked

SHAPE = LayerShape(
    name="small",
    hidden_size=1024,
    expert_size=512,
    num_experts=16,
    num_per_token=4,
    element_bytes=2,
    expert_element_bytes=2,
    attention_elements=4 * 1024 * 1024,
)
SETUP = Setup(shape=SHAPE, topology=linked(), tokens_per_rank=2048)


@given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 2), st.integers(0, 100))
def test_every_pair_is_sent_and_computed_once(
    num_tokens: int, num_chunks: int, skew: float, seed: int
) -> None:
    choices = draw_choices(SHAPE, 3, num_tokens, skew, seed)
    assert choices.shape == (3, num_tokens, SHAPE.num_per_token)
    assert all(len(set(token)) == SHAPE.num_per_token for token in choices.reshape(-1, 4).tolist())
    loads = [chunk_load(SHAPE, choices, c, num_chunks, 1) for c in range(num_chunks)]
    pairs = sum(load.pairs for load in loads)
    assert pairs.sum(axis=1).tolist() == [num_tokens * SHAPE.num_per_token] * 3
    for load in loads:
        assert (load.rows <= load.pairs).all()
        assert (load.computed == load.pairs.sum(axis=0)).all()
        assert load.touched.sum() <= SHAPE.num_experts
    padded = chunk_load(SHAPE, choices, 0, 1, 16)
    assert (padded.computed % 16 == 0).all()
    assert (padded.computed >= padded.pairs.sum(axis=0)).all()


def test_skew_makes_one_expert_popular() -> None:
    counts = np.bincount(draw_choices(SHAPE, 4, 4096, 1.5, 0).ravel(), minlength=16)
    even = np.bincount(draw_choices(SHAPE, 4, 4096, 0.0, 0).ravel(), minlength=16)
    assert counts.max() > 2.5 * counts.mean()
    assert even.max() < 1.1 * even.mean()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.sampled_from([1, 2]),
    st.sampled_from([linked(), box(), box(((0, 1, 2, 3),))]),
    st.sampled_from([0.0, 1.0]),
)
def test_a_pipeline_lies_between_its_limit_and_its_stages_in_a_row(
    num_chunks: int, num_micro_batches: int, topology: Any, skew: float
) -> None:
    setup = replace(
        SETUP,
        topology=topology,
        num_chunks=num_chunks,
        num_micro_batches=num_micro_batches,
        num_layers=num_micro_batches,
        skew=skew,
        tokens_per_rank=256,
    )
    simulated = simulate(setup)
    assert simulated.step_seconds >= simulated.limit_seconds * (1 - 1e-9)
    serial = simulated_seconds(replace(setup, num_micro_batches=1, num_layers=1, serial=True))
    if num_micro_batches == 1:
        assert simulated.step_seconds <= serial * (1 + 1e-6)
    assert 0 <= simulated.exposed_share < 1
    assert set(simulated.to_json()) >= {"ours_ms", "naive_ms", "limit_ms", "hidden_fraction"}
    assert len(summary(setup, simulated)) == 7


def test_chunks_hide_the_exchange() -> None:
    one, four = (simulate(replace(SETUP, num_chunks=n)) for n in (1, 4))
    assert one.step_seconds == pytest.approx(one.naive_seconds, rel=0.02)
    assert four.step_seconds < 0.85 * one.step_seconds
    assert 0.4 < four.hidden_fraction <= 1


def test_results_leave_beside_the_second_product() -> None:
    """In one piece all that can be hidden is the second product, a third of the experts."""
    after = simulate(SETUP)
    beside = simulate(replace(SETUP, results_beside=True))
    assert beside.compute_seconds == pytest.approx(after.compute_seconds)
    assert beside.exchange_seconds == pytest.approx(after.exchange_seconds)
    saved = after.step_seconds - beside.step_seconds
    assert 0 < saved <= beside.compute_seconds / 3


def test_serial_chunks_hide_nothing() -> None:
    serial = simulate(replace(SETUP, num_chunks=4, serial=True))
    assert serial.step_seconds >= serial.compute_seconds + 0.9 * serial.exchange_seconds


def test_two_micro_batches_hide_what_one_layer_cannot() -> None:
    setup = replace(SETUP, num_layers=4)
    one, two = (simulate(replace(setup, num_micro_batches=n)) for n in (1, 2))
    assert one.naive_seconds == pytest.approx(two.naive_seconds)
    assert two.step_seconds < 0.85 * one.step_seconds
    assert two.exposed_share < one.exposed_share


def test_ranks_without_exchanges_are_not_slowed_down_by_them() -> None:
    slow = replace(SETUP, num_chunks=4, calibration=Calibration(slowdown=0.3))
    plain = replace(SETUP, num_chunks=4)
    assert simulate(slow).compute_seconds == pytest.approx(simulate(plain).compute_seconds)
    assert simulated_seconds(slow) > simulated_seconds(plain)


def test_one_rank_exchanges_nothing() -> None:
    alone = simulate(replace(SETUP, topology=linked(1), num_chunks=2))
    assert (alone.exchange_seconds, alone.hidden_fraction) == (0.0, 0.0)
    assert alone.step_seconds == pytest.approx(alone.compute_seconds)


@pytest.mark.parametrize(
    "change", [{"num_chunks": 0}, {"num_micro_batches": 3}, {"tokens_per_rank": 0}]
)
def test_a_setup_out_of_bounds(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="give"):
        replace(SETUP, **change)


def measured_rows(truth: Calibration, mode: str = "pipelined") -> list[dict[str, Any]]:
    """Rows as a bench would write them, were the machine exactly as the simulator with `truth`."""
    rows = []
    for tokens in (64, 256, 1024):
        for chunks in (1, 2, 4):
            row: dict[str, Any] = {
                "setting": "made up",
                "shape": "qwen3",
                "tokens_per_rank": tokens,
                "transport": "nccl",
                "chunks": chunks,
                "mode": mode,
                "alone_chunks": chunks,
            }
            setup = setup_of(row, linked(), truth)
            for name, left_out in (
                ("ours_ms", {}),
                ("compute_ms", {"exchanging": False}),
                ("comm_ms", {"computing": False}),
            ):
                spans = run_setup(setup, **left_out)
                row[name] = 1e3 * max(span.end for of_rank in spans for span in of_rank)
            rows.append(row)
    return rows


TRUTH = Calibration(
    compute=StageFit(alpha_seconds=5e-5, factor=1.4),
    exchange=StageFit(alpha_seconds=3e-5, factor=1.2),
    slowdown=0.2,
)


@pytest.mark.parametrize("mode", ["pipelined", "serial"])
def test_calibration_finds_the_parameters_again(mode: str) -> None:
    found = calibrate(measured_rows(TRUTH, mode), linked())
    (fitted,) = found.calibrations.values()
    assert fitted.compute.factor == pytest.approx(1.4, rel=0.03)
    assert fitted.exchange.alpha_seconds == pytest.approx(3e-5, rel=0.05)
    assert fitted.slowdown == pytest.approx(0.2 if mode == "pipelined" else 0.0)
    assert len(found.errors(held_out=True)) == 4
    assert max(found.errors(held_out=True)) < 0.03


def test_of_tuned_rows_the_fastest_counts_and_ranks_are_those_of_the_row() -> None:
    rows = [{**row, "ranks": 4} for row in measured_rows(TRUTH)]
    slower = [{**row, "ours_ms": 2 * row["ours_ms"], "exchange_ctas": 8} for row in rows]
    found = calibrate([*slower, *rows], linked(8).first(4))
    assert len(found.predicted) == len(rows)
    assert max(found.errors(held_out=True)) < 0.03
    with pytest.raises(UsageError, match="describes 2 ranks and 4 are asked for"):
        calibrate(rows, linked(2))


def test_no_p2p_rows_take_the_tree() -> None:
    row = {**measured_rows(TRUTH)[0], "setting": "no-p2p"}
    assert setup_of(row, linked(), TRUTH).topology.fabrics == ()


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows = measured_rows(TRUTH)
    with pytest.raises(UsageError, match="has 3 rows; four at least"):
        calibrate(rows[:3], linked())
    with pytest.raises(UsageError, match="shape 'wide' is unknown and its row has no widths"):
        calibrate([{**row, "shape": "wide"} for row in rows], linked())
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [{"setting": "x"}]}))
    with pytest.raises(UsageError, match="lacks shape, tokens_per_rank"):
        read_rows(path)
    path.write_text("[]")
    with pytest.raises(UsageError, match="is no benchmark result"):
        read_rows(path)
    path.write_text(json.dumps({"rows": rows}))
    assert read_rows(path) == rows
    assert set(KNOWN_SHAPES) == {"mixtral", "dsv2lite", "qwen3"}


@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 1000))
def test_least_squares_are_not_negative(a: float, b: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = [
        (float(u), float(v), float(a * u + b * v + 0.01 * noise) + 1e-3)
        for u, v, noise in generator.uniform(0.1, 1, (6, 3))
    ]
    found = nonnegative(points)
    assert min(found) >= 0

    def error(ab: tuple[float, float]) -> float:
        return sum(((ab[0] * u + ab[1] * v) / y - 1) ** 2 for u, v, y in points)

    assert error(found) <= error((a, b)) + 1e-9
