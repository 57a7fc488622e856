"""Doctor: every verdict, on machines made up here; and one look at this one."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightmoe.doctor import (
    Finding,
    diagnose,
    exit_code,
    judge,
    look_at_kernels,
    look_at_route,
    render,
)
from lightmoe.kernels import host_route
from lightmoe.kernels.library import ABI
from lightmoe.machine import Driver, Gpu, Machine, Torch

GIB = 1 << 30
TURING = Gpu(
    name="RTX 2080 Ti", compute_capability=(7, 5), memory_bytes=11 * GIB, free_bytes=11 * GIB
)
LAPTOP = Machine(
    python=(3, 11),
    num_cores=4,
    ram_bytes=16 * GIB,
    shm_bytes=8 * GIB,
    temporary_bytes=50 * GIB,
    driver=Driver(),
    torch=Torch(version="2.13.0+cpu"),
    cupy=(),
    ray="2.60.0",
    ray_cluster=None,
    ray_token_mode=None,
    port=8000,
    port_error=None,
    loopback_error=None,
)
BOX = replace(
    LAPTOP,
    driver=Driver(version="535.183.01", gpus=(TURING, TURING)),
    torch=Torch(version="2.10.0", cuda="12.8"),
    cupy=("cupy-cuda12x 14.2.0",),
)


def finding(subject: str, machine: Machine, num_ranks: int = 10) -> Finding:
    found = {finding.subject: finding for finding in judge(machine, num_ranks)}
    return found[subject]


@pytest.mark.parametrize("machine", [LAPTOP, BOX], ids=["laptop", "box"])
def test_a_good_machine_is_all_ok(machine: Machine) -> None:
    findings = judge(machine, 10)
    assert {finding.status for finding in findings} == {"ok"}
    assert exit_code(findings) == 0


@pytest.mark.parametrize(
    ("subject", "change", "remedy"),
    [
        ("Python", {"python": (3, 10)}, "install 3.11 or later"),
        ("torch", {"torch": Torch()}, "make install"),
        ("torch", {"torch": Torch(version="2.9.1")}, "install 2.10 or later"),
        ("torch", {"torch": Torch(version="2.13.0", error="no libgomp.so.1")}, "make install"),
        ("ray", {"ray": None}, "make install"),
        ("ray", {"ray": "2.55.1"}, "install 2.56 or later"),
        ("port 8000", {"port_error": "held by nginx (process 7)"}, "take another --port"),
        ("loopback", {"loopback_error": "Network is unreachable"}, "ip link set lo up"),
        ("RAM", {"ram_bytes": GIB}, "free some memory"),
    ],
)
def test_what_stops_every_launch_fails(subject: str, change: dict, remedy: str) -> None:
    machine = replace(LAPTOP, **change)
    assert finding(subject, machine).status == "fail"
    assert remedy in finding(subject, machine).remedy
    assert exit_code(judge(machine, 10)) == 1


@pytest.mark.parametrize(
    ("subject", "change", "remedy"),
    [
        ("RAM", {"ram_bytes": 2 * GIB}, "--gpus 3"),
        ("RAM", {"ram_bytes": None}, "look how much is free"),
        ("/dev/shm", {"shm_bytes": 64 << 20}, "--shm-size=1g"),
        ("/dev/shm", {"shm_bytes": None}, "mount a tmpfs"),
        ("temporary files", {"temporary_bytes": 100 << 20}, "make 1.0 GiB free"),
        ("Ray token", {"ray_token_mode": 0o644}, "chmod 600"),
        ("NVIDIA driver", {"driver": Driver(error="version mismatch")}, "restart the machine"),
        ("NVIDIA driver", {"driver": Driver(version="470.1", gpus=(TURING,))}, "install 525"),
    ],
)
def test_what_can_be_lived_with_warns(subject: str, change: dict, remedy: str) -> None:
    machine = replace(LAPTOP, **change)
    assert finding(subject, machine).status == "warn"
    assert remedy in finding(subject, machine).remedy
    assert exit_code(judge(machine, 10)) == 0


@pytest.mark.parametrize(
    ("driver", "torch", "status", "remedy"),
    [
        ("535.183.01", Torch(version="2.10.0", cuda="12.8"), "ok", ""),
        ("535.183.01", Torch(version="2.15.0", cuda="13.2"), "warn", "make install GPU=cuda12"),
        ("535.183.01", Torch(version="2.13.0+cpu"), "warn", "make install GPU=cuda12"),
        ("580.65", Torch(version="2.13.0+cpu"), "warn", "make install GPU=cuda13"),
        ("580.65", Torch(version="2.15.0", cuda="13.2"), "ok", ""),
        ("580.65", Torch(version="2.10.0", cuda="12.8"), "ok", ""),
    ],
)
def test_torch_must_fit_the_driver(driver: str, torch: Torch, status: str, remedy: str) -> None:
    machine = replace(BOX, driver=Driver(version=driver, gpus=(TURING,)), torch=torch)
    assert finding("torch", machine).status == status
    assert remedy in finding("torch", machine).remedy


@pytest.mark.parametrize(
    ("cupy", "status", "remedy"),
    [
        (("cupy-cuda12x 14.2.0",), "ok", ""),
        ((), "warn", "pip install cupy-cuda12x"),
        (("cupy-cuda13x 14.2.0",), "warn", "pip install cupy-cuda12x"),
        (("cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"), "warn", "pip uninstall all"),
    ],
)
def test_cupy_must_fit_torch(cupy: tuple[str, ...], status: str, remedy: str) -> None:
    machine = replace(BOX, cupy=cupy)
    assert finding("cupy", machine).status == status
    assert remedy in finding("cupy", machine).remedy


def test_every_card_is_named_and_old_ones_are_refused() -> None:
    pascal = Gpu(
        name="GTX 1080", compute_capability=(6, 1), memory_bytes=8 * GIB, free_bytes=8 * GIB
    )
    machine = replace(BOX, driver=Driver(version="535.1", gpus=(TURING, pascal)))
    assert finding("GPU 0", machine).what == "RTX 2080 Ti, sm_75, 11.0 GiB"
    assert finding("GPU 1", machine).status == "warn"
    assert "--device cpu" in finding("GPU 1", machine).remedy


def write_manifest(folder: Path, *architectures: str, abi: int = ABI) -> None:
    content = {"abi": abi, "architectures": {name: [] for name in architectures}}
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("machine", "built", "status", "what", "remedy"),
    [
        (LAPTOP, (), "ok", "liblight_ops is not built (for GPUs)", ""),
        (BOX, (), "warn", "liblight_ops is not built", "make kernels"),
        (LAPTOP, ("75",), "ok", "liblight_ops for sm_75 in FOLDER; driver none", ""),
        (BOX, ("75", "90"), "ok", "liblight_ops for sm_75, sm_90 in FOLDER; driver 535.183.01", ""),
        (BOX, ("90",), "warn", "liblight_ops for sm_90 in FOLDER", "make kernels ARCHS=75"),
    ],
)
def test_kernels_must_fit_the_cards(
    tmp_path: Path, machine: Machine, built: tuple[str, ...], status: str, what: str, remedy: str
) -> None:
    if built:
        write_manifest(tmp_path, *built)
    found = look_at_kernels(machine, tmp_path)
    assert (found.status, found.remedy) == (status, remedy)
    assert found.what == what.replace("FOLDER", str(tmp_path))


def test_kernels_of_another_version_warn(tmp_path: Path) -> None:
    write_manifest(tmp_path, "75", abi=0)
    found = look_at_kernels(BOX, tmp_path)
    assert (found.status, found.remedy) == ("warn", "make kernels")
    assert "ABI 0" in found.what


def test_kernels_are_not_looked_at_without_torch(tmp_path: Path) -> None:
    assert look_at_kernels(replace(BOX, torch=Torch()), tmp_path).status == "ok"


def test_a_running_cluster_is_named() -> None:
    named = finding("Ray cluster", replace(LAPTOP, ray_cluster="10.0.0.1:6379"))
    assert (named.status, named.remedy) == ("ok", "to join it: --address 10.0.0.1:6379")


@pytest.mark.parametrize(
    ("machine", "verdict"),
    [
        (LAPTOP, "Ready."),
        (replace(LAPTOP, ray_token_mode=0o644), "Ready, with 1 to look at."),
        (replace(LAPTOP, port_error="[x] holds it"), "Not ready: 1 to mend"),
    ],
)
def test_render_ends_in_the_verdict(machine: Machine, verdict: str) -> None:
    output = io.StringIO()
    render(judge(machine, 10), Console(file=output, width=200))
    assert verdict in output.getvalue().splitlines()[-1]
    assert machine.port_error is None or "[x] holds it" in output.getvalue()


def test_the_route_of_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_route, "library_path", lambda: None)
    found = look_at_route(LAPTOP)
    assert found.status == "warn"
    assert "install a C++17 compiler" in found.remedy
    monkeypatch.setattr(host_route, "library_path", lambda: Path("/here/_light_route.so"))
    found = look_at_route(LAPTOP)
    assert (found.status, found.what) == ("ok", "compiled for CPU ranks: /here/_light_route.so")
    assert look_at_route(replace(LAPTOP, torch=Torch())).status == "ok"


def test_diagnose_this_machine() -> None:
    subjects = [finding.subject for finding in diagnose(port=0, num_ranks=1)]
    assert {"Python", "RAM", "torch", "ray", "port 0", "loopback", "kernels"} <= set(subjects)


NVLINK = replace(BOX, driver=replace(BOX.driver, p2p_pairs=((0, 1),)))
NARROW = replace(TURING, lanes=8, max_lanes=16)


@pytest.mark.parametrize(
    ("machine", "subject", "status", "words"),
    [
        (BOX, "PCIe links", "ok", "does not tell"),
        (BOX, "peer-to-peer", "ok", "through host memory"),
        (NVLINK, "peer-to-peer", "ok", "1 of 1 pairs"),
        (BOX, "ACS", "ok", "not shown"),
        (replace(NVLINK, acs_bridges=()), "ACS", "ok", "no bridge redirects"),
        (replace(NVLINK, acs_bridges=("00:01.0",)), "ACS", "warn", "bridge 00:01.0 sends"),
        (replace(NVLINK, acs_bridges=("00:01.0", "1")), "ACS", "warn", "2 bridges send"),
        (replace(BOX, acs_bridges=("00:01.0",)), "ACS", "ok", "there are none"),
        (BOX, "profiling", "ok", "may be read"),
        (replace(BOX, profiling_error="root only"), "profiling", "warn", "root only"),
        (
            replace(BOX, driver=replace(BOX.driver, gpus=(TURING, NARROW))),
            "PCIe links",
            "warn",
            "GPU 1 uses x8 of x16",
        ),
    ],
)
def test_what_lies_between_the_cards(
    machine: Machine, subject: str, status: str, words: str
) -> None:
    found = finding(subject, machine)
    assert (found.status, words in found.what) == (status, True)
    assert found.remedy or status == "ok"


def test_nothing_lies_between_no_cards_or_one() -> None:
    subjects = {finding.subject for finding in judge(LAPTOP, 10)}
    assert not subjects & {"PCIe links", "peer-to-peer", "ACS", "profiling"}
    one = replace(BOX, driver=replace(BOX.driver, gpus=(TURING,)))
    subjects = {finding.subject for finding in judge(one, 10)}
    assert "PCIe links" in subjects
    assert not subjects & {"peer-to-peer", "ACS"}
