"""What carries the rows of a launch: what is asked, what figures say, what the machine allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightmoe.config import LaunchConfig
from lightmoe.errors import UsageError
from lightmoe.machine import Driver, Gpu
from lightmoe.topology import Topology, read_topology, to_toml
from lightmoe.worker.devices import Devices
from lightmoe.worker.transports import Carried, choose_carrier, read_launch_topology
from tests.topology.machines import box, linked

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
ON_CARDS = Devices("cuda", "4 ranks on 4 GPUs", (0, 1, 2, 3))
ON_CPU = Devices("cpu", "no GPU found")
SHARED = Devices("cuda", "4 ranks on H200", (0, 0, 0, 0))
ALL_PAIRS = tuple((a, b) for a in range(4) for b in range(a + 1, 4))


def driver(
    pairs: tuple[tuple[int, int], ...] = ALL_PAIRS, name: str = "NVIDIA H200", first: int = 6
) -> Driver:
    cards = [
        Gpu(
            name=name,
            compute_capability=(9, 0),
            memory_bytes=141 * GIB,
            free_bytes=141 * GIB,
            bus_id=f"00000000:00:{first + card:02X}.0",
        )
        for card in range(4)
    ]
    return Driver(version="580.65.06", gpus=tuple(cards), p2p_pairs=pairs)


def config(**values: object) -> LaunchConfig:
    return LaunchConfig(**{"model": "mixtral-lite", "gpus": 4} | values)


def carrier(
    topology: Topology | None,
    pairs: tuple[tuple[int, int], ...] = ALL_PAIRS,
    devices: Devices = ON_CARDS,
    **values: object,
) -> Carried:
    return choose_carrier(config(**values), devices, driver(pairs), topology, element_bytes=2)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_without_figures_it_is_as_the_driver_says() -> None:
    near, far = carrier(None), carrier(None, pairs=ALL_PAIRS[:-1])
    assert (near.transport, near.on_host) == ("copy_engine", False)
    assert (far.transport, far.on_host) == ("copy_engine", True)
    assert "do not reach each other" in far.reason
    assert "lightmoe topology probe" in near.reason
    assert "lightmoe topology probe" in far.reason
    shared = carrier(None, devices=SHARED, oversubscribe=True)
    assert shared == Carried(transport="copy_engine", reason="over the cards' memory")


@pytest.mark.parametrize(
    ("devices", "values", "transport"),
    [
        (ON_CPU, {}, "gloo"),
        (ON_CPU, {"gpus": 1, "spares": 0}, "local"),
        (ON_CARDS, {"address": "auto"}, "nccl"),
        (ON_CARDS, {"transport": "nccl"}, "nccl"),
    ],
)
def test_without_a_choice_nothing_is_said(
    devices: Devices, values: dict[str, object], transport: str
) -> None:
    for topology in (None, linked()):
        assert carrier(topology, devices=devices, **values) == Carried(transport=transport)


def test_figures_decide_and_are_said() -> None:
    found = carrier(linked(), max_num_batched_tokens=4096)
    assert (found.transport, found.on_host) == ("copy_engine", False)
    assert "linked, 4096 / 16 tokens a rank: copy_engine (ipc) " in found.reason
    assert ", copy_engine (host) " in found.reason
    assert ", nccl " in found.reason
    through_host = carrier(box())
    assert (through_host.transport, through_host.on_host) == ("copy_engine", True)
    assert "ipc" not in through_host.reason


def test_copies_that_failed_count_more_than_what_the_driver_offers() -> None:
    assert carrier(box(), transport="copy_engine").on_host
    assert not carrier(linked(), transport="copy_engine").on_host
    assert carrier(linked(), pairs=(), transport="copy_engine").on_host


def test_where_copy_engine_meets_can_be_asked_for() -> None:
    assert carrier(linked(), peer_memory="host").on_host
    assert not carrier(box(), pairs=(), peer_memory="device").on_host
    assert carrier(None, peer_memory="host").on_host
    assert not carrier(None, pairs=(), peer_memory="device").on_host


def test_peer_memory_is_a_wish_for_copy_engine() -> None:
    """Figures by which nccl is faster do not lead away from what was asked for."""
    found = carrier(linked(), peer_memory="device")
    assert found == Carried(transport="copy_engine", reason="over the cards' memory")
    assert carrier(box(), peer_memory="host").reason == "over host memory: as asked"


@pytest.mark.parametrize("peer_memory", ["host", "device"])
@pytest.mark.parametrize(
    ("devices", "values", "message"),
    [
        (ON_CARDS, {"transport": "nccl"}, r"nccl for .* \(4 ranks on 4 GPUs\); take .*copy_engine"),
        (ON_CARDS, {"address": "auto"}, "nccl for 4 ranks on the GPUs of a cluster .*; leave peer"),
        (ON_CARDS, {"overflow": "drop", "deterministic": "off"}, "nccl for .* overflow drop"),
        (ON_CPU, {}, r"gloo for 4 ranks on the CPU \(no GPU found\); leave peer_memory out"),
        (ON_CPU, {"transport": "gloo"}, "gloo for 4 ranks on the CPU"),
        (ON_CPU, {"gpus": 1}, "local for one rank"),
    ],
)
def test_peer_memory_without_copy_engine_is_refused(
    peer_memory: str, devices: Devices, values: dict[str, object], message: str
) -> None:
    for topology in (None, linked()):
        with pytest.raises(UsageError, match=f"peer_memory {peer_memory} says .* is {message}"):
            carrier(topology, devices=devices, peer_memory=peer_memory, **values)


def test_int8_goes_by_what_carries_it() -> None:
    found = carrier(linked(), payload="int8", deterministic="off")
    assert (found.transport, found.on_host) == ("copy_engine", False)


def test_a_transport_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="transport gloo does not fit 4 ranks on GPUs"):
        carrier(linked(), transport="gloo")


def test_auto_takes_the_file_of_these_very_cards() -> None:
    found = read_launch_topology(config(), ON_CARDS, driver())
    assert found == read_topology(ROOT / "topology" / "4xh200-nvlink.toml")
    assert read_launch_topology(config(), ON_CARDS, driver(first=7)) is None
    assert read_launch_topology(config(), ON_CARDS, driver(name="NVIDIA H100")) is None
    assert read_launch_topology(config(), SHARED, driver()) is None
    assert read_launch_topology(config(), ON_CPU, Driver()) is None
    assert read_launch_topology(config(address="auto"), ON_CARDS, driver()) is None


def test_a_file_that_is_asked_for_is_cut_to_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(to_toml(linked(8), []))
    found = read_launch_topology(
        config(topology=str(tmp_path / "mine.toml")), ON_CARDS, driver(name="other")
    )
    assert found is not None
    assert found.num_ranks == 4
    cpu = read_launch_topology(config(topology="cpu-10"), ON_CPU, Driver())
    assert cpu is not None
    assert cpu.num_ranks == 4


@pytest.mark.parametrize(
    ("name", "devices", "message"),
    [
        ("8xh200-nvlink", ON_CPU, r"describes cuda ranks and these are cpu \(no GPU found\)"),
        ("cpu-10", ON_CARDS, "describes cpu ranks and these are cuda"),
        ("8xh200-nvlink", SHARED, "leave one of the two out"),
        ("nobody", ON_CARDS, "no known name"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name: str, devices: Devices, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_launch_topology(config(topology=name), devices, driver())


def test_too_few_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="describes 4 ranks and 5 are asked for"):
        read_launch_topology(config(gpus=5, topology="4xh200-nvlink"), ON_CARDS, driver())
