"""Ranks as Ray actors, one per rank, in one placement group.

Ray places, starts, supervises and stops them. Steps do not pass through Ray: every rank runs one
long task that reads its plans from the step channel (channel.py) until the driver closes it.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.errors import LightMoEError, MachineError, RankError
from lightmoe.worker import channel
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig

Progress = Callable[[str, int, int], None]
"""Called with a stage ("start" or "load"), how many ranks are done, and how many there are."""

_PLACE_TIMEOUT_SECONDS = 30.0
_START_TIMEOUT_SECONDS = 120.0
_LOAD_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """`address` is a running cluster, None starts one here that ends with the driver."""

    address: str | None = None
    gpus_per_rank: int = 0


class RankActor:
    """What Ray runs for one rank. torch is imported here, not in the driver."""

    def __init__(self, rank: int, config: WorkerConfig) -> None:
        from lightmoe.worker.worker import Worker

        self._worker = Worker(rank, config)
        self._rank = rank
        self._rendezvous: object | None = None

    def open_rendezvous(self, timeout_seconds: float) -> int:
        """The port of the store where ranks meet; rank 0 keeps it."""
        from lightmoe.distributed.communicator import Rendezvous

        rendezvous = Rendezvous(timeout_seconds)
        self._rendezvous = rendezvous
        return rendezvous.port

    def load(self, rendezvous_port: int) -> RankInfo:
        """Join the group and load the weights."""
        self._worker.join(rendezvous_port)
        return self._worker.load()

    def run_steps(self, port: int, token: bytes) -> None:
        """Serve steps until the driver closes the channel, or is gone."""
        from lightmoe.worker.worker import run_steps

        with channel.connect(port, self._rank, token) as connection:

            def receive() -> Batch | None:
                frame = channel.receive_frame(connection)
                return None if frame is None else channel.unpack_batch(frame)

            run_steps(
                self._worker,
                receive,
                lambda result: channel.send_frame(connection, channel.pack_result(result)),
            )


class RayWorkerGroup:
    """A WorkerGroup of Ray actors."""

    block_size = BLOCK_SIZE

    def __init__(self, config: WorkerConfig, ray_config: RayConfig, progress: Progress) -> None:
        self.placement = config.placement
        self._num_ranks = config.placement.num_ranks
        self._step_timeout_seconds = config.timeout_seconds + 15
        self._connections: list[socket.socket] = []
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._reaper: subprocess.Popen[bytes] | None = None
        self._owns_ray = not ray.is_initialized()
        try:
            self._start(config, ray_config, progress)
        except (Exception, KeyboardInterrupt):
            self.close()
            raise

    def _start(self, config: WorkerConfig, ray_config: RayConfig, progress: Progress) -> None:
        if self._owns_ray:
            _start_ray(self._num_ranks, ray_config, config.num_threads)
            self._reaper = _start_reaper()
        bundle = _bundle(ray_config)
        group = _place(self._num_ranks, bundle)
        token = secrets.token_bytes(32)
        listener = channel.StepListener(token)
        actor_class = ray.remote(RankActor)
        self._actors = [
            actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            ).remote(rank, config)
            for rank in range(self._num_ranks)
        ]
        ready = [actor.__ray_ready__.remote() for actor in self._actors]
        _gather(ready, "start", _START_TIMEOUT_SECONDS, progress)
        port = ray.get(self._actors[0].open_rendezvous.remote(config.timeout_seconds))
        loads = [actor.load.remote(port) for actor in self._actors]
        self.ranks: Sequence[RankInfo] = _gather(loads, "load", _LOAD_TIMEOUT_SECONDS, progress)
        self._runs = [actor.run_steps.remote(listener.port, token) for actor in self._actors]
        self._connections = listener.accept(self._num_ranks, timeout_seconds=30)
        for connection in self._connections:
            connection.settimeout(self._step_timeout_seconds)
        listener.close()

    def step(self, batches: Sequence[Batch]) -> list[StepResult]:
        """Run one step on every rank at once; RankError names the rank that died or is late."""
        results: list[StepResult] = []
        try:
            for connection, batch in zip(self._connections, batches, strict=True):
                channel.send_frame(connection, channel.pack_batch(batch))
            for connection in self._connections:
                frame = channel.receive_frame(connection)
                if frame is None:
                    raise ConnectionError("closed")
                results.append(channel.unpack_result(frame))
        except (ConnectionError, TimeoutError) as error:
            raise self._diagnose() from error
        return results

    def check(self) -> None:
        """RankError if a rank has gone while nothing was asked of it."""
        # Between steps a rank has nothing to say: what can be read is the end of its connection.
        readable, _, _ = select.select(self._connections, [], [], 0)
        if readable:
            raise self._diagnose()

    def _diagnose(self) -> RankError:
        """Which rank is to blame: one that died, else one that failed, else one that is silent."""
        done, silent = ray.wait(self._runs, num_returns=len(self._runs), timeout=3.0)
        lost_peer: RankError | None = None
        for run in done:
            rank = self._runs.index(run)
            try:
                ray.get(run)
            except RayActorError:
                return RankError(f"rank {rank} died; start again with `lightmoe launch`")
            except RayTaskError as error:
                cause = error.cause
                if not isinstance(cause, RankError):
                    return RankError(f"rank {rank} failed: {type(cause).__name__}: {cause}")
                lost_peer = cause
        if silent:
            names = [self._runs.index(run) for run in silent]
            return RankError(
                f"ranks {names} did not answer within {self._step_timeout_seconds:.0f} s;"
                " are they stopped or swapping?"
            )
        return lost_peer or RankError("the ranks closed their step channels without an error")

    def close(self) -> None:
        """Stop every rank, and Ray if it was started here; may be called twice."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        if not ray.is_initialized():
            return
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._owns_ray:
            ray.shutdown()
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.communicate()
            self._reaper = None


