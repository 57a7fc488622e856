"""Machines made up for the tests: a tree of cards with and without peer-to-peer, and NVLink."""

from __future__ import annotations

from lightmoe.topology import Device, Fabric, Link, Node, Rank, Topology

GB = 1e9
CARD = Device(
    name="card",
    kind="cuda",
    memory_bytes=11 << 30,
    flops_per_second=50e12,
    bytes_per_second=500 * GB,
    origin="public",
)


def link(name: str, up: float, down: float, latency: float = 0.0, duplex: bool = True) -> Link:
    return Link(
        name=name,
        kind="pcie",
        up_bytes_per_second=up * GB,
        down_bytes_per_second=down * GB,
        latency_seconds=latency,
        origin="public",
        duplex=duplex,
    )


def box(p2p_groups: tuple[tuple[int, ...], ...] = (), memory: bool = True) -> Topology:
    """Two sockets with a switch of two cards each: cards 12 up and 10 down, uplinks the same."""
    nodes = {"machine": Node(name="machine", kind="machine")}
    ranks = []
    for index in range(2):
        socket, switch = f"socket{index}", f"switch{index}"
        nodes[socket] = Node(
            name=socket,
            kind="socket",
            parent="machine",
            link="upi",
            memory="memory" if memory else "",
        )
        nodes[switch] = Node(name=switch, kind="switch", parent=socket, link="x16")
        ranks += [Rank(device="card", parent=switch, link="x16")] * 2
    links = [link("x16", 12, 10, 5e-6), link("upi", 20, 20, 1e-6), link("memory", 40, 40, 0, False)]
    return Topology(
        name="box",
        description="four cards",
        devices={"card": CARD},
        links={entry.name: entry for entry in links},
        nodes=nodes,
        ranks=tuple(ranks),
        p2p_groups=p2p_groups,
    )


def linked(num_ranks: int = 4, shared: bool = False, message_seconds: float = 0.0) -> Topology:
    """Cards under one root, all joined by a fabric: 100 GB/s with all, 150 between two."""
    fabric = Fabric(
        name="nvswitch",
        kind="nvswitch",
        ranks=tuple(range(num_ranks)),
        bytes_per_second=100 * GB,
        pair_bytes_per_second=150 * GB,
        latency_seconds=1e-5,
        origin="measured",
        shared=shared,
        message_seconds=message_seconds,
    )
    return Topology(
        name="linked",
        description="cards on a switch",
        devices={"card": CARD},
        links={"x16": link("x16", 12, 10, 5e-6)},
        nodes={"machine": Node(name="machine", kind="machine")},
        ranks=(Rank(device="card", parent="machine", link="x16"),) * num_ranks,
        fabrics=(fabric,),
    )
