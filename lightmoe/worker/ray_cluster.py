"""Ray as this process has it: started here, joined, or found running. One for all groups in it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from lightmoe.config import MAX_RANKS
from lightmoe.errors import MachineError
from lightmoe.worker.channel import LOOPBACK

_RANK = "lightmoe_rank"
"""A resource of the Ray that is started here: what a rank takes, however few cores there are."""

_PLACE_TIMEOUT_SECONDS = 30.0
_GIVE_BACK_SECONDS = 2.0
_START_SECONDS = 10.0
"""How long a start may go on after a signal came."""
_END_SECONDS = 0.5
"""How long Ray may take to end in order: its servers need a tenth of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """`address` is a running cluster, None starts one here that ends with its last user."""

    address: str | None = None
    gpus_per_rank: int = 0


@dataclass(slots=True)
class _Shared:
    """Ray has one connection a process, so this is the process's. `reaper` is set if it is
    ours, and then `over` lets go the thread that holds it."""

    num_users: int = 0
    address: str | None = None
    reaper: subprocess.Popen[bytes] | None = None
    over: threading.Event = field(default_factory=threading.Event)


_shared = _Shared()
_lock = threading.Lock()


def acquire(num_ranks: int, config: RayConfig, num_threads: int) -> dict[str, float]:
    """Have Ray running, and say what one rank asks of it. Every call needs a `release`."""
    with _lock:
        if not ray.is_initialized():
            try:
                _connect(num_ranks, config, num_threads)
            finally:
                # Interrupted or not: a Ray that is up needs its reaper.
                if config.address is None and ray.is_initialized():
                    _shared.reaper = _start_reaper()
            _shared.address = config.address
        elif config.address not in (None, _shared.address):
            raise MachineError(
                f"this process uses another Ray than {config.address} already; close that first"
            )
        _shared.num_users += 1
        return _bundle(config)


def release(group: PlacementGroup | None) -> None:
    """Shut Ray down after the last user, if it was started here; else give the group back."""
    with _lock:
        _shared.num_users -= 1
        if not _shared.num_users and _shared.reaper is not None:
            _end(_shared.reaper)
            _shared.over.set()
            _shared.reaper = None
            return
    if group is not None and ray.is_initialized():  # the user's own script may have shut it down
        _give_back(group)


def _end(reaper: subprocess.Popen[bytes]) -> None:
    """Shut Ray down, and kill what does not end: a process that waits for one that is gone.

    In order that is only the autoscaler's monitor. After a signal to our whole process group, or to
    all processes of a service, it is any of them: they have died of it in no order.
    """
    killed: list[str] = []
    late = threading.Timer(_END_SECONDS, lambda: killed.extend(_kill_processes_of_ray()))
    late.start()
    ray.shutdown()
    late.cancel()
    late.join()
    if "raylet" not in killed:
        reaper.kill()
    reaper.communicate()  # if it lives, that is its sign to end the raylet's agents


def _give_back(group: PlacementGroup) -> None:
    """Remove a placement group. If its Ray has died before us, that would wait for ever."""

    def remove() -> None:
        with contextlib.suppress(RayError):  # what is gone holds nothing
            remove_placement_group(group)

    thread = threading.Thread(target=remove, name="lightmoe-give-back", daemon=True)
    thread.start()
    thread.join(_GIVE_BACK_SECONDS)


def place(num_ranks: int, bundle: dict[str, float]) -> PlacementGroup:
    """Room for all ranks, on as few nodes as there can be; MachineError says what is free."""
    group: PlacementGroup = placement_group([bundle] * num_ranks, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=_PLACE_TIMEOUT_SECONDS)
    except GetTimeoutError as error:
        raise MachineError(
            f"Ray has no room for {num_ranks} ranks of {bundle};"
            f" the cluster has {ray.available_resources()} free"
        ) from error
    return group


@dataclass(frozen=True, slots=True)
class Hosts:
    """The addresses at which the driver and each rank are reached by the others."""

    driver: str
    ranks: tuple[str, ...]


def hosts_of(group: PlacementGroup) -> Hosts:
    """Those of the nodes where the ranks were placed; loopback where all are this one."""
    node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    driver = ray.util.get_node_ip_address()
    ranks = tuple(address_of[node_of_bundle[rank]] for rank in range(len(node_of_bundle)))
    if {driver} == set(ranks):
        return Hosts(LOOPBACK, (LOOPBACK,) * len(ranks))
    return Hosts(driver, ranks)


