"""Says whether this machine can run Light-MoE, and what to do where it cannot.

`machine.py` reads the machine; here what it read becomes findings, without touching anything, so
that every verdict can be tested on any machine. Only what stops every launch fails. What stops
the GPUs alone warns: the ranks run on the CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightmoe.errors import MachineError
from lightmoe.machine import RAY_TOKEN, Driver, Gpu, Machine, probe

if TYPE_CHECKING:
    from lightmoe.kernels.library import Manifest

Status = Literal["ok", "warn", "fail"]

# mixtral-lite on the CPU: Ray, the front and the first libraries; then each rank.
BASE_RAM_BYTES = 1 << 30
RAM_PER_RANK_BYTES = 320 << 20
SHM_BYTES = 256 << 20
TEMPORARY_BYTES = 1 << 30
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 10)
MIN_RAY = (2, 56)
MIN_CUDA12_DRIVER = 525
MIN_CUDA13_DRIVER = 580
TURING = (7, 5)
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: how it is, and what to do if it is not right."""

    subject: str
    status: Status
    what: str
    remedy: str = ""


def diagnose(port: int = 8000, num_ranks: int = 10) -> list[Finding]:
    """Look at this machine: can `num_ranks` ranks start here and serve on `port`?"""
    machine = probe(port)
    return [*judge(machine, num_ranks), look_at_kernels(machine), look_at_route(machine)]


def exit_code(findings: list[Finding]) -> int:
    """1 if anything failed, else 0: warnings do not stop a launch."""
    return int(any(finding.status == "fail" for finding in findings))


def render(findings: list[Finding], console: Console | None = None) -> None:
    """Print the findings as a table, and the verdict under it."""
    console = console or Console()
    table = Table("", "checked", "found", "remedy", title="lightmoe doctor")
    for finding in findings:
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(status, escape(finding.subject), escape(finding.what), escape(finding.remedy))
    console.print(table)
    console.print(_verdict(findings))


def _verdict(findings: list[Finding]) -> str:
    num_failed = sum(finding.status == "fail" for finding in findings)
    num_warned = sum(finding.status == "warn" for finding in findings)
    if num_failed:
        return f"[red]Not ready[/]: {num_failed} to mend, see the remedies above."
    if num_warned:
        return f"[yellow]Ready[/], with {num_warned} to look at."
    return "[green]Ready[/]."


def judge(machine: Machine, num_ranks: int) -> list[Finding]:
    """Judge the machine for `num_ranks` ranks of mixtral-lite."""
    return [
        _judge_version("Python", ".".join(map(str, machine.python)), MIN_PYTHON),
        _ok("CPU", f"{machine.num_cores} cores"),
        _judge_ram(machine.ram_bytes, num_ranks),
        _judge_shm(machine.shm_bytes),
        _judge_temporary(machine.temporary_bytes),
        _judge_driver(machine),
        *(_judge_gpu(index, gpu) for index, gpu in enumerate(machine.driver.gpus)),
        *_judge_links(machine),
        _judge_torch(machine),
        _judge_cupy(machine),
        _judge_version("ray", machine.ray, MIN_RAY),
        _judge_ray_cluster(machine.ray_cluster),
        _judge_ray_token(machine.ray_token_mode),
        _judge_port(machine),
        _judge_loopback(machine.loopback_error),
    ]


def look_at_kernels(machine: Machine, directory: Path | None = None) -> Finding:
    """Whether the compiled kernels in `directory` (default: the installed ones) fit the cards."""
    if machine.torch.version is None or machine.torch.error:
        return _ok("kernels", "not looked at, for want of torch")
    from lightmoe.kernels import library  # loads torch

    try:
        manifest = library.read_manifest(directory or library.FOLDER)
    except MachineError as error:
        return _warn("kernels", str(error), library.REMEDY)
    return _judge_kernels(machine.driver, manifest)


def look_at_route(machine: Machine) -> Finding:
    """Whether CPU ranks have the compiled route; numpy's takes some 20 times as long."""
    if machine.torch.version is None or machine.torch.error:
        return _ok("route", "not looked at, for want of torch")
    from lightmoe.kernels import host_route  # the room loads torch

    path = host_route.library_path()
    if path is None:
        return _warn("route", "not compiled: CPU ranks compute it in numpy", host_route.REMEDY)
    return _ok("route", f"compiled for CPU ranks: {path}")


