"""The bench of migrations on thread ranks: experts move, tokens stay, both kinds are timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bench_migration
import pytest
from bench_migration import Restless, Workload, measure

from tests.models.folders import write_model
from tests.worker.groups import new_config, running_engine

NUM_RANKS, NUM_FREE_SLOTS = 4, 2


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder: Path = write_model(tmp_path_factory.mktemp("tiny"))
    config = replace(
        new_config(folder, NUM_RANKS, num_spares=1, max_num_seqs=4), num_free_slots=NUM_FREE_SLOTS
    )
    balancers: list[Restless] = []

    def new_balancer(group: object) -> Restless:
        balancers.append(Restless(group.ranks, group.placement, NUM_FREE_SLOTS))  # type: ignore[attr-defined]
        return balancers[0]

    with running_engine(config, 4, 64, new_balancer) as engine:
        workload = Workload.of(engine, 3, 20, config.model.num_experts_per_tok)
        measured = measure(engine, balancers[0], workload, 30, 2000)
        report = engine.load().balance
    assert report is not None
    assert report.moved_bytes == measured["moved_bytes"]
    assert report.num_moved_experts >= report.num_migrations
    return measured


def test_experts_move_and_tokens_stay(row: dict[str, object]) -> None:
    assert row["tokens_equal"] is True
    assert row["moved_experts"] > 3  # type: ignore[operator]
    assert row["moved_bytes"] > 20 * 2000  # type: ignore[operator]


@pytest.mark.parametrize("what", ["step", "inter_token"])
def test_both_kinds_are_timed_alike(row: dict[str, object], what: str) -> None:
    quiet, moving = (row[f"{kind}_{what}_ms"] for kind in ("quiet", "moving"))
    assert isinstance(quiet, dict)
    assert isinstance(moving, dict)
    for one in (quiet, moving):
        assert one["num_samples"] >= 30
        assert 0 < one["p50"] <= one["p99"] <= one["max"]
    assert row[f"{what}_p99_ratio"] == pytest.approx(moving["p99"] / quiet["p99"])


def test_percentiles_are_of_the_samples() -> None:
    found = bench_migration.percentiles([float(one) for one in range(1, 102)])
    assert (found["p50"], found["p99"], found["max"], found["num_samples"]) == (51, 100, 101, 101)
