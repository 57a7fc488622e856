"""Reads the machine: memory, driver, installed packages, Ray's files, the port. Judges nothing."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pynvml

RAY_TOKEN = Path.home() / ".ray" / "auth_token"
RAY_CURRENT_CLUSTER = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
Told = TypeVar("Told", int, str)
_LISTENING = "0A"  # the state column of /proc/net/tcp
# PCI Express Base Specification: extended capabilities from 0x100; that of Access Control Services
_PCI_BRIDGE_CLASS = "0x0604"
_EXTENDED_CONFIG = 0x100
_ACS_CAPABILITY = 0x000D
_ACS_REDIRECT = 0x000C  # peer-to-peer requests and completions go up to the root


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card as the driver names it; compute capability (7, 5) is sm_75.

    `lanes` of its PCIe link are in use, `max_lanes` both ends have; 0 where nobody tells. `bus_id`
    is written as the driver does, and empty likewise.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    lanes: int = 0
    max_lanes: int = 0
    bus_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The NVIDIA driver and its cards; `error` says why a driver that is there does not answer.

    `p2p_pairs` are the pairs of cards that can read each other's memory, as the driver says.
    """

    version: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None
    p2p_pairs: tuple[tuple[int, int], ...] = ()

    @property
    def major(self) -> int:
        """535 of 535.183.01; 0 without a driver."""
        return int(self.version.split(".")[0]) if self.version else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """The installed torch; `cuda` is the CUDA version that it was built for."""

    version: str | None = None
    cuda: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `probe` read. Sizes are free bytes; None where the system does not tell.

    `acs_bridges` are the PCI bridges that send peer-to-peer copies up to the root.
    """

    python: tuple[int, int]
    num_cores: int
    ram_bytes: int | None
    shm_bytes: int | None
    temporary_bytes: int
    driver: Driver
    torch: Torch
    cupy: tuple[str, ...]
    ray: str | None
    ray_cluster: str | None
    ray_token_mode: int | None
    port: int
    port_error: str | None
    loopback_error: str | None
    acs_bridges: tuple[str, ...] | None = None
    profiling_error: str | None = None


def probe(port: int) -> Machine:
    """Read this machine; imports torch, so it takes about two seconds."""
    shm = Path("/dev/shm")
    return Machine(
        python=sys.version_info[:2],
        num_cores=len(os.sched_getaffinity(0)),
        ram_bytes=free_ram_bytes(),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        temporary_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        driver=read_driver(),
        torch=read_torch(),
        cupy=read_cupy(),
        ray=installed_version("ray"),
        ray_cluster=read_ray_cluster(),
        ray_token_mode=file_mode(RAY_TOKEN),
        port=port,
        port_error=port_error(port),
        loopback_error=loopback_error(),
        acs_bridges=read_acs_bridges(),
        profiling_error=profiling_error(),
    )


def free_ram_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be had: of the machine, or of the container if that is less."""
    meminfo, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        used = int((group / "memory.current").read_text()) - _reclaimable_bytes(group)
        free = min(free, int(limit.read_text()) - used)
    return free


def _reclaimable_bytes(group: Path) -> int:
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(dict(lines)["inactive_file"])