def _judge_kernels(driver: Driver, manifest: Manifest | None) -> Finding:
    from lightmoe.kernels.library import REMEDY, architecture_for

    usable = {gpu.compute_capability for gpu in driver.gpus if gpu.compute_capability >= TURING}
    if manifest is None:
        what = "liblight_ops is not built"
        return _warn("kernels", what, REMEDY) if usable else _ok("kernels", f"{what} (for GPUs)")
    what = f"liblight_ops for sm_{', sm_'.join(manifest.kernels)} in {manifest.directory}"
    capabilities = sorted(10 * major + minor for major, minor in usable)
    lacking = [str(c) for c in capabilities if architecture_for(c, manifest.kernels) is None]
    if lacking:
        return _warn("kernels", what, f"{REMEDY} ARCHS={','.join(lacking)}")
    return _ok("kernels", f"{what}; driver {driver.version or 'none'}")


def _judge_version(subject: str, version: str | None, minimum: tuple[int, int]) -> Finding:
    if version is None:
        return _fail(subject, "not installed", "make install")
    if _numbers(version) < minimum:
        wanted = ".".join(map(str, minimum))
        return _fail(subject, f"{version} is too old", f"install {wanted} or later: make install")
    return _ok(subject, version)


def _judge_ram(free: int | None, num_ranks: int) -> Finding:
    needed = BASE_RAM_BYTES + num_ranks * RAM_PER_RANK_BYTES
    need = f"{num_ranks} CPU ranks of mixtral-lite need about {_size(needed)}"
    if free is None:
        return _warn("RAM", f"cannot be read on this system; {need}", "look how much is free")
    what = f"{_size(free)} free; {need}"
    if free >= needed:
        return _ok("RAM", what)
    num_fitting = (free - BASE_RAM_BYTES) // RAM_PER_RANK_BYTES
    if num_fitting < 1:
        return _fail("RAM", what, "free some memory")
    return _warn("RAM", what, f"free some, or start fewer ranks: --gpus {num_fitting}")


def _judge_shm(free: int | None) -> Finding:
    if free is None:
        return _warn("/dev/shm", "none; Ray keeps its objects on disk", "mount a tmpfs there")
    if free < SHM_BYTES:
        remedy = f"Ray wants {_size(SHM_BYTES)}; a container takes --shm-size=1g"
        return _warn("/dev/shm", f"{_size(free)} free", remedy)
    return _ok("/dev/shm", f"{_size(free)} free")


def _judge_temporary(free: int) -> Finding:
    if free < TEMPORARY_BYTES:
        remedy = f"Ray keeps its logs there: make {_size(TEMPORARY_BYTES)} free"
        return _warn("temporary files", f"{_size(free)} free", remedy)
    return _ok("temporary files", f"{_size(free)} free")


def _judge_driver(machine: Machine) -> Finding:
    subject, driver = "NVIDIA driver", machine.driver
    if driver.error:
        remedy = "nvidia-smi should say the same; after a driver update restart the machine"
        return _warn(subject, f"does not answer: {driver.error}", remedy)
    if driver.version is None:
        return _ok(subject, "none: ranks run on the CPU")
    if driver.major < MIN_CUDA12_DRIVER:
        remedy = f"install {MIN_CUDA12_DRIVER} or later for the GPUs"
        return _warn(subject, f"{driver.version} is too old for CUDA 12", remedy)
    return _ok(subject, f"{driver.version}, for CUDA {_cuda_major(machine)}")


def _judge_gpu(index: int, gpu: Gpu) -> Finding:
    major, minor = gpu.compute_capability
    what = f"{gpu.name}, sm_{major}{minor}, {_size(gpu.memory_bytes)}"
    if gpu.compute_capability < TURING:
        return _warn(f"GPU {index}", what, "older than Turing (sm_75): take --device cpu")
    return _ok(f"GPU {index}", what)


def _judge_links(machine: Machine) -> list[Finding]:
    """What lies between the cards, and who may look at their counters; nothing without cards."""
    gpus = machine.driver.gpus
    if not gpus:
        return []
    findings = [_judge_lanes(gpus), _judge_profiling(machine.profiling_error)]
    if len(gpus) > 1:
        findings += [_judge_p2p(machine.driver), _judge_acs(machine)]
    return findings


def _judge_lanes(gpus: tuple[Gpu, ...]) -> Finding:
    subject = "PCIe links"
    narrow = [
        f"GPU {index} uses x{gpu.lanes} of x{gpu.max_lanes}"
        for index, gpu in enumerate(gpus)
        if 0 < gpu.lanes < gpu.max_lanes
    ]
    if narrow:
        remedy = "another slot or riser, or the slot's lanes in the BIOS; it halves the exchange"
        return _warn(subject, ", ".join(narrow), remedy)
    known = sorted({f"x{gpu.lanes}" for gpu in gpus if gpu.lanes})
    return _ok(subject, ", ".join(known) or "the driver does not tell their width")


