"""The seam to real cards: NVML and the child process made up here, and once the real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from lightmoe.errors import MachineError
from lightmoe.topology import nvidia
from lightmoe.topology.hardware import HOST, Copy, NvLinks, Speed
from lightmoe.topology.nvidia import Child, ChildHangsError, NvidiaHardware, bus_name, cpus_of

SCRIPT = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["request"] == "hang":
        time.sleep(60)
    if request["request"] == "die":
        sys.exit("it broke")
    failing = request["request"] == "fail"
    print(json.dumps({"error": "no such card"} if failing else {"value": request}), flush=True)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvidia, "START_SECONDS", 10.0)
    made = Child([sys.executable, "-c", SCRIPT])
    yield made
    made.close()


def test_a_child_answers_and_says_what_failed(child: Child) -> None:
    assert child.ask("echo", card=3) == {"request": "echo", "card": 3}
    with pytest.raises(MachineError, match="fail on the cards failed: no such card"):
        child.ask("fail")
    assert child.ask("echo", card=4)["card"] == 4


def test_a_child_that_hangs_is_ended_and_replaced(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.ask("echo")
    with pytest.raises(ChildHangsError, match="hang took over"):
        child.ask("hang", timeout_seconds=0.2)
    assert child.ask("echo", card=1)["card"] == 1


def test_a_child_that_dies_leaves_its_last_words(child: Child) -> None:
    with pytest.raises(MachineError, match="died at die: it broke"):
        child.ask("die")


class FakeNvml:
    """Two cards, an NVLink bridge of two links between them; the PCIe width is not told of one."""

    NVMLError = pynvml.NVMLError
    NVML_NVLINK_MAX_LINKS = 6
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    for level in ("INTERNAL", "SINGLE", "MULTIPLE", "HOSTBRIDGE", "NODE", "SYSTEM"):
        locals()[f"NVML_TOPOLOGY_{level}"] = getattr(pynvml, f"NVML_TOPOLOGY_{level}")

    def __init__(self) -> None:
        self.is_open = False
        self.level = pynvml.NVML_TOPOLOGY_SINGLE
        self.remote_kind = 0

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return ["GPU-aa", "GPU-bb"].index(uuid)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"00000000:{handle}B:00.0")

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "card"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 7, 5

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=11 << 30)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        if handle:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 8

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return 3

    nvmlDeviceGetMaxPcieLinkGeneration = nvmlDeviceGetCurrPcieLinkGeneration

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link > 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(link < 2)

    def nvmlDeviceGetNvLinkVersion(self, handle: int, link: int) -> int:
        return 2

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return self.remote_kind

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        return SimpleNamespace(busId=f"00000000:{1 - handle}B:00.0")

    def nvmlDeviceGetTopologyCommonAncestor(self, first: int, second: int) -> int:
        return self.level


class FakeChild:
    """Answers from a table; a request without an entry hangs."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {"uuids": ["bb", "aa"]}

    def ask(self, request: str, timeout_seconds: float = 0.0, **values: Any) -> Any:
        self.asked.append((request, values))
        if request not in self.answers:
            raise ChildHangsError(f"{request} took over {timeout_seconds} s")
        return self.answers[request]

    def close(self) -> None:
        self.answers.clear()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(nvidia, "pynvml", fake)
    return fake


def hardware(tmp_path: Path) -> tuple[NvidiaHardware, FakeChild]:
    folder = tmp_path / "bus/pci/devices/0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "numa_node").write_text("1\n")
    (folder / "local_cpulist").write_text("0-2,8\n")
    child = FakeChild()
    return NvidiaHardware(child, tmp_path), child  # type: ignore[arg-type]


def test_cards_in_the_order_that_torch_sees(nvml: FakeNvml, tmp_path: Path) -> None:
    machine, _ = hardware(tmp_path)
    with machine:
        first, second = machine.cards()
        assert nvml.is_open
    assert not nvml.is_open
    assert (first.bus_id, first.numa_node, first.lanes) == ("0000:1b:00.0", 1, 0)
    assert (second.bus_id, second.numa_node, second.lanes) == ("0000:0b:00.0", -1, 8)
    assert first.nvlinks == (NvLinks(num_links=2, version=2, bus_id="0000:0b:00.0"),)
    assert (second.max_lanes, second.generation, second.compute_capability) == (16, 3, "7.5")


def test_links_to_a_switch_have_no_bus_id(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.remote_kind = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    machine, _ = hardware(tmp_path)
    assert machine.cards()[0].nvlinks == (NvLinks(num_links=2, version=2, bus_id=""),)


@pytest.mark.parametrize(
    ("level", "name"), [("SINGLE", "switch"), ("NODE", "socket"), ("SYSTEM", "machine")]
)
def test_nearness(nvml: FakeNvml, tmp_path: Path, level: str, name: str) -> None:
    nvml.level = getattr(pynvml, f"NVML_TOPOLOGY_{level}")
    machine, _ = hardware(tmp_path)
    machine.cards()
    assert machine.nearness(0, 1) == name
    nvml.level = 17
    assert machine.nearness(0, 1) == "unknown"


def test_requests_to_the_child(nvml: FakeNvml, tmp_path: Path) -> None:
    machine, child = hardware(tmp_path)
    machine.cards()
    child.answers |= {
        "test_p2p": "wrong bytes",
        "copy_rates": [1.0],
        "latency_seconds": 1e-5,
        "speed": {"flops_per_second": 2.0, "bytes_per_second": 3.0},
    }
    assert machine.test_p2p(0, 1) == "wrong bytes"
    assert machine.copy_rates([Copy(HOST, 1)], 0.1) == [1.0]
    assert child.asked[-1][1]["copies"] == [[-1, 1]]
    assert child.asked[-1][1]["cpus"] == [[0, 1, 2, 8], []]
    assert machine.latency_seconds(Copy(0, 1)) == 1e-5
    assert machine.speed(0) == Speed(flops_per_second=2.0, bytes_per_second=3.0)


def test_a_hang_is_a_result_of_p2p_and_an_error_of_copies(nvml: FakeNvml, tmp_path: Path) -> None:
    machine, _ = hardware(tmp_path)
    machine.cards()
    assert machine.test_p2p(0, 1) == "hangs"
    with pytest.raises(MachineError, match="the cards hang: copy_rates took over"):
        machine.copy_rates([Copy(0, 1)], 0.1)


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(nvidia.pynvml, "nvmlInit", refuse)
    with pytest.raises(MachineError, match="driver does not answer"):
        NvidiaHardware()


def test_names_and_lists() -> None:
    assert bus_name("00000000:1B:00.0") == "0000:1b:00.0"
    assert cpus_of("0-2,8\n") == [0, 1, 2, 8]
    assert cpus_of("\n") == []


def test_the_real_child_starts_and_reports_what_torch_raises() -> None:
    child = Child()
    try:
        cards = child.ask("uuids")
        with pytest.raises(MachineError, match="speed on the cards failed: ."):
            child.ask("speed", card=len(cards))
        assert child.ask("uuids") == cards
    finally:
        child.close()


@pytest.mark.gpu
def test_the_real_cards() -> None:
    with NvidiaHardware() as machine:
        cards = machine.cards()
        assert cards
        assert machine.copy_rates([Copy(HOST, 0)], 0.05)[0] > 1e9
        assert 0 < machine.latency_seconds(Copy(0, HOST)) < 0.01
        assert machine.speed(0).flops_per_second > 1e12
        for other in range(1, len(cards)):
            assert machine.test_p2p(0, other) in ("works", "not offered")