def read_driver() -> Driver:
    """Ask the driver for its version and its cards."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return Driver()
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    try:
        gpus = tuple(_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
        return Driver(
            version=pynvml.nvmlSystemGetDriverVersion(),
            gpus=gpus,
            p2p_pairs=_read_p2p_pairs(len(gpus)),
        )
    except pynvml.NVMLError as error:
        return Driver(error=str(error))
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory_bytes=memory.total,
        free_bytes=memory.free,
        lanes=_told(lambda: int(pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)), 0),
        max_lanes=_told(lambda: int(pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)), 0),
        bus_id=_told(lambda: str(pynvml.nvmlDeviceGetPciInfo(handle).busId), ""),
    )


_P2P_READ = 0
"""NVML's number of the question whether cards may read each other; pynvml's own is a tuple."""


def _read_p2p_pairs(num_gpus: int) -> tuple[tuple[int, int], ...]:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(num_gpus)]

    def status(first: int, second: int) -> int:
        return int(pynvml.nvmlDeviceGetP2PStatus(handles[first], handles[second], _P2P_READ))

    pairs = itertools.combinations(range(num_gpus), 2)
    unknown = pynvml.NVML_P2P_STATUS_UNKNOWN
    return tuple(
        pair
        for pair in pairs
        if _told(lambda pair=pair: status(*pair), unknown) == pynvml.NVML_P2P_STATUS_OK  # type: ignore[misc]
    )


def _told(call: Callable[[], Told], otherwise: Told) -> Told:
    """What the driver says, or `otherwise` where it does not tell, as in some containers."""
    try:
        return call()
    except pynvml.NVMLError:
        return otherwise


def read_acs_bridges(sysfs: Path = Path("/sys")) -> tuple[str, ...] | None:
    """PCI bridges whose Access Control Services redirect peer-to-peer copies; None where the system
    does not show it, as to anybody but root."""
    shown = [
        (device.name, control)
        for device in sorted(sysfs.glob("bus/pci/devices/*"))
        if (control := _acs_control(device)) is not None
    ]
    if not shown:
        return None
    return tuple(name for name, control in shown if control & _ACS_REDIRECT)


def _acs_control(device: Path) -> int | None:
    """The control register of a bridge's Access Control Services; None without them, or unread."""
    kind, config = device / "class", device / "config"
    if not kind.is_file() or not kind.read_text().startswith(_PCI_BRIDGE_CLASS):
        return None
    data = config.read_bytes() if os.access(config, os.R_OK) else b""
    offset, visited = _EXTENDED_CONFIG, set[int]()
    while _EXTENDED_CONFIG <= offset <= len(data) - 8 and offset not in visited:
        visited.add(offset)
        header, _, control = struct.unpack_from("<IHH", data, offset)
        if header & 0xFFFF == _ACS_CAPABILITY:
            return int(control)
        offset = header >> 20
    return None


def profiling_error(proc: Path = Path("/proc"), user: int | None = None) -> str | None:
    """Why this user cannot read the cards' counters, as ncu does; None if nothing forbids it."""
    params = proc / "driver/nvidia/params"
    if not params.is_file() or (os.geteuid() if user is None else user) == 0:
        return None
    restricted = "RmProfilingAdminOnly: 1" in params.read_text()
    return "the driver lets root only read the counters" if restricted else None


def installed_version(distribution: str) -> str | None:
    """Version of an installed package without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_torch() -> Torch:
    """Version and build of torch, and why it cannot be imported if it cannot."""
    version = installed_version("torch")
    if version is None:
        return Torch()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Torch(version=version, error=f"{version} cannot be imported: {error}")
    return Torch(version=version, cuda=torch.version.cuda)


def read_cupy() -> tuple[str, ...]:
    """Every installed build of cupy, such as "cupy-cuda12x 14.2.0"; there should be one at most."""
    names = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
    found = ((name, installed_version(name)) for name in names)
    return tuple(f"{name} {version}" for name, version in found if version)


def read_ray_cluster() -> str | None:
    """Address of a Ray cluster that plain Ray programs would join here."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    return RAY_CURRENT_CLUSTER.read_text().strip() if RAY_CURRENT_CLUSTER.is_file() else None


def file_mode(path: Path) -> int | None:
    """Permission bits of a file; None if there is none."""
    return stat.S_IMODE(path.stat().st_mode) if path.is_file() else None


def port_error(port: int) -> str | None:
    """Why nobody can listen on this port of 127.0.0.1, with the holder's name where it shows."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            holder = port_holder(port)
            return f"held by {holder}" if holder else str(error.strerror)
    return None


def port_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """Name and process id of who listens on a port; None where /proc does not show it."""
    sockets = _listening_sockets(port, proc)
    for process in proc.glob("[0-9]*"):
        try:
            if any(os.readlink(entry) in sockets for entry in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # another user's process, or one that has just ended
            continue
    return None


def _listening_sockets(port: int, proc: Path) -> set[str]:
    sockets = set()
    for table in (proc / "net/tcp", proc / "net/tcp6"):
        rows = table.read_text().splitlines()[1:] if table.is_file() else []
        for row in rows:
            columns = row.split()
            local, state, inode = columns[1], columns[3], columns[9]
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{inode}]")
    return sockets


def loopback_error() -> str | None:
    """Why 127.0.0.1 cannot be reached from 127.0.0.1: gloo and the step channel use it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5).close()
    except OSError as error:
        return str(error)
    return None
