"""What the live balancer's planner is told of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightmoe.balancer import start
from lightmoe.balancer.gain import max_over_mean
from lightmoe.balancer.loop import Balancer
from lightmoe.balancer.planner import plan
from lightmoe.balancer.start import rank_speeds, start_balancer
from lightmoe.core import RankInfo
from lightmoe.moe.placement import Placement, initial_placement
from lightmoe.topology import Topology, read_topology
from tests.topology.machines import CARD, box, linked

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_SLOTS = 4, 32, 4, 49
PLACEMENT = initial_placement(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS)
LOAD = np.tile(1000 // np.sqrt(np.arange(1, NUM_EXPERTS + 1)), (NUM_LAYERS, 1))
ROOT = Path(__file__).resolve().parents[2]


def uneven() -> Topology:
    """The last card computes at a third of the others' speed."""
    slow = replace(CARD, name="slow", flops_per_second=CARD.flops_per_second / 3)
    machine = linked()
    ranks = (*machine.ranks[:3], replace(machine.ranks[3], device="slow"))
    return replace(machine, devices={**machine.devices, "slow": slow}, ranks=ranks)


class Planned:
    """The planner, and what it was told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __call__(self, load: np.ndarray, slots: Sequence[int], **told: Any) -> Placement:
        self.told = told
        return plan(load, slots, **told)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    planner = Planned()
    monkeypatch.setattr(start, "plan", planner)
    return planner


def started(topology: Topology | None) -> Balancer:
    ranks = [
        RankInfo(
            rank=rank,
            kind="home",
            device="cpu",
            num_slots=NUM_SLOTS,
            weight_bytes=0,
            num_kv_blocks=1,
        )
        for rank in range(NUM_RANKS)
    ]
    return start_balancer(
        ranks,
        PLACEMENT,
        interval_steps=4,
        bytes_per_step=1 << 20,
        num_free_slots=1,
        from_host=False,
        topology=topology,
    )


def goal(balancer: Balancer) -> Placement:
    """What the loop's planner makes of the load, as its thread would ask."""
    try:
        return balancer._plan(LOAD, PLACEMENT)
    finally:
        balancer.close()


def on_both_switches(placement: Placement) -> float:
    """Of the experts with two copies, those with one copy below each switch of the box."""
    held = placement.slot_table >= 0
    both = held[:, :, :2].any(axis=2) & held[:, :, 2:].any(axis=2)
    return float(both[held.sum(axis=2) == 2].mean())


def test_replicas_are_spread_over_neighbourhoods(planned: Planned) -> None:
    replicated = goal(started(box()))
    assert planned.told["rank_nodes"] == (0, 0, 2, 2)
    assert planned.told["rank_speeds"] == (1.0,) * 4
    assert on_both_switches(replicated) > 1.2 * on_both_switches(goal(started(None)))


def test_without_a_topology_all_ranks_are_alike(planned: Planned) -> None:
    goal(started(None))
    assert planned.told["rank_nodes"] is None
    assert planned.told["rank_speeds"] is None


def test_a_slow_card_is_home_to_less(planned: Planned) -> None:
    told = goal(started(uneven()))
    assert planned.told["rank_speeds"] == pytest.approx((1.2, 1.2, 1.2, 0.4))
    assert planned.told["rank_nodes"] == (0, 0, 0, 0)
    alike = goal(started(linked()))

    def at_home(placement: Placement) -> float:
        """The last rank's part of the load, did all go to the homes."""
        return float(LOAD[placement.homes == 3].sum() / LOAD.sum())

    assert at_home(alike) > 0.2
    assert at_home(told) < 0.8 * at_home(alike)


def test_gains_are_reckoned_with_the_same_speeds() -> None:
    even = np.full((1, 4), 100)
    placement = initial_placement(1, 4, 4)
    assert max_over_mean(even, placement, "none") == pytest.approx(1.0)
    speeds = rank_speeds(uneven())
    slowest = max_over_mean(even, placement, "none", rank_speeds=speeds)
    assert slowest == pytest.approx(1 / 0.4)


@pytest.mark.parametrize("name", ["10x2080ti-pcie", "4xh200-nvlink", "8xh200-nvlink", "cpu-10"])
def test_ranks_of_one_kind_are_equal(name: str) -> None:
    speeds = rank_speeds(read_topology(ROOT / "topology" / f"{name}.toml"))
    assert set(speeds) == {speeds[0]}
    assert speeds[0] == pytest.approx(1.0)
