"""Makes a Topology of what a probe found and measured on a machine with cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

from lightmoe.topology.hardware import Card, Hardware
from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank
from lightmoe.topology.tree import Topology

Groups = list[tuple[int, ...]]

_FASTER_THAN_PCIE = 1.5  # times a card's own host copies


@dataclass(slots=True)
class Measured:
    """Bytes per second and latencies, by what was measured: cards, groups of cards, pairs."""

    uploads: list[float] = field(default_factory=list)
    downloads: list[float] = field(default_factory=list)
    host_latencies: list[float] = field(default_factory=list)
    together: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], float] = field(default_factory=dict)
    all_pairs: dict[tuple[int, ...], float] = field(default_factory=dict)
    peer_latencies: dict[tuple[int, int], float] = field(default_factory=dict)


def describe(
    hardware: Hardware,
    name: str,
    cards: Sequence[Card],
    switches: Groups,
    sockets: Groups,
    working: set[tuple[int, int]],
    measured: Measured,
) -> Topology:
    """The machine as measured; `working` are the pairs whose copies arrived right."""
    links: dict[str, Link] = {}
    nodes = {"machine": Node(name="machine", kind="machine")}
    parents = _add_sockets(nodes, links, sockets, len(cards), measured)
    parents |= _add_switches(nodes, links, switches, parents, measured)
    ranks = []
    for rank, card in enumerate(cards):
        links[f"card{rank}"] = _card_link(card, rank, measured)
        ranks.append(
            Rank(device=card.name, parent=parents[rank], link=f"card{rank}", bus_id=card.bus_id)
        )
    fabrics = _fabrics(cards, working, measured)
    joined = {pair for fabric in fabrics for pair in permutations(fabric.ranks, 2)}
    kinds = {card.name: rank for rank, card in reversed(list(enumerate(cards)))}
    return Topology(
        name=name,
        description=f"{len(cards)} x {', '.join(sorted(kinds))}",
        devices={kind: _device(hardware, cards[rank], rank) for kind, rank in kinds.items()},
        links=links,
        nodes=nodes,
        ranks=tuple(ranks),
        fabrics=fabrics,
        p2p_groups=tuple(cliques(working - joined, len(cards))),
        sources=("lightmoe topology probe",),
    )


def _add_sockets(
    nodes: dict[str, Node],
    links: dict[str, Link],
    sockets: Groups,
    num_cards: int,
    measured: Measured,
) -> dict[int, str]:
    """The sockets as nodes; the parent of each card so far. One socket is the machine itself."""
    everybody = tuple(range(num_cards))
    if len(sockets) == 1:
        memory = _memory_link(links, "machine", everybody, measured)
        nodes["machine"] = Node(name="machine", kind="machine", memory=memory)
        return dict.fromkeys(everybody, "machine")
    # What passes between sockets was not measured alone: at least what all cards reach at once.
    up, down = measured.together[everybody]
    links["between-sockets"] = Link(
        name="between-sockets",
        kind="socket",
        up_bytes_per_second=up,
        down_bytes_per_second=down,
        latency_seconds=0.0,
        origin="derived",
        source="not measured alone; all cards at once reach this to host memory",
    )
    parents: dict[int, str] = {}
    for index, group in enumerate(sockets):
        name = f"socket{index}"
        memory = _memory_link(links, name, group, measured)
        nodes[name] = Node(
            name=name, kind="socket", parent="machine", link="between-sockets", memory=memory
        )
        parents |= dict.fromkeys(group, name)
    return parents


def _memory_link(
    links: dict[str, Link], place: str, group: tuple[int, ...], measured: Measured
) -> str:
    """The link of a place to its host memory; none where one card alone says it all."""
    if group not in measured.together:
        return ""
    name = f"{place}-memory"
    links[name] = _link(name, "memory", *measured.together[group])
    return name


def _add_switches(
    nodes: dict[str, Node],
    links: dict[str, Link],
    switches: Groups,
    parents: dict[int, str],
    measured: Measured,
) -> dict[int, str]:
    """Switches that several cards share as nodes; the new parents of those cards."""
    found: dict[int, str] = {}
    for index, group in enumerate(switches):
        if len(group) == 1:
            continue
        name = f"switch{index}"
        links[f"{name}-uplink"] = _link(f"{name}-uplink", "pcie", *measured.together[group])
        nodes[name] = Node(
            name=name, kind="switch", parent=parents[group[0]], link=f"{name}-uplink"
        )
        found |= dict.fromkeys(group, name)
    return found


def _link(name: str, kind: str, up: float, down: float) -> Link:
    assert kind in ("pcie", "memory")
    return Link(
        name=name,
        kind="pcie" if kind == "pcie" else "memory",
        up_bytes_per_second=up,
        down_bytes_per_second=down,
        latency_seconds=0.0,
        origin="measured",
        source="all cards below it at once",
    )


def _card_link(card: Card, rank: int, measured: Measured) -> Link:
    return Link(
        name=f"card{rank}",
        kind="pcie",
        up_bytes_per_second=measured.uploads[rank],
        down_bytes_per_second=measured.downloads[rank],
        latency_seconds=measured.host_latencies[rank],
        origin="measured",
        source="pinned copies, this card alone",
        lanes=card.lanes,
        generation=card.generation,
        max_lanes=card.max_lanes,
        max_generation=card.max_generation,
    )


def _fabrics(
    cards: Sequence[Card], working: set[tuple[int, int]], measured: Measured
) -> tuple[Fabric, ...]:
    """One fabric for cards that are all linked to each other, one for every other linked pair."""
    linked = {pair for pair in working if _is_linked(cards, *pair, measured)}
    groups = cliques(linked, len(cards))
    for pair in combinations(range(len(cards)), 2):
        if {pair, pair[::-1]} <= linked and not any(set(pair) <= set(group) for group in groups):
            groups.append(pair)
    return tuple(_fabric(cards, group, measured) for group in groups)


def _is_linked(cards: Sequence[Card], source: int, target: int, measured: Measured) -> bool:
    """By NVLink: the driver says so, or, where it tells nothing, PCIe could not be that fast."""
    if cards[source].nvlinks and cards[target].nvlinks:
        remotes = {link.bus_id for link in cards[source].nvlinks}
        to_switches = "" in remotes and any(not link.bus_id for link in cards[target].nvlinks)
        return to_switches or cards[target].bus_id in remotes
    pcie = min(measured.uploads[source], measured.downloads[target])
    return measured.pairs[source, target] > _FASTER_THAN_PCIE * pcie


def _fabric(cards: Sequence[Card], ranks: tuple[int, ...], measured: Measured) -> Fabric:
    pairs = list(permutations(ranks, 2))
    alone = min(measured.pairs[pair] for pair in pairs)
    latencies = [measured.peer_latencies[p] for p in pairs if p in measured.peer_latencies]
    switched = len(ranks) > 2 or any(not link.bus_id for link in cards[ranks[0]].nvlinks)
    return Fabric(
        name="nvlink-" + "-".join(map(str, ranks)),
        kind="nvswitch" if switched else "bridge",
        ranks=ranks,
        bytes_per_second=measured.all_pairs.get(ranks, alone),
        pair_bytes_per_second=alone,
        latency_seconds=max(latencies, default=max(measured.host_latencies)),
        origin="measured",
        source="device-to-device copies: all pairs at once, and the slowest pair alone",
    )


def _device(hardware: Hardware, card: Card, rank: int) -> Device:
    speed = hardware.speed(rank)
    return Device(
        name=card.name,
        kind="cuda",
        memory_bytes=card.memory_bytes,
        flops_per_second=speed.flops_per_second,
        bytes_per_second=speed.bytes_per_second,
        compute_capability=card.compute_capability,
        origin="measured",
        source="the library's matrix product, and a copy within the card",
    )


def cliques(working: set[tuple[int, int]], num_cards: int) -> Groups:
    """Groups of cards in which every pair works in both directions, each card in one at most."""
    groups: Groups = []
    for card in range(num_cards):
        for index, group in enumerate(groups):
            if all({(card, other), (other, card)} <= working for other in group):
                groups[index] = (*group, card)
                break
        else:
            groups.append((card,))
    return [group for group in groups if len(group) > 1]
