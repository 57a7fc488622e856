"""Paths, bandwidths, exchange times and orders, on machines small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.errors import UsageError
from lightmoe.kernels.route import MAX_LEVELS
from lightmoe.topology import Node, Rank, Topology, read_topology
from lightmoe.topology.tree import NEARNESS_LEVELS
from tests.topology.machines import GB, box, linked

MACHINES = {
    "no p2p": box(),
    "p2p": box(((0, 1, 2, 3),)),
    "p2p per switch": box(((0, 1), (2, 3))),
    "nvlink": linked(),
}


def places(topology: Topology, source: int, target: int) -> list[str]:
    return [f"{hop.place} {hop.direction}" for hop in topology.path(source, target)]


def to_everybody(topology: Topology, num_bytes: float) -> list[list[float]]:
    ranks = range(topology.num_ranks)
    return [[0.0 if source == target else num_bytes for target in ranks] for source in ranks]


def test_with_p2p_bytes_turn_at_the_nearest_switch() -> None:
    assert places(MACHINES["p2p"], 0, 1) == ["rank0 up", "rank1 down"]
    assert places(MACHINES["p2p"], 0, 3) == [
        "rank0 up",
        "switch0 up",
        "socket0 up",
        "socket1 down",
        "switch1 down",
        "rank3 down",
    ]


def test_without_p2p_bytes_go_through_host_memory() -> None:
    near = ["rank0 up", "switch0 up", "socket0/memory both"]
    assert places(MACHINES["no p2p"], 0, 1) == [
        *near,
        "socket0/memory both",
        "switch0 down",
        "rank1 down",
    ]
    assert places(MACHINES["no p2p"], 0, 2) == [
        *near,
        "socket0 up",
        "socket1 down",
        "socket1/memory both",
        "switch1 down",
        "rank2 down",
    ]
    assert places(MACHINES["p2p per switch"], 0, 2) == places(MACHINES["no p2p"], 0, 2)
    assert places(MACHINES["p2p per switch"], 0, 1) == places(MACHINES["p2p"], 0, 1)


def test_a_fabric_is_taken_before_the_tree() -> None:
    assert places(MACHINES["nvlink"], 0, 3) == ["nvswitch/rank0 up", "nvswitch/rank3 down"]
    assert MACHINES["nvlink"].has_p2p(0, 3)
    assert places(linked(shared=True), 0, 3) == ["nvswitch both"]


def test_bandwidth_alone() -> None:
    assert MACHINES["p2p"].bandwidth(0, 1) == 10 * GB
    assert MACHINES["no p2p"].bandwidth(0, 3) == 10 * GB
    assert MACHINES["nvlink"].bandwidth(0, 1) == 150 * GB
    assert MACHINES["p2p"].bandwidth(2, 2) == 250 * GB


def test_latency_adds_up() -> None:
    assert MACHINES["p2p"].latency_seconds(0, 1) == pytest.approx(10e-6)
    assert MACHINES["p2p"].latency_seconds(0, 3) == pytest.approx(22e-6)
    assert MACHINES["nvlink"].latency_seconds(0, 1) == pytest.approx(1e-5)
    assert MACHINES["p2p"].latency_seconds(1, 1) == 0


def test_an_exchange_lasts_as_long_as_its_busiest_link() -> None:
    p2p = MACHINES["p2p"]
    # Two cards of a switch send to two others each: four messages over 10 GB/s down.
    seconds = p2p.all_to_all_seconds(to_everybody(p2p, 1e9))
    assert seconds == pytest.approx(4 / 10 + 22e-6)
    # Without peer-to-peer all six messages of a switch's cards pass its uplink, too.
    no_p2p = MACHINES["no p2p"]
    assert no_p2p.all_to_all_seconds(to_everybody(no_p2p, 1e9)) == pytest.approx(0.6 + 22e-6)
    nvlink = MACHINES["nvlink"]
    assert nvlink.all_to_all_seconds(to_everybody(nvlink, 1e9)) == pytest.approx(0.03 + 1e-5)


def test_messages_on_a_shared_fabric_cost_one_after_the_other() -> None:
    loopback = linked(4, shared=True, message_seconds=1e-3)
    seconds = loopback.all_to_all_seconds(to_everybody(loopback, 1e9))
    assert seconds == pytest.approx(12 * 1e-3 + 12 / 100 + 1e-5)
    apart = linked(4, shared=False, message_seconds=1e-3)
    assert apart.all_to_all_seconds(to_everybody(apart, 1e9)) == pytest.approx(3e-3 + 0.03 + 1e-5)


def test_what_a_rank_keeps_costs_nothing() -> None:
    keeps = [[1e12 if source == target else 0.0 for target in range(4)] for source in range(4)]
    assert MACHINES["p2p"].all_to_all_seconds(keeps) == 0


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
@given(st.lists(st.lists(st.floats(0, 1e9), min_size=4, max_size=4), min_size=4, max_size=4))
def test_more_bytes_are_never_faster_and_no_pair_beats_its_bandwidth(
    machine: Topology, matrix: list[list[float]]
) -> None:
    seconds = machine.all_to_all_seconds(matrix)
    more = [[2 * num_bytes for num_bytes in row] for row in matrix]
    assert machine.all_to_all_seconds(more) >= seconds
    for source in range(4):
        for target in range(4):
            if source != target:
                alone = matrix[source][target] / machine.bandwidth(source, target)
                assert seconds >= alone * (1 - 1e-9)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_every_round_of_an_exchange_is_a_permutation(machine: Topology) -> None:
    orders = [machine.exchange_order(rank) for rank in range(machine.num_ranks)]
    for rank, order in enumerate(orders):
        assert sorted([rank, *order]) == list(range(machine.num_ranks))
    for targets in zip(*orders, strict=True):
        assert sorted(targets) == list(range(machine.num_ranks))


def test_the_first_ranks_of_a_machine() -> None:
    two = box(((0, 1, 2, 3),)).first(2)
    assert (two.num_ranks, two.p2p_groups) == (2, ((0, 1),))
    assert linked(4).first(3).fabrics[0].ranks == (0, 1, 2)
    with pytest.raises(UsageError, match="describes 4 ranks and 5 are asked for"):
        box().first(5)


def test_from_host_memory_the_way_is_the_second_half() -> None:
    machine = MACHINES["no p2p"]
    for source in range(4):
        for target in range(4):
            if source != target:
                up, down = machine.host_path(source, "up"), machine.pull_path(source, target)
                assert (*up, *down) == machine.path(source, target)
    own = [f"{hop.place} {hop.direction}" for hop in MACHINES["nvlink"].pull_path(0, 1)]
    assert own == ["rank1 down"], "beside a fabric there is host memory, too"


def test_neighbourhoods() -> None:
    assert MACHINES["no p2p"].neighbourhoods() == (0, 0, 2, 2)
    assert MACHINES["p2p"].neighbourhoods() == (0, 0, 2, 2)
    assert MACHINES["nvlink"].neighbourhoods() == (0, 0, 0, 0)
    bridged = replace(box(), fabrics=(replace(linked().fabrics[0], ranks=(1, 2)),))
    assert bridged.neighbourhoods() == (0, 0, 2, 2), "a bridge of two makes no neighbourhood"


def test_who_is_near_whom() -> None:
    assert MACHINES["no p2p"].nearness() == ((0, 0, 2, 2),), "a socket has one switch here"
    assert MACHINES["nvlink"].nearness() == ()
    assert box().first(2).nearness() == (), "one switch"
    bridged = replace(box(), fabrics=(replace(linked().fabrics[0], ranks=(1, 2)),))
    assert bridged.nearness() == ((0, 1, 1, 3), (0, 0, 2, 2))


def hung(*parents: str) -> Topology:
    """Ranks below switches s0 to s2 of socket0, s3 of socket1, or sockets; any numbering."""
    nodes = dict(box().nodes)
    for switch, socket in (("s0", 0), ("s1", 0), ("s2", 0), ("s3", 1)):
        nodes[switch] = Node(name=switch, kind="switch", parent=f"socket{socket}", link="x16")
    nodes["below"] = Node(name="below", kind="switch", parent="s0", link="x16")
    nodes["lower"] = Node(name="lower", kind="switch", parent="below", link="x16")
    ranks = tuple(Rank(device="card", parent=parent, link="x16") for parent in parents)
    return replace(box(), nodes=nodes, ranks=ranks)


def test_nearness_of_switches_and_sockets_in_any_numbering() -> None:
    assert hung("s0", "s3", "s1", "s0", "s1", "s3").nearness() == (
        (0, 1, 2, 0, 2, 1),
        (0, 1, 0, 0, 0, 1),
    )
    assert hung("s0", "socket0", "s3", "socket1").nearness() == ((0, 0, 2, 2),), "uneven depths"
    assert hung("s0", "s1", "s2").nearness() == (), "a switch each, one socket"


def test_the_farthest_of_many_levels_is_left_out() -> None:
    parents = ("lower", "lower", "below", "s0", "s1", "s3", "s3")
    assert NEARNESS_LEVELS == MAX_LEVELS == 3
    assert hung(*parents).nearness() == (
        (0, 0, 2, 3, 4, 5, 5),
        (0, 0, 0, 3, 4, 5, 5),
        (0, 0, 0, 0, 4, 5, 5),
    )


def test_the_reference_box_has_two_switches(checkout: Path) -> None:
    machine = read_topology(checkout / "topology" / "10x2080ti-pcie.toml")
    assert machine.nearness() == ((0,) * 5 + (5,) * 5,)
    assert read_topology(checkout / "topology" / "8xh200-nvlink.toml").nearness() == ()
    assert read_topology(checkout / "topology" / "cpu-10.toml").nearness() == ()
