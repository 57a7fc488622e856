"""A whole machine, and what one asks of it: paths, bandwidths, exchange times, nearest ranks.

Between two ranks bytes go through a fabric that joins them; else up the tree to the nearest common
node and down again where peer-to-peer copies work; else through the memory of their sockets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lightmoe.errors import UsageError
from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank

Direction = Literal["up", "down", "both"]

NEARNESS_LEVELS = 3
"""A bridge, a switch, a socket."""


@dataclass(frozen=True, slots=True, order=True)
class Hop:
    """One thing on a path that has a bandwidth of its own: whose link, and in which direction."""

    place: str
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine. `p2p_groups`: ranks that can copy to each other's memory over PCIe.

    `num_cores` are those that ranks on the CPU share. Check happens in `reader.py`.
    """

    name: str
    description: str
    devices: Mapping[str, Device]
    links: Mapping[str, Link]
    nodes: Mapping[str, Node]
    ranks: tuple[Rank, ...]
    fabrics: tuple[Fabric, ...] = ()
    p2p_groups: tuple[tuple[int, ...], ...] = ()
    num_cores: int = 0
    sources: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of the description."""
        return len(self.ranks)

    def device(self, rank: int) -> Device:
        """The device of a rank."""
        return self.devices[self.ranks[rank].device]

    def first(self, num_ranks: int) -> Topology:
        """The same machine with its first ranks only; UsageError if it has fewer."""
        if not 1 <= num_ranks <= self.num_ranks:
            raise UsageError(
                f"{self.name} describes {self.num_ranks} ranks and {num_ranks} are asked for;"
                f" give --gpus 1 to {self.num_ranks}, or another --topology"
            )
        kept = range(num_ranks)
        fabrics = tuple(
            replace(fabric, ranks=tuple(rank for rank in fabric.ranks if rank in kept))
            for fabric in self.fabrics
        )
        groups = (tuple(rank for rank in group if rank in kept) for group in self.p2p_groups)
        return replace(
            self,
            ranks=self.ranks[:num_ranks],
            fabrics=fabrics,
            p2p_groups=tuple(group for group in groups if group),
        )

    def fabric(self, source: int, target: int) -> Fabric | None:
        """The fabric that joins two ranks, the fastest if there are several."""
        joining = [f for f in self.fabrics if source in f.ranks and target in f.ranks]
        return max(joining, key=lambda f: f.pair_bytes_per_second, default=None)

    def has_p2p(self, source: int, target: int) -> bool:
        """Whether one card can write to the other's memory, over a fabric or over PCIe."""
        over_pcie = any(source in group and target in group for group in self.p2p_groups)
        return over_pcie or self.fabric(source, target) is not None

    def path(self, source: int, target: int) -> tuple[Hop, ...]:
        """What bytes pass between two ranks, in order; nothing within one rank."""
        return self._paths[source][target]

    @cached_property
    def _paths(self) -> tuple[tuple[tuple[Hop, ...], ...], ...]:
        ranks = range(self.num_ranks)
        return tuple(tuple(self._find_path(s, t) for t in ranks) for s in ranks)

    def _find_path(self, source: int, target: int) -> tuple[Hop, ...]:
        if source == target:
            return ()
        fabric = self.fabric(source, target)
        if fabric is not None:
            return self._fabric_hops(fabric, source, target)
        up, down = self._ancestors(source), self._ancestors(target)
        if self.has_p2p(source, target):
            meeting = next(name for name in up if name in down)
            return (
                *self._climb(f"rank{source}", up[: up.index(meeting)], "up"),
                *reversed(self._climb(f"rank{target}", down[: down.index(meeting)], "down")),
            )
        return (*self.host_path(source, "up"), *self.pull_path(source, target))

    def pull_path(self, source: int, target: int) -> tuple[Hop, ...]:
        """From the host memory of one rank's socket to another rank."""
        up, down = self._ancestors(source), self._ancestors(target)
        return (*self._between_sockets(up, down), *self.host_path(target, "down"))

    def _fabric_hops(self, fabric: Fabric, source: int, target: int) -> tuple[Hop, ...]:
        if fabric.shared:
            return (Hop(fabric.name, "both"),)
        return Hop(f"{fabric.name}/rank{source}", "up"), Hop(f"{fabric.name}/rank{target}", "down")

    def host_path(self, rank: int, direction: Literal["up", "down"]) -> tuple[Hop, ...]:
        """Between a rank and the host memory of its socket: up is card to host."""
        above = self._ancestors(rank)
        home = self._memory_node(above)
        hops = [*self._climb(f"rank{rank}", above[: above.index(home)], direction)]
        if self.nodes[home].memory:
            hops.append(self._hop(f"{home}/memory", self.nodes[home].memory, direction))
        return tuple(hops if direction == "up" else reversed(hops))

    def _between_sockets(self, up: Sequence[str], down: Sequence[str]) -> tuple[Hop, ...]:
        source, target = self._memory_node(up), self._memory_node(down)
        if source == target:
            return ()
        meeting = next(name for name in up if name in down)
        climbed = up[up.index(source) : up.index(meeting)]
        descended = down[down.index(target) : down.index(meeting)]
        return (
            *(self._hop(name, self.nodes[name].link, "up") for name in climbed),
            *(self._hop(name, self.nodes[name].link, "down") for name in reversed(descended)),
        )

    def _memory_node(self, above: Sequence[str]) -> str:
        """Where a rank's host memory is: its socket, or the root where none is described."""
        return next((name for name in above if self.nodes[name].kind == "socket"), above[-1])

    def _ancestors(self, rank: int) -> list[str]:
        above = [self.ranks[rank].parent]
        while parent := self.nodes[above[-1]].parent:
            above.append(parent)
        return above

    def _climb(
        self, start: str, passed: Sequence[str], direction: Literal["up", "down"]
    ) -> tuple[Hop, ...]:
        """The links from a rank up to the node above the last one passed."""
        own = self.ranks[int(start.removeprefix("rank"))].link
        above = (self._hop(name, self.nodes[name].link, direction) for name in passed)
        return (self._hop(start, own, direction), *above)

    def _hop(self, place: str, link: str, direction: Literal["up", "down"]) -> Hop:
        return Hop(place, direction if self.links[link].duplex else "both")

    def capacity(self, hop: Hop) -> float:
        """Bytes per second that pass there."""
        link = self._link_at(hop.place)
        if isinstance(link, Fabric):
            return link.bytes_per_second
        return link.down_bytes_per_second if hop.direction == "down" else link.up_bytes_per_second

    def _link_at(self, place: str) -> Link | Fabric:
        for fabric in self.fabrics:
            if place.partition("/")[0] == fabric.name:
                return fabric
        node = place.removesuffix("/memory")
        if node != place:
            return self.links[self.nodes[node].memory]
        if place in self.nodes:
            return self.links[self.nodes[place].link]
        return self.links[self.ranks[int(place.removeprefix("rank"))].link]

    def latency_seconds(self, source: int, target: int) -> float:
        """From the start of a small copy to its end; 0 within one rank."""
        fabric = self.fabric(source, target)
        if source == target or fabric is not None:
            return fabric.latency_seconds if fabric and source != target else 0.0
        latencies = (self._link_at(hop.place) for hop in self.path(source, target))
        return sum(link.latency_seconds for link in latencies)

    def bandwidth(self, source: int, target: int) -> float:
        """Bytes per second between two ranks while all others are silent.

        Within one rank: its memory's, read and written.
        """
        if source == target:
            return self.device(source).reached_bytes_per_second / 2
        fabric = self.fabric(source, target)
        if fabric is not None:
            return fabric.pair_bytes_per_second
        return min(self.capacity(hop) for hop in self.path(source, target))

    def link_bytes(self, matrix: Sequence[Sequence[float]]) -> dict[Hop, float]:
        """Bytes over every hop when rank s sends matrix[s][t] bytes to rank t: [W, W]."""
        total: dict[Hop, float] = defaultdict(float)
        for source, row in enumerate(matrix):
            for target, num_bytes in enumerate(row):
                if num_bytes:
                    for hop in self.path(source, target):
                        total[hop] += num_bytes
        return dict(total)

    def all_to_all_seconds(self, matrix: Sequence[Sequence[float]]) -> float:
        """Time of an exchange of matrix[s][t] bytes [W, W], all at once: the slowest hop, and the
        longest latency. What a rank keeps costs nothing."""
        messages = [
            (source, target)
            for source, row in enumerate(matrix)
            for target, num_bytes in enumerate(row)
            if num_bytes and source != target
        ]
        latency = max((self.latency_seconds(s, t) for s, t in messages), default=0.0)
        busiest = self.busiest_seconds(self.link_bytes(matrix))
        return busiest + latency + self._message_seconds(messages)

    def busiest_seconds(self, hop_bytes: Mapping[Hop, float]) -> float:
        """The time of these bytes at the hop that needs longest, without latencies."""
        return max((size / self.capacity(hop) for hop, size in hop_bytes.items()), default=0.0)

    def _message_seconds(self, messages: Sequence[tuple[int, int]]) -> float:
        """What messages cost beside bytes: in a row on a shared fabric, else those of one rank."""
        seconds: dict[str, float] = defaultdict(float)
        for source, target in messages:
            fabric = self.fabric(source, target)
            if fabric is not None:
                owner = "" if fabric.shared else f"/{source}"
                seconds[fabric.name + owner] += fabric.message_seconds
        return max(seconds.values(), default=0.0)

    def neighbourhoods(self) -> tuple[int, ...]:
        """A number for each rank [W], that of the first one below the same switch or socket; all
        are as near where one fabric joins them."""
        if any(len(set(fabric.ranks)) == self.num_ranks for fabric in self.fabrics):
            return (0,) * self.num_ranks
        first: dict[str, int] = {}
        return tuple(first.setdefault(entry.parent, rank) for rank, entry in enumerate(self.ranks))

    def nearness(self) -> tuple[tuple[int, ...], ...]:
        """Who is near whom [N, W]: in each level ranks of one number, that of the first of them.

        First those that a bridge or another fabric joins, then those below the same switch, the
        same socket, and so on up to the root; levels that tell nobody apart, or everybody, are left
        out, and of more than NEARNESS_LEVELS the farthest.
        """
        if any(len(set(fabric.ranks)) == self.num_ranks for fabric in self.fabrics):
            return ()
        ranks = range(self.num_ranks)
        paths = [self._ancestors(rank)[::-1] for rank in ranks]
        joined = [[min(f.ranks) for f in self.fabrics if rank in f.ranks] for rank in ranks]
        levels = [tuple(min(first, default=rank) for rank, first in enumerate(joined))]
        for depth in range(max(map(len, paths)), 1, -1):
            above = [path[:depth] for path in paths]
            levels.append(tuple(above.index(path) for path in above))
        telling = [level for level in dict.fromkeys(levels) if 1 < len(set(level)) < len(level)]
        return tuple(telling[:NEARNESS_LEVELS])

    def exchange_order(self, rank: int) -> tuple[int, ...]:
        """To whom a rank sends in rounds 1, 2, ...: in every round each rank has one sender.

        Round r goes r places on in the order of the tree's leaves: near ranks come first, and those
        under one switch do not all send to the same other switch at once.
        """
        leaves = sorted(range(self.num_ranks), key=lambda r: (self._ancestors(r)[::-1], r))
        place = leaves.index(rank)
        return tuple(leaves[(place + step) % self.num_ranks] for step in range(1, self.num_ranks))
