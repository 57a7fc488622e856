"""A discrete-event machine: streams of tasks on ranks, and what they share.

A task computes, or takes part in an exchange. Computing ranks of one CPU share its cores; the flows
of exchanges share links as the topology says. Between two events all rates are constant.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightmoe.topology import Topology
from lightmoe.topology.sharing import fair_rates

Name = Hashable
_END_SHARE = 1e-9  # of a flow: what rounding leaves of it is no more work


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that a rank does, in its place in one of the rank's streams.

    It starts when the stream's task before it and all that it `needs` have ended. `seconds` of
    computing, or an exchange, which every rank has under the same name.
    """

    name: Name
    stream: str
    needs: tuple[Name, ...] = ()
    seconds: float = 0.0
    is_exchange: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When a rank ran a task, in seconds from the start."""

    name: Name
    stream: str
    start: float
    end: float


@dataclass(slots=True, eq=False)
class _Flow:
    """Work in progress: bytes on links, or seconds on a processor."""

    owners: tuple[tuple[int, Name], ...]  # (rank, task): all of them end with it
    passes: np.ndarray  # bool over the resources
    left: float
    amount: float
    starts: float


@dataclass(slots=True)
class _Machine:
    """Resources of a topology: one processor a rank, the cores all share, and every hop."""

    topology: Topology
    slowdown: float
    in_turns: bool
    hops: list[Name] = field(default_factory=list)
    capacities: list[float] = field(default_factory=list)
    known: dict[tuple[Name, ...], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = range(self.topology.num_ranks)
        for rank in ranks:
            self._add(("compute", rank), 1.0)
        if self.num_cores:
            self._add("cores", float(self.num_cores))
        for source in ranks:
            for target in ranks:
                for hop in self.topology.path(source, target):
                    self._add(hop, self.topology.capacity(hop))

    @property
    def num_cores(self) -> int:
        """Cores that all ranks share; 0 where each has a device of its own."""
        return self.topology.num_cores if self.topology.device(0).kind == "cpu" else 0

    def _add(self, name: Name, capacity: float) -> None:
        if name not in self.hops:
            self.hops.append(name)
            self.capacities.append(capacity)

    def passes(self, names: tuple[Name, ...]) -> np.ndarray:
        """Which resources work of these names takes."""
        if names not in self.known:
            self.known[names] = np.array([hop in names for hop in self.hops])
        return self.known[names]

    def computing(self, rank: int) -> np.ndarray:
        """What computing on a rank takes."""
        return self.passes((("compute", rank), "cores"))

    def rates(self, flows: Sequence[_Flow]) -> np.ndarray:
        """How fast each goes on. A rank that also exchanges computes slower by `slowdown`."""
        capacities = np.array(self.capacities)
        num_ranks = self.topology.num_ranks
        if self.num_cores and self.in_turns:
            num_computing = sum(bool(flow.passes[:num_ranks].any()) for flow in flows)
            # Whole ranks stay on whole cores for the few milliseconds of a stage.
            most_on_a_core = -(-num_computing // self.num_cores) or 1
            capacities[num_ranks] = min(self.num_cores, num_computing / most_on_a_core)
        passes = np.stack([flow.passes for flow in flows], axis=1)
        for flow in flows:
            if not flow.passes[:num_ranks].any():
                for rank, _ in flow.owners:
                    capacities[rank] = 1.0 - self.slowdown
        return fair_rates(passes, capacities)


def run(
    topology: Topology,
    tasks: Sequence[Sequence[Task]],
    exchanges: Mapping[Name, np.ndarray],
    *,
    exchange_seconds: float = 0.0,
    exchange_factor: float = 1.0,
    slowdown: float = 0.0,
) -> list[list[Span]]:
    """Run each rank's tasks to their end: the spans of every rank, in the order of their ends.

    exchanges[name][s, t] are bytes from rank s to rank t; a flow starts when both are there and
    the link's latency and `exchange_seconds` have passed. Bytes and messages cost
    `exchange_factor` times what the topology says.
    """
    in_turns = any(matrix.any() for matrix in exchanges.values())
    machine = _Machine(topology, slowdown, in_turns)
    return _Run(machine, tasks, exchanges, exchange_seconds, exchange_factor).spans()


class _Run:
    def __init__(
        self,
        machine: _Machine,
        tasks: Sequence[Sequence[Task]],
        exchanges: Mapping[Name, np.ndarray],
        exchange_seconds: float,
        exchange_factor: float,
    ) -> None:
        self.machine = machine
        self.exchange_factor = exchange_factor
        self.exchanges = exchanges
        self.exchange_seconds = exchange_seconds
        self.now = 0.0
        self.waiting = [_by_stream(of_rank) for of_rank in tasks]
        self.started: dict[tuple[int, Name], tuple[Task, float]] = {}
        self.open: dict[tuple[int, Name], int] = {}  # flows that a started task still waits for
        self.done: set[tuple[int, Name]] = set()
        self.flows: list[_Flow] = []
        self.result: list[list[Span]] = [[] for _ in tasks]

    def spans(self) -> list[list[Span]]:
        self._start_ready()
        while self.flows:
            self._advance()
            self._start_ready()
        left = [
            task.name for streams in self.waiting for queue in streams.values() for task in queue
        ]
        assert not left, f"these wait for each other: {left[:5]}"
        return self.result

    def _start_ready(self) -> None:
        """Start what can be; a task without work ends at once, which may let others start."""
        progress = True
        while progress:
            progress = False
            for rank, streams in enumerate(self.waiting):
                for queue in streams.values():
                    if queue and self._is_ready(rank, queue):
                        self._start(rank, queue[0])
                        progress = True

    def _is_ready(self, rank: int, queue: list[Task]) -> bool:
        running = (rank, queue[0].name) in self.started
        return not running and all((rank, need) in self.done for need in queue[0].needs)

    def _start(self, rank: int, task: Task) -> None:
        key = (rank, task.name)
        self.started[key] = task, self.now
        self.open[key] = 0
        if task.is_exchange:
            self._start_flows(rank, task.name)
        elif task.seconds > 0:
            self._add((key,), self.machine.computing(rank), task.seconds, self.now)
        if not self.open[key] and not self._awaits_others(key):
            self._end(key)

    def _start_flows(self, rank: int, name: Name) -> None:
        """Flows to and from every rank that is there already."""
        matrix = self.exchanges[name]
        for other in range(len(matrix)):
            if other == rank or (other, name) not in self.started:
                continue
            for source, target in ((rank, other), (other, rank)):
                if matrix[source, target]:
                    self._start_flow(source, target, name, float(matrix[source, target]))

    def _start_flow(self, source: int, target: int, name: Name, num_bytes: float) -> None:
        topology = self.machine.topology
        fabric = topology.fabric(source, target)
        if fabric is not None:  # a message costs as much as so many bytes
            num_bytes += fabric.message_seconds * fabric.bytes_per_second
        starts = self.now + topology.latency_seconds(source, target) + self.exchange_seconds
        passes = self.machine.passes(topology.path(source, target))
        owners = (source, name), (target, name)
        self._add(owners, passes, num_bytes * self.exchange_factor, starts)

    def _add(
        self,
        owners: tuple[tuple[int, Name], ...],
        passes: np.ndarray,
        amount: float,
        starts: float,
    ) -> None:
        self.flows.append(_Flow(owners, passes, amount, amount, starts))
        for owner in owners:
            self.open[owner] += 1

    def _awaits_others(self, key: tuple[int, Name]) -> bool:
        """Whether a rank that this one exchanges with has not come yet."""
        rank, name = key
        if name not in self.exchanges or not self.started[key][0].is_exchange:
            return False
        matrix = self.exchanges[name]
        peers = np.flatnonzero(matrix[rank] + matrix[:, rank]).tolist()
        return any((peer, name) not in self.started for peer in peers if peer != rank)

    def _advance(self) -> None:
        """To the next end of a flow, or the next start after its latency."""
        running = [flow for flow in self.flows if flow.starts <= self.now]
        starts = [flow.starts for flow in self.flows if flow.starts > self.now]
        step = min(starts, default=np.inf) - self.now
        if running:
            rates = self.machine.rates(running).tolist()
            times = [flow.left / rate for flow, rate in zip(running, rates, strict=True)]
            step = min(step, *times)
            for flow, rate in zip(running, rates, strict=True):
                flow.left -= rate * step
        reaches_start = bool(starts) and min(starts) <= self.now + step
        self.now = min(starts) if reaches_start else self.now + step
        ended = [flow for flow in running if flow.left <= _END_SHARE * flow.amount]
        self.flows = [flow for flow in self.flows if flow not in ended]
        for flow in ended:
            for owner in flow.owners:
                self.open[owner] -= 1
                if not self.open[owner] and not self._awaits_others(owner):
                    self._end(owner)

    def _end(self, key: tuple[int, Name]) -> None:
        rank, name = key
        task, start = self.started[key]
        self.done.add(key)
        self.waiting[rank][task.stream].pop(0)
        self.result[rank].append(Span(name=name, stream=task.stream, start=start, end=self.now))


def _by_stream(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    streams: dict[str, list[Task]] = {}
    for task in tasks:
        streams.setdefault(task.stream, []).append(task)
    return streams
