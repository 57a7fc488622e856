"""The probe on made-up machines: what it measures becomes a description that reads back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lightmoe.errors import MachineError
from lightmoe.topology import Topology, read_topology, to_toml
from lightmoe.topology.hardware import HOST, Card, Copy, Nearness, NvLinks, P2PResult, Speed
from lightmoe.topology.probe import probe
from tests.topology.machines import GB


class FakeHardware:
    """Four cards, two under each switch, a switch a socket: 12 GB/s up, 10 down, shared."""

    def __init__(self, nvlinks: Sequence[tuple[NvLinks, ...]] = ((),) * 4, numa: int = 2) -> None:
        self.nvlinks, self.numa = nvlinks, numa
        self.p2p: dict[tuple[int, int], P2PResult] = {}
        self.peer_rate = 9 * GB
        self.requests: list[list[Copy]] = []

    def cards(self) -> Sequence[Card]:
        return [
            Card(
                name="card",
                bus_id=f"0000:{index}0:00.0",
                memory_bytes=11 << 30,
                compute_capability="7.5",
                numa_node=index * self.numa // 4 if self.numa else -1,
                lanes=8 if index == 3 else 16,
                generation=3,
                max_lanes=16,
                max_generation=3,
                nvlinks=self.nvlinks[index],
            )
            for index in range(4)
        ]

    def nearness(self, first: int, second: int) -> Nearness:
        return "switch" if first // 2 == second // 2 else "machine"

    def test_p2p(self, source: int, target: int) -> P2PResult:
        return self.p2p.get((source, target), "works" if self.p2p or self.linked else "not offered")

    @property
    def linked(self) -> bool:
        return any(self.nvlinks)

    def copy_rates(self, copies: Sequence[Copy], seconds: float) -> list[float]:
        self.requests.append(list(copies))
        assert 0 < seconds <= 0.2
        if copies[0].target == HOST:
            return [12 * GB / len(copies)] * len(copies)
        if copies[0].source == HOST:
            return [10 * GB / len(copies)] * len(copies)
        return [self.peer_rate / max(1, len(copies) // 6)] * len(copies)

    def latency_seconds(self, copy: Copy) -> float:
        return 1e-5 if HOST in (copy.source, copy.target) else 2e-5

    def speed(self, card: int) -> Speed:
        return Speed(flops_per_second=50e12, bytes_per_second=500 * GB)


def probed(hardware: FakeHardware, tmp_path: Path) -> tuple[Topology, list[str]]:
    lines: list[str] = []
    topology = probe(hardware, "mine", lines.append)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(topology))
    assert read_topology(path) == topology
    return topology, lines


def test_cards_behind_switches_without_p2p(tmp_path: Path) -> None:
    topology, _ = probed(FakeHardware(), tmp_path)
    assert [rank.parent for rank in topology.ranks] == ["switch0", "switch0", "switch1", "switch1"]
    assert [topology.nodes[f"switch{i}"].parent for i in (0, 1)] == ["socket0", "socket1"]
    assert topology.links["switch0-uplink"].up_bytes_per_second == 12 * GB
    assert topology.links["card3"].lanes == 8
    assert topology.links["card3"].max_lanes == 16
    assert (topology.p2p_groups, topology.fabrics) == ((), ())
    assert topology.latency_seconds(0, 2) == pytest.approx(2e-5)
    assert topology.device(0).reached_flops_per_second == 50e12


def test_all_cards_of_a_switch_and_of_a_socket_copy_at_once() -> None:
    hardware = FakeHardware(numa=1)
    probe(hardware, "mine", lambda _: None)
    host = [[copy.source for copy in copies if copy.target == HOST] for copies in hardware.requests]
    assert [0, 1] in host
    assert [2, 3] in host
    assert [0, 1, 2, 3] in host


def test_p2p_that_lies_is_said_and_not_used(tmp_path: Path) -> None:
    hardware = FakeHardware()
    hardware.p2p = {(0, 1): "works", (1, 0): "works", (0, 2): "hangs", (2, 1): "wrong bytes"}
    hardware.p2p |= {(s, t): "not offered" for s in (2, 3) for t in range(4) if (s, t) != (2, 1)}
    hardware.p2p |= {(s, t): "not offered" for s in (0, 1) for t in (2, 3) if (s, t) != (0, 2)}
    topology, lines = probed(hardware, tmp_path)
    assert topology.p2p_groups == ((0, 1),)
    assert "peer-to-peer from card 0 to 2 is offered and fails: hangs" in lines
    assert "peer-to-peer from card 2 to 1 is offered and fails: wrong bytes" in lines


def test_after_two_hangs_no_pair_is_tried(tmp_path: Path) -> None:
    hardware = FakeHardware()
    hardware.p2p = {(0, 1): "works", (0, 2): "hangs", (0, 3): "hangs"}
    topology, lines = probed(hardware, tmp_path)
    assert topology.p2p_groups == ()
    assert "no further pair is tried; none of them is taken to work" in lines


def test_cards_that_nobody_places_are_under_one_root(tmp_path: Path) -> None:
    hardware = FakeHardware(numa=0)
    hardware.nearness = lambda first, second: "unknown"  # type: ignore[method-assign]
    topology, _ = probed(hardware, tmp_path)
    assert list(topology.nodes) == ["machine"]
    assert topology.links["machine-memory"].up_bytes_per_second == 12 * GB


def test_p2p_over_pcie_is_no_fabric(tmp_path: Path) -> None:
    hardware = FakeHardware()
    hardware.p2p = {(0, 0): "works"}
    topology, _ = probed(hardware, tmp_path)
    assert topology.p2p_groups == ((0, 1, 2, 3),)
    assert topology.fabrics == ()


def test_nvswitch(tmp_path: Path) -> None:
    hardware = FakeHardware(((NvLinks(num_links=18, version=4, bus_id=""),),) * 4)
    hardware.peer_rate = 400 * GB
    topology, _ = probed(hardware, tmp_path)
    (fabric,) = topology.fabrics
    assert (fabric.kind, fabric.ranks) == ("nvswitch", (0, 1, 2, 3))
    assert fabric.pair_bytes_per_second == 400 * GB
    assert fabric.bytes_per_second == 600 * GB  # three streams of 200 a card
    assert fabric.latency_seconds == 2e-5
    assert topology.p2p_groups == ()


def test_cards_too_fast_for_pcie_are_linked_where_the_driver_tells_nothing(tmp_path: Path) -> None:
    hardware = FakeHardware()
    hardware.p2p = {(0, 0): "works"}
    hardware.peer_rate = 300 * GB
    topology, _ = probed(hardware, tmp_path)
    assert [fabric.kind for fabric in topology.fabrics] == ["nvswitch"]


def test_bridges_join_pairs(tmp_path: Path) -> None:
    partners = (1, 0, 3, 2)
    links = [
        (NvLinks(num_links=2, version=2, bus_id=f"0000:{partner}0:00.0"),) for partner in partners
    ]
    hardware = FakeHardware(links)
    hardware.peer_rate = 45 * GB
    topology, _ = probed(hardware, tmp_path)
    assert [(fabric.kind, fabric.ranks) for fabric in topology.fabrics] == [
        ("bridge", (0, 1)),
        ("bridge", (2, 3)),
    ]
    assert topology.bandwidth(2, 3) == 45 * GB


def test_sockets_from_the_driver_where_the_system_does_not_tell(tmp_path: Path) -> None:
    topology, _ = probed(FakeHardware(numa=0), tmp_path)
    assert {node.kind for node in topology.nodes.values()} == {"machine", "socket", "switch"}


def test_no_card() -> None:
    class Nothing(FakeHardware):
        def cards(self) -> Sequence[Card]:
            return []

    with pytest.raises(MachineError, match="no GPU found"):
        probe(Nothing(), "mine", lambda _: None)
