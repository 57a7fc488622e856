"""A topology as a tree of text: who hangs where, by what link, how fast."""

from __future__ import annotations

from collections.abc import Iterator

from rich.tree import Tree

from lightmoe.topology.parts import Fabric, Link, Node
from lightmoe.topology.tree import Topology


def topology_tree(topology: Topology) -> Tree:
    """The tree from the root down, the fabrics beside it, ready to print."""
    root = next(node for node in topology.nodes.values() if not node.parent)
    tree = Tree(f"{topology.name}: {topology.description}")
    _add_below(tree.add(_node_label(topology, root)), topology, root.name)
    for fabric in topology.fabrics:
        tree.add(_fabric_label(fabric))
    tree.add(_p2p_label(topology))
    for line in _device_labels(topology):
        tree.add(line)
    return tree


def _add_below(branch: Tree, topology: Topology, name: str) -> None:
    for node in topology.nodes.values():
        if node.parent == name:
            _add_below(branch.add(_node_label(topology, node)), topology, node.name)
    for rank, entry in enumerate(topology.ranks):
        if entry.parent == name:
            bus = f" {entry.bus_id}" if entry.bus_id else ""
            link = link_label(topology.links[entry.link])
            branch.add(f"rank {rank}: {entry.device}{bus}, {link}")


def _node_label(topology: Topology, node: Node) -> str:
    parts = [node.name]
    if node.link:
        parts.append(link_label(topology.links[node.link]))
    if node.memory:
        parts.append(f"host {link_label(topology.links[node.memory])}")
    return ", ".join(parts)


def link_label(link: Link) -> str:
    """One link in words: kind, lanes, both directions, where the figures come from."""
    kind: str = link.kind
    if link.lanes:
        kind += f" {link.generation}.0 x{link.lanes}" if link.generation else f" x{link.lanes}"
        if link.max_lanes > link.lanes:
            kind += f" of x{link.max_lanes}"
    up, down = link.up_bytes_per_second / 1e9, link.down_bytes_per_second / 1e9
    speed = f"{up:.1f} up, {down:.1f} down GB/s" if link.duplex else f"{up:.1f} GB/s both ways"
    return f"{kind} {speed} ({link.origin})"


def _fabric_label(fabric: Fabric) -> str:
    ranks = ", ".join(map(str, fabric.ranks))
    shared = "together" if fabric.shared else "each and direction, all at once"
    return (
        f"{fabric.kind} {fabric.name} of ranks {ranks}: {fabric.bytes_per_second / 1e9:.0f} GB/s"
        f" {shared}; {fabric.pair_bytes_per_second / 1e9:.0f} GB/s between two alone"
        f" ({fabric.origin})"
    )


def _p2p_label(topology: Topology) -> str:
    if not topology.p2p_groups:
        return "no peer-to-peer copies over PCIe"
    groups = "; ".join(", ".join(map(str, group)) for group in topology.p2p_groups)
    return f"peer-to-peer copies over PCIe among ranks {groups}"


def _device_labels(topology: Topology) -> Iterator[str]:
    for device in topology.devices.values():
        yield (
            f"{device.name}: {device.memory_bytes / 2**30:.1f} GiB,"
            f" {device.reached_flops_per_second / 1e12:.3g} TFLOP/s,"
            f" {device.reached_bytes_per_second / 1e9:.0f} GB/s reached ({device.origin})"
        )
