"""The probes, on files, sockets and a driver made up here."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pynvml
import pytest

from lightmoe import machine
from lightmoe.machine import (
    Driver,
    Gpu,
    file_mode,
    free_ram_bytes,
    installed_version,
    loopback_error,
    port_error,
    port_holder,
    profiling_error,
    read_acs_bridges,
    read_cupy,
    read_driver,
    read_ray_cluster,
)

GIB = 1 << 30


class FakeNvml:
    """The calls of pynvml that are used, for a box with two cards."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound

    def __init__(self, init_error: int = 0, count_error: int = 0) -> None:
        self.init_error, self.count_error, self.is_open = init_error, count_error, False

    def nvmlInit(self) -> None:
        if self.init_error:
            raise pynvml.NVMLError(self.init_error)
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        if self.count_error:
            raise pynvml.NVMLError(self.count_error)
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:
        return [7, 5 + handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        return type("Memory", (), {"total": (11 + handle) * GIB, "free": handle * GIB})

    NVML_P2P_CAPS_INDEX_READ = pynvml.NVML_P2P_CAPS_INDEX_READ
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK
    NVML_P2P_STATUS_UNKNOWN = pynvml.NVML_P2P_STATUS_UNKNOWN

    def nvmlDeviceGetPciInfo(self, handle: int) -> object:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return type("PciInfo", (), {"busId": "00000000:1B:00.0"})

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 8

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 16

    def nvmlDeviceGetP2PStatus(self, first: int, second: int, index: int) -> int:
        return pynvml.NVML_P2P_STATUS_OK

    def nvmlSystemGetDriverVersion(self) -> str:
        return "535.183.01"


def test_driver_and_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(machine, "pynvml", nvml)
    cards = (
        Gpu(
            name="card 0",
            compute_capability=(7, 5),
            memory_bytes=11 * GIB,
            free_bytes=0,
            lanes=8,
            max_lanes=16,
            bus_id="00000000:1B:00.0",
        ),
        Gpu(
            name="card 1",
            compute_capability=(7, 6),
            memory_bytes=12 * GIB,
            free_bytes=GIB,
            lanes=8,
        ),
    )
    driver = read_driver()
    assert driver == Driver(version="535.183.01", gpus=cards, p2p_pairs=((0, 1),))
    assert driver.major == 535
    assert not nvml.is_open


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setattr(machine, "pynvml", missing)
    assert read_driver() == Driver()
    assert Driver().major == 0


@pytest.mark.parametrize("when", ["init_error", "count_error"])
def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    nvml = FakeNvml(**{when: pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH})
    monkeypatch.setattr(machine, "pynvml", nvml)
    driver = read_driver()
    assert "mismatch" in driver.error.lower()
    assert driver.gpus == ()
    assert not nvml.is_open


def test_cupy_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"cupy-cuda12x": "14.2.0"}
    monkeypatch.setattr(machine, "installed_version", installed.get)
    assert read_cupy() == ("cupy-cuda12x 14.2.0",)


def test_ray_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    current = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(machine, "RAY_CURRENT_CLUSTER", current)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert read_ray_cluster() is None
    current.write_text("127.0.0.1:6379\n")
    assert read_ray_cluster() == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert read_ray_cluster() == "10.0.0.1:6379"


def test_a_held_port_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_holder(port).endswith(f"(process {os.getpid()})")
        assert port_error(port) == f"held by {port_holder(port)}"
    assert port_error(port) is None
    assert port_holder(port) is None


def test_a_port_held_by_someone_unseen(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    row = "0: 0100007F:1F40 00000000:0000 0A 0:0 0:0 0 0 0 4242 1"
    (tmp_path / "net/tcp").write_text(f"header\n{row}\n")
    (tmp_path / "1/fd").mkdir(parents=True)
    (tmp_path / "1/comm").write_text("nginx\n")
    assert port_holder(8000, tmp_path) is None
    (tmp_path / "1/fd/3").symlink_to("socket:[4242]")
    assert port_holder(8000, tmp_path) == "nginx (process 1)"
    assert port_holder(8001, tmp_path) is None


def test_loopback_answers() -> None:
    assert loopback_error() is None


def test_file_mode(tmp_path: Path) -> None:
    token = tmp_path / "token"
    assert file_mode(token) is None
    token.touch(mode=0o600)
    assert file_mode(token) == 0o600


def test_a_container_limit_counts(tmp_path: Path) -> None:
    assert free_ram_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8388608 kB\n")
    assert free_ram_bytes(tmp_path) == 8 * GIB
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert free_ram_bytes(tmp_path) == 8 * GIB
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group / "memory.current").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert free_ram_bytes(tmp_path) == 2 * GIB


def test_installed_version() -> None:
    assert installed_version("nonesuch-package") is None
    assert installed_version("pytest") == pytest.__version__


def pci_bridge(sysfs: Path, name: str, acs_control: int | None, size: int = 4096) -> None:
    """A bridge as sysfs shows it: one other capability at 0x100, then that of ACS."""
    config = bytearray(size)
    if size > 256:
        struct.pack_into("<I", config, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
        if acs_control is not None:
            struct.pack_into("<IHH", config, 0x148, 0x000D | 1 << 16, 0x5F, acs_control)
    folder = sysfs / "bus/pci/devices" / name
    folder.mkdir(parents=True)
    (folder / "class").write_text("0x060400\n")
    (folder / "config").write_bytes(config)


def test_bridges_that_redirect(tmp_path: Path) -> None:
    pci_bridge(tmp_path, "0000:00:01.0", 0x1D)
    pci_bridge(tmp_path, "0000:00:02.0", 0x11)
    pci_bridge(tmp_path, "0000:00:03.0", None)
    assert read_acs_bridges(tmp_path) == ("0000:00:01.0",)


@pytest.mark.parametrize("size", [64, 256])
def test_bridges_that_are_not_shown(tmp_path: Path, size: int) -> None:
    pci_bridge(tmp_path, "0000:00:01.0", 0x1D, size)
    assert read_acs_bridges(tmp_path) is None
    assert read_acs_bridges(tmp_path / "none") is None


def test_capabilities_that_name_themselves_end(tmp_path: Path) -> None:
    pci_bridge(tmp_path, "0000:00:01.0", None)
    path = tmp_path / "bus/pci/devices/0000:00:01.0/config"
    config = bytearray(path.read_bytes())
    struct.pack_into("<I", config, 0x148, 0x0002 | 0x100 << 20)
    path.write_bytes(config)
    assert read_acs_bridges(tmp_path) is None


@pytest.mark.parametrize(
    ("value", "user", "forbidden"), [("1", 1000, True), ("0", 1000, False), ("1", 0, False)]
)
def test_who_may_profile(tmp_path: Path, value: str, user: int, forbidden: bool) -> None:
    assert profiling_error(tmp_path, user) is None
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    (tmp_path / "driver/nvidia/params").write_text(f"RmProfilingAdminOnly: {value}\nX: 1\n")
    assert (profiling_error(tmp_path, user) is not None) == forbidden