@contextmanager
def _ray_environment(num_threads: int) -> Iterator[None]:
    """Settings that Ray's processes inherit, and that the user's own process gets back after.

    umask: Ray writes its authentication token with the default mode, readable by everyone.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
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


def _start_ray(num_ranks: int, config: RayConfig, num_threads: int) -> None:
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        with _ray_environment(num_threads):
            if config.address is not None:
                ray.init(address=config.address, **common)
                return
            # "local": never join a cluster that happens to run here. A rank is one logical CPU,
            # however few the machine has.
            ray.init(
                address="local",
                num_cpus=num_ranks,
                include_dashboard=False,
                object_store_memory=80 << 20,
                **common,
            )
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        if config.address is None:
            message = f"Ray did not start on this machine: {error}; see `lightmoe doctor`"
        else:
            message = (
                f"no Ray cluster answers at {config.address}: {error}; if it asks for a token, have it"
                " in ~/.ray/auth_token and set RAY_AUTH_MODE=token"
            )
        raise MachineError(message) from error


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


def _bundle(config: RayConfig) -> dict[str, float]:
    """What one rank needs. The last entry ties it to the driver's node: our sockets are loopback."""
    gpus = {"GPU": float(config.gpus_per_rank)} if config.gpus_per_rank else {}
    return {"CPU": 1.0, **gpus, f"node:{ray.util.get_node_ip_address()}": 0.0001}


def _place(num_ranks: int, bundle: dict[str, float]) -> PlacementGroup:
    group: PlacementGroup = placement_group([bundle] * num_ranks, strategy="STRICT_PACK")
    try:
        ray.get(group.ready(), timeout=_PLACE_TIMEOUT_SECONDS)
    except GetTimeoutError as error:
        raise MachineError(
            f"Ray has no room for {num_ranks} ranks of {bundle} on this node;"
            f" the cluster has {ray.available_resources()} free"
        ) from error
    return group


def _gather(
    references: list[Any], stage: str, timeout_seconds: float, progress: Progress
) -> list[Any]:
    """Results in order, with progress as they come; a rank's own error comes out as it was."""
    deadline = time.monotonic() + timeout_seconds
    waiting = list(references)
    progress(stage, 0, len(references))
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = [references.index(reference) for reference in waiting]
            raise RankError(
                f"ranks {late} did not finish to {stage} within {timeout_seconds:.0f} s"
            )
        _raise_own_errors(done[0], references.index(done[0]))
        progress(stage, len(references) - len(waiting), len(references))
    results: list[Any] = ray.get(references)
    return results


def _raise_own_errors(reference: Any, rank: int) -> None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, LightMoEError):
            raise cause from error
        raise RankError(f"rank {rank} failed: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        raise RankError(f"rank {rank} died while it started: {error}") from error
