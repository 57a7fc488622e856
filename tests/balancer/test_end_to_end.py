"""The whole path on CPU ranks: record, plan, migrate, route; the answers never change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightmoe.balancer import loop
from lightmoe.balancer.gain import max_over_mean, renumbered
from lightmoe.balancer.planner import plan
from lightmoe.balancer.recorder import TraceRecorder
from lightmoe.balancer.start import start_balancer
from lightmoe.balancer.trace import read_trace
from lightmoe.core import SamplingParams
from lightmoe.engine.engine import Engine
from lightmoe.errors import RequestError, TraceError
from lightmoe.worker.config import WorkerConfig
from lightmoe.worker.local_group import LocalWorkerGroup
from tests.models.folders import write_model
from tests.worker.groups import generate, new_config, running_engine

NUM_RANKS, NUM_SPARES = 5, 1
# The same few tokens: their experts are hot.
PROMPTS = [(3 + one % 2, 7, 7, 9) * 4 for one in range(8)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
INTERVAL = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), num_local_experts=8)


@pytest.fixture(scope="module")
def quiet(folder: Path) -> list[list[int]]:
    with running_engine(new_config(folder, 1, max_num_seqs=8), 8, 64) as engine:
        return generate(engine, PROMPTS, PARAMS)


def live_config(folder: Path) -> WorkerConfig:
    """Without replicas at first, and room for some."""
    config = new_config(folder, NUM_RANKS, num_spares=NUM_SPARES)
    return replace(config, num_free_slots=1)


def new_balancer(group: LocalWorkerGroup) -> loop.Balancer:
    return start_balancer(
        group.ranks,
        group.placement,
        interval_steps=INTERVAL,
        bytes_per_step=1500,
        num_free_slots=1,
        from_host=False,
    )


def generate_until(engine: Engine, quiet: list[list[int]], condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "not in 30 s"
        assert generate(engine, PROMPTS, PARAMS) == quiet


def test_a_skewed_load_moves_experts_and_no_token_changes(
    folder: Path, quiet: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightmoe.balancer.gain.LEAST_GAIN", 0.0)
    with running_engine(live_config(folder), 4, 16, new_balancer) as engine:
        before = engine._workers.placement

        generate_until(engine, quiet, lambda: engine.load().balance.num_migrations >= 2)  # type: ignore[union-attr]

        report, load = engine.balance(), engine.load()
        now = engine._workers.placement
    assert report is not None
    assert report.error is None
    assert report.num_moved_experts > 0
    assert load.epoch == now.epoch > 1
    assert load.placement == [[list(ranks) for ranks in layer] for layer in now.copies]
    assert (now.slot_table != before.slot_table).any()


@pytest.mark.parametrize("dies_at", [1, 2, 5, 9])
def test_the_balancer_dies_in_the_middle_and_the_answers_go_on(
    folder: Path, quiet: list[list[int]], monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    monkeypatch.setattr("lightmoe.balancer.gain.LEAST_GAIN", 0.0)
    real, num_calls = loop.Migration.orders, 0

    def mortal(migration: loop.Migration) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == dies_at:
            raise MemoryError("killed")
        return real(migration)

    monkeypatch.setattr(loop.Migration, "orders", mortal)
    with running_engine(live_config(folder), 4, 16, new_balancer) as engine:
        generate_until(engine, quiet, lambda: engine.balance().error)  # type: ignore[union-attr]
        for _ in range(2):
            assert generate(engine, PROMPTS, PARAMS) == quiet


def test_the_route_is_switched_under_traffic(folder: Path, quiet: list[list[int]]) -> None:
    config = new_config(folder, NUM_RANKS, num_spares=NUM_SPARES)
    group: list[LocalWorkerGroup] = []
    with running_engine(config, 4, 16) as engine:
        workers = engine._workers
        assert isinstance(workers, LocalWorkerGroup)
        group.append(workers)
        loads = {}
        for route in ("none", "even", "waterfill", "none"):
            engine.set_route(route)
            before = engine.load().rank_pairs
            assert generate(engine, PROMPTS, PARAMS) == quiet
            loads[route] = (engine.load().rank_pairs - before).sum(axis=1)
            assert {worker._group.route for worker in workers._workers} == {route}  # type: ignore[union-attr]
        assert engine.load().route == "none"
        with pytest.raises(RequestError, match="route is 'lp'; give one of: waterfill, even, none"):
            engine.set_route("lp")
    # Without a route to replicas the spare, which holds nothing else, has nothing to do.
    assert loads["none"][-1] == 0
    assert loads["even"][-1] > 0
    assert loads["waterfill"].max() <= loads["even"].max()


def test_record_plan_migrate_route(folder: Path, quiet: list[list[int]], tmp_path: Path) -> None:
    config = replace(live_config(folder), max_recorded_tokens=16)
    path = tmp_path / "routing.npz"
    with running_engine(config, 4, 16, recorder=TraceRecorder(path, 2, 8, 2)) as engine:
        assert generate(engine, PROMPTS, PARAMS) == quiet
        counted = engine.load().expert_tokens
        num_slots = [rank.num_slots - 1 for rank in engine._workers.ranks]
        before = engine._workers.placement

    trace = read_trace(path)
    load = trace.counts(0, trace.num_steps).sum(axis=0)
    assert np.array_equal(load, counted)
    assert set(trace.source_ranks.tolist()) == set(range(NUM_RANKS))

    goal = plan(load, num_slots, num_spares=NUM_SPARES, previous=renumbered(before))
    assert max_over_mean(load, goal, "waterfill") <= max_over_mean(load, before, "waterfill")
    with running_engine(replace(config, placement=goal), 4, 16) as engine:
        assert generate(engine, PROMPTS, PARAMS) == quiet
        pairs = engine.load().rank_pairs  # [W, L]
    assert pairs.sum() == load.sum()


def test_a_trace_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be written"):
        TraceRecorder(tmp_path / "nowhere" / "routing.npz", 2, 8, 2)


def test_a_run_without_tokens_leaves_no_file(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "routing.npz", 2, 8, 2)
    recorder.close()
    recorder.close()
    assert list(tmp_path.iterdir()) == []