def _judge_p2p(driver: Driver) -> Finding:
    num_pairs = len(driver.gpus) * (len(driver.gpus) - 1) // 2
    working = len(driver.p2p_pairs)
    if not working:
        return _ok("peer-to-peer", "none, says the driver: rows go through host memory")
    what = f"{working} of {num_pairs} pairs of GPUs, says the driver"
    return _ok("peer-to-peer", what, "whether it works, too: lightmoe topology probe -o FILE")


def _judge_acs(machine: Machine) -> Finding:
    bridges = machine.acs_bridges
    if bridges is None:
        return _ok("ACS", "not shown; to root it may be")
    if not bridges:
        return _ok("ACS", "no bridge redirects peer-to-peer copies")
    what = f"{len(bridges)} bridges send peer-to-peer copies up to the root: {bridges[0]}, ..."
    if len(bridges) == 1:
        what = f"bridge {bridges[0]} sends peer-to-peer copies up to the root"
    if not machine.driver.p2p_pairs:
        return _ok("ACS", f"{what}; there are none")
    return _warn("ACS", what, "switch ACS off in the BIOS (or with setpci), unless for a VM")


def _judge_profiling(error: str | None) -> Finding:
    if error is None:
        return _ok("profiling", "the counters may be read")
    remedy = "for ncu: options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d"
    return _warn("profiling", error, remedy)


def _judge_torch(machine: Machine) -> Finding:
    torch = machine.torch
    if torch.error:
        return _fail("torch", torch.error, "make install")
    version = _judge_version("torch", torch.version, MIN_TORCH)
    if version.status == "fail":
        return version
    what = f"{torch.version} ({f'CUDA {torch.cuda}' if torch.cuda else 'CPU only'})"
    if not machine.driver.gpus or machine.driver.major < MIN_CUDA12_DRIVER:
        return _ok("torch", what)
    install = f"make install GPU=cuda{_cuda_major(machine)}"
    if torch.cuda is None:
        return _warn("torch", what, f"{install} for the GPUs")
    if _numbers(torch.cuda)[0] > _cuda_major(machine):
        remedy = f"driver {machine.driver.version} ends at CUDA 12 (torch 2.10.0): {install}"
        return _warn("torch", what, remedy)
    return _ok("torch", what)


def _judge_cupy(machine: Machine) -> Finding:
    what = ", ".join(machine.cupy) or "not installed"
    if not machine.driver.gpus or machine.torch.cuda is None:
        return _ok("cupy", f"{what} (for GPUs only)")
    wanted = f"cupy-cuda{_numbers(machine.torch.cuda)[0]}x"
    remedy = f"pip install {wanted}, as torch's CUDA is {machine.torch.cuda}"
    if len(machine.cupy) > 1:
        return _warn("cupy", what, f"builds overwrite each other: pip uninstall all, then {remedy}")
    if what.startswith(f"{wanted} "):
        return _ok("cupy", what)
    return _warn("cupy", what, remedy)


def _judge_ray_cluster(address: str | None) -> Finding:
    if address is None:
        return _ok("Ray cluster", "none; a launch starts its own")
    return _ok(
        "Ray cluster",
        f"{address} is running or named here; a launch starts its own all the same",
        f"to join it: --address {address}",
    )


def _judge_ray_token(mode: int | None) -> Finding:
    if mode is None:
        return _ok("Ray token", "none yet; the first start writes it")
    what = f"{RAY_TOKEN} has mode {mode:04o}"
    if mode & 0o077:
        return _warn("Ray token", what, f"others can read it: chmod 600 {RAY_TOKEN}")
    return _ok("Ray token", what)


def _judge_port(machine: Machine) -> Finding:
    subject = f"port {machine.port}"
    if machine.port_error:
        return _fail(subject, machine.port_error, "stop that process, or take another --port")
    return _ok(subject, "free")


def _judge_loopback(error: str | None) -> Finding:
    if error:
        remedy = "the ranks exchange rows over it: ip link set lo up"
        return _fail("loopback", f"127.0.0.1 does not answer: {error}", remedy)
    return _ok("loopback", "127.0.0.1 answers")


def _cuda_major(machine: Machine) -> int:
    return 13 if machine.driver.major >= MIN_CUDA13_DRIVER else 12


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _size(num_bytes: int) -> str:
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / (1 << 30):.1f} GiB"


def _ok(subject: str, what: str, remedy: str = "") -> Finding:
    return Finding(subject=subject, status="ok", what=what, remedy=remedy)


def _warn(subject: str, what: str, remedy: str) -> Finding:
    return Finding(subject=subject, status="warn", what=what, remedy=remedy)


def _fail(subject: str, what: str, remedy: str) -> Finding:
    return Finding(subject=subject, status="fail", what=what, remedy=remedy)
