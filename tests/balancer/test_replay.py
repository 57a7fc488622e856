"""Replay: plans from past steps only, one placement for all routes, the bar of real routing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightmoe.balancer.planner import plan
from lightmoe.balancer.replay import (
    ROUTES,
    homes_and_spares,
    num_moved,
    replay,
    spread_ranks,
)
from lightmoe.balancer.synthetic import SyntheticRouting, synthetic_trace
from lightmoe.balancer.trace import RoutingTrace, read_trace, write_trace
from lightmoe.cli import main

REAL = Path(__file__).parent.parent / "data" / "routing-mixtral-lite.npz"
SMALL = SyntheticRouting(
    num_steps=40,
    tokens_per_step=300,
    num_layers=2,
    num_experts=8,
    num_per_token=2,
    drift=0.2,
    domain_shift=True,
)
RANKS = homes_and_spares(2, 8, 10, 2, 3)


def test_slots_are_per_layer_and_shared_out_evenly() -> None:
    assert homes_and_spares(4, 8, 10, 2, 3).slots_per_rank == (4,) * 8 + (12, 12)
    assert homes_and_spares(2, 7, 4, 1, 2).slots_per_rank == (5, 5, 4, 4)
    assert spread_ranks(1, 64, 10, 32).slots_per_rank == (10,) * 6 + (9,) * 4
    assert spread_ranks(1, 64, 10, 32).num_spares == 0


def test_plans_come_after_steps_that_double_and_then_at_the_pace_asked_for() -> None:
    trace = synthetic_trace(SMALL)

    assert replay(trace, RANKS, ["none"], 10).planned_after == [1, 2, 4, 8, 10, 20, 30]
    assert replay(trace, RANKS, ["none"], 1).planned_after == list(range(1, 40))
    assert replay(trace, RANKS, ["none"], 1000).planned_after == [1, 2, 4, 8, 16, 32]


def test_a_step_is_routed_by_what_came_before_it() -> None:
    """Another future changes nothing before it."""
    trace = synthetic_trace(SMALL)
    experts = trace.experts.copy()
    later = trace.step_ids >= 21
    experts[later] = (experts[later] + 3) % 8
    other = RoutingTrace(experts, trace.step_ids, trace.source_ranks, 8)

    one, two = (replay(given, RANKS, list(ROUTES), 4) for given in (trace, other))

    for route in ROUTES:
        assert (one.max_pairs[route][:21] == two.max_pairs[route][:21]).all()
    assert (one.max_pairs["even"][21:] != two.max_pairs["even"][21:]).any()


def test_routes_are_ordered_and_share_their_placements() -> None:
    trace = synthetic_trace(SMALL)
    result = replay(trace, RANKS, list(ROUTES), 8)

    assert (result.mean_pairs == 60).all()
    assert (result.max_pairs["lp"] <= result.max_pairs["waterfill"] + 1e-9).all()
    means = {route: result.max_over_mean(route).mean() for route in ROUTES}
    assert means["lp"] <= means["waterfill"] <= 1.03 * means["lp"]
    assert means["waterfill"] < means["even"]
    assert len(result.moved_copies) == len(result.planned_after)
    alone = replay(trace, RANKS, ["waterfill"], 8)
    assert (alone.max_pairs["waterfill"] == result.max_pairs["waterfill"]).all()


def test_blocks_of_steps_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = synthetic_trace(SMALL)
    whole = replay(trace, RANKS, list(ROUTES), 8)
    monkeypatch.setattr("lightmoe.balancer.replay._PROBLEMS_AT_ONCE", 1)

    parts = replay(trace, RANKS, list(ROUTES), 8)

    for route in ROUTES:
        assert (parts.max_pairs[route] == whole.max_pairs[route]).all()


def test_a_given_placement_is_kept() -> None:
    trace = synthetic_trace(SMALL)
    placement = plan(np.ones((2, 8)), RANKS.slots_per_rank, num_spares=2)

    result = replay(trace, RANKS, ["none"], placement=placement)

    home_load = np.zeros((40, 2, 10))
    for step, layer, expert in np.ndindex(40, 2, 8):
        rank = placement.homes[layer, expert]
        home_load[step, layer, rank] += trace.counts(step, step + 1)[0, layer, expert]
    assert (result.max_pairs["none"] == home_load.max(axis=2)).all()
    assert (result.planned_after, result.moved_copies) == ([], [])


def test_moves_are_copies_on_new_ranks() -> None:
    before = plan(np.ones((2, 8)), RANKS.slots_per_rank, num_spares=2)
    load = np.ones((2, 8))
    load[0, 7] = 50

    after = plan(load, RANKS.slots_per_rank, num_spares=2, previous=before)

    sets = [
        {(layer, expert, rank) for rank in range(10) for layer, expert, _ in of.hosted(rank)}
        for of in (before, after)
    ]
    assert num_moved(before, after) == len(sets[1] - sets[0]) > 0


def test_real_routing_comes_within_five_percent_of_the_whole_traces_optimum() -> None:
    """mixtral-lite on held-out Python, then prose: 8+2 ranks, 3 slots a spare and layer."""
    trace = read_trace(REAL)
    ranks = homes_and_spares(trace.num_layers, 8, 10, 2, 3)
    load = trace.counts(0, trace.num_steps).sum(axis=0)
    whole = plan(load, ranks.slots_per_rank, num_spares=2)
    optimum = replay(trace, ranks, ["lp"], placement=whole).max_over_mean("lp").mean()

    reached = replay(trace, ranks, ["waterfill"]).max_over_mean("waterfill").mean()

    assert reached <= 1.05 * optimum


def lightmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    write_trace(synthetic_trace(SMALL), tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def test_the_command_prints_a_table_and_writes_json(
    trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    flags = ("--gpus", "10", "--spares", "2", "--placement", "spare", "--slots-per-spare", "3")
    more = ("--replan-every", "8", "--expert-bytes", "1000", "--json", str(output))

    assert lightmoe("replay", str(trace_path), *flags, *more) == 0

    document = json.loads(output.read_text())
    assert list(document) == ["none", "even", "waterfill", "lp"]
    result = replay(synthetic_trace(SMALL), RANKS, list(ROUTES), 8)
    for route, figures in document.items():
        ratios = result.max_over_mean(route)
        assert figures == {
            "max_over_mean": pytest.approx(ratios.mean()),
            "max_over_mean_p95": pytest.approx(np.percentile(ratios, 95)),
            "moved_bytes": 1000 * sum(result.moved_copies),
        }
    printed = capsys.readouterr().out
    assert "8+2 ranks, 8 experts, 6 replica slots a layer" in printed
    assert all(f"{figures['max_over_mean']:.3f}" in printed for figures in document.values())
    assert "7 us a pair" in printed


@pytest.mark.parametrize(
    "routes",
    [("--route", "lp", "--route", "none"), ("--route", "lp,none"), ("--route=lp", "--route=none")],
)
def test_routes_are_given_several_times_or_with_commas(
    trace_path: Path, tmp_path: Path, routes: tuple[str, ...]
) -> None:
    output = tmp_path / "out.json"

    assert lightmoe("replay", str(trace_path), *routes, "--json", str(output)) == 0

    assert list(json.loads(output.read_text())) == ["lp", "none"]


def test_spread_takes_its_slots_over_all_ranks(
    trace_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--placement", "spread", "--replica-slots", "6", "--route", "waterfill")

    assert lightmoe("replay", str(trace_path), *flags) == 0

    assert "10+0 ranks, 8 experts, 6 replica slots a layer" in capsys.readouterr().out


def test_the_plot_is_a_png(trace_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    assert lightmoe("replay", str(trace_path), "--plot", str(tmp_path / "out.png")) == 0

    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--placement", "spread", "--spares", "2"), "--spares is for --placement spare"),
        (("--placement", "spread", "--slots-per-spare", "2"), "give --replica-slots"),
        (("--replica-slots", "2"), "--replica-slots is for --placement spread"),
        (("--gpus", "2", "--spares", "2"), "--spares 2 of 2 ranks leave no home"),
        (("--spares", "0", "--slots-per-spare", "2"), "--slots-per-spare without a spare"),
        (("--route", "best"), "--route 'best' is unknown"),
        (("--gpus", "17", "--route", "lp"), "16 ranks at most, not 17"),
        (("--replan-every", "0"), "--replan-every 0: give at least 1"),
        (("--slots-per-spare", "-1"), "--slots-per-spare -1: give at least 0"),
        (("--pair-microseconds", "nan"), "--pair-microseconds nan"),
        (("--placement", "middle"), "middle"),
        (("--plot", "out.jpg"), "out.jpg ends in .jpg; give a .png"),
    ],
)
def test_wrong_usage_exits_2(
    trace_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightmoe("replay", str(trace_path), *flags) == 2
    assert message in capsys.readouterr().err


def test_bad_files_exit_1(
    trace_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightmoe("replay", str(tmp_path / "none.npz")) == 1
    assert "none.npz cannot be read" in capsys.readouterr().err
    assert lightmoe("replay", str(trace_path), "--json", str(tmp_path / "no" / "out.json")) == 1
    assert "out.json cannot be written" in capsys.readouterr().err
