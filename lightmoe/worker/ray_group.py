"""Ranks as Ray actors, one per rank, in one placement group.

Ray places, starts, supervises and stops them. Steps do not pass through Ray: every rank runs one
long task that reads its plans from the step channel (channel.py) until the driver closes it.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightmoe.collector import settle_objects
from lightmoe.core import Batch, RankInfo, StepResult
from lightmoe.errors import LightMoEError, RankError
from lightmoe.worker import channel, ray_cluster
from lightmoe.worker.config import BLOCK_SIZE, WorkerConfig
from lightmoe.worker.ray_cluster import RayConfig

Progress = Callable[[str, int, int], None]
"""Called with a stage ("start" or "load"), how many ranks are done, and how many there are."""

_START_TIMEOUT_SECONDS = 120.0
_LOAD_TIMEOUT_SECONDS = 1800.0
_TRACE_SECONDS = 20.0
"""How long ranks may take to write their traces when the end comes early."""


class RankActor:
    """What Ray runs for one rank. torch is imported here, not in the driver."""

    def __init__(self, rank: int, config: WorkerConfig) -> None:
        from lightmoe.worker.worker import Worker

        self._worker = Worker(rank, config)
        self._rank = rank
        self._rendezvous: object | None = None

    def open_rendezvous(self, timeout_seconds: float, host: str) -> int:
        """The port of the store where ranks meet; rank 0 keeps it."""
        from lightmoe.distributed.communicator import Rendezvous

        rendezvous = Rendezvous(timeout_seconds, host)
        self._rendezvous = rendezvous
        return rendezvous.port

    def load(self, rendezvous_port: int, host: str, rendezvous_host: str) -> RankInfo:
        """Join the group and load the weights."""
        self._worker.join(rendezvous_port, host, rendezvous_host)
        info = self._worker.load()
        settle_objects()
        return info

    def run_steps(self, port: int, token: bytes, host: str) -> None:
        """Serve steps until the driver closes the channel, or is gone."""
        from lightmoe.worker.worker import run_steps

        with channel.connect(port, self._rank, token, host) as connection:

            def receive() -> Batch | None:
                frame = channel.receive_frame(connection)
                return None if frame is None else channel.unpack_batch(frame)

            try:
                run_steps(
                    self._worker,
                    receive,
                    lambda result: channel.send_frame(connection, channel.pack_result(result)),
                )
            finally:
                channel.hang_up(connection)


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
        self._group: PlacementGroup | None = None
        self._closed = False
        self._is_traced = config.trace is not None
        bundle = ray_cluster.acquire(self._num_ranks, ray_config, config.num_threads)
        try:
            self._start(config, bundle, progress)
        except (Exception, KeyboardInterrupt):
            self.close()
            raise

    def _start(self, config: WorkerConfig, bundle: dict[str, float], progress: Progress) -> None:
        group = self._group = ray_cluster.place(self._num_ranks, bundle)
        actor_class = ray.remote(RankActor)
        self._actors = [
            actor_class.options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            ).remote(rank, config)
            for rank in range(self._num_ranks)
        ]
        ready = [actor.__ray_ready__.remote() for actor in self._actors]
        _gather(ready, "start", _START_TIMEOUT_SECONDS, progress)
        hosts = ray_cluster.hosts_of(group)
        meeting_place = hosts.ranks[0]
        opened = self._actors[0].open_rendezvous.remote(config.timeout_seconds, meeting_place)
        port = ray.get(opened)
        loads = [
            actor.load.remote(port, host, meeting_place)
            for actor, host in zip(self._actors, hosts.ranks, strict=True)
        ]
        self.ranks: Sequence[RankInfo] = _gather(loads, "load", _LOAD_TIMEOUT_SECONDS, progress)
        token = secrets.token_bytes(32)
        with contextlib.closing(channel.StepListener(token, hosts.driver)) as listener:
            self._runs = [
                actor.run_steps.remote(listener.port, token, hosts.driver) for actor in self._actors
            ]
            self._connections = listener.accept(self._num_ranks, timeout_seconds=30)
        for connection in self._connections:
            connection.settimeout(self._step_timeout_seconds)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step on every rank at once; RankError names the rank that died or is late."""
        try:
            for connection, batch in zip(self._connections, batches, strict=True):
                channel.send_frame(connection, channel.pack_batch(batch))
        except (ConnectionError, TimeoutError) as error:
            raise self._diagnose() from error

    def finish(self) -> list[StepResult]:
        """Wait for the first of the steps under way; raises as `begin`."""
        results: list[StepResult] = []
        try:
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
        # poll, not select: a server with many clients has descriptors beyond select's 1024.
        poller = select.poll()
        for connection in self._connections:
            poller.register(connection, select.POLLIN)
        if poller.poll(0):
            raise self._diagnose()

    def _diagnose(self) -> RankError:
        """Which rank is to blame: one that died, else one that failed, else one that is silent."""
        if not ray.is_initialized():  # to ask Ray now would start it, or join a stranger's
            return RankError("Ray has been shut down in this process, and the ranks with it")
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
        """Stop every rank, and Ray if nobody else here uses it; may be called twice."""
        if self._closed:
            return
        self._closed = True
        for connection in self._connections:
            channel.hang_up(connection)  # a rank in a step sees it, and ends when that is done
            connection.close()
        if ray.is_initialized():  # the user's own script may have shut it down
            if self._is_traced and self._runs:
                ray.wait(self._runs, num_returns=len(self._runs), timeout=_TRACE_SECONDS)
            for actor in self._actors:
                ray.kill(actor)
        ray_cluster.release(self._group)


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