def _bundle(config: RayConfig) -> dict[str, float]:
    """What one rank needs."""
    gpus = {"GPU": float(config.gpus_per_rank)} if config.gpus_per_rank else {}
    room = {_RANK: 1.0} if _shared.reaper is not None else {"CPU": 1.0}
    return {**room, **gpus}


def _connect(num_ranks: int, config: RayConfig, num_threads: int) -> None:
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        with _ray_environment(num_threads):
            if config.address is not None:
                _check_address(config.address)
                ray.init(address=config.address, **common)
                return
            _start_local(num_ranks, common)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        if config.address is None:
            message = f"Ray did not start on this machine: {error}; see `lightmoe doctor`"
        else:
            message = (
                f"no Ray cluster answers at {config.address}: {error}; if it asks for a token,"
                " have it in ~/.ray/auth_token and set RAY_AUTH_MODE=token"
            )
        raise MachineError(message) from error


def _check_address(address: str) -> None:
    """ConnectionError at once, where Ray would try for minutes, deaf to signals."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():  # else it is Ray's own word, such as "auto"
        with socket.create_connection((host, int(port)), timeout=3):
            return


def _start_local(num_ranks: int, common: dict[str, Any]) -> None:
    """Start Ray here, to the end even if a signal comes meanwhile: half a Ray leaves processes.

    If the signal has ended some of those, the others wait for them: then the end does not come.
    It has a thread of its own, which stays: the kernel ends Ray's processes with the thread that
    started them, and on the main thread Ray would take SIGTERM from the caller.
    """
    started: Future[None] = Future()
    over = _shared.over = threading.Event()

    def run() -> None:
        try:
            # "local": never join a cluster that happens to run here. num_cpus is how many workers
            # Ray starts ahead of need; how many ranks may run is not its business.
            ray.init(
                address="local",
                num_cpus=num_ranks,
                resources={_RANK: MAX_RANKS},
                include_dashboard=False,
                object_store_memory=80 << 20,
                **common,
            )
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(None)
        over.wait()

    threading.Thread(target=run, name="lightmoe-ray", daemon=True).start()
    try:
        started.result()
    finally:
        try:
            wait([started], _START_SECONDS)  # where a signal has cut the line above short
        finally:
            if not started.done():
                _kill_processes_of_ray()


@contextlib.contextmanager
def _ray_environment(num_threads: int) -> Iterator[None]:
    """Settings that Ray's processes inherit, and that the user's own process gets back after.

    umask: Ray writes its authentication token with the default mode, readable by everyone.
    Task events are for Ray's dashboard; a shutdown would wait 5 s to send the last ones to a
    control store that is gone.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": str(num_threads),
    }
    before = {name: os.environ.get(name) for name in settings}
    mask = os.umask(0o077)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.umask(mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_reaper() -> subprocess.Popen[bytes]:
    """A shell that ends Ray's agents should this process be killed.

    Ray's own processes die with the driver, but its two agents wait a minute for a control store
    that is gone. The shell waits for the end of its input, which comes with the end of the driver.
    """
    children = _children_of(os.getpid())
    agents = [
        pid for raylet, name in children if name == "raylet" for pid, _ in _children_of(raylet)
    ]
    reaper = subprocess.Popen(
        ["/bin/sh", "-c", "read -r pids; read -r end; kill -9 $pids 2>/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert reaper.stdin is not None
    reaper.stdin.write((" ".join(map(str, agents)) + "\n").encode())
    reaper.stdin.flush()
    return reaper


def _kill_processes_of_ray() -> list[str]:
    """The names of those that were killed."""
    killed = []
    for pid, name in _processes_of_ray():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)
            killed.append(name)
    return killed


def _processes_of_ray() -> list[tuple[int, str]]:
    """(process id, name) of those that live: children that run a file of Ray's, and a raylet's."""
    folder = f"{Path(ray.__file__).parent}{os.sep}".encode()
    found = []
    for pid, name in _children_of(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if folder in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append((pid, name))
    return [*found, *(one for pid, name in found if name == "raylet" for one in _children_of(pid))]


def _children_of(parent: int) -> list[tuple[int, str]]:
    """(process id, name) of the children that /proc shows."""
    children = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
        except OSError:  # it has ended meanwhile
            continue
        if lines["PPid"] == str(parent):
            children.append((int(status.parent.name), lines["Name"]))
    return children
