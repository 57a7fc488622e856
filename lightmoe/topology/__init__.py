"""Machine descriptions: ranks, links, bandwidths, memory. Files are in topology/ of the checkout.

`read_topology` reads one, `probe.py` measures one, `Topology` answers what the planner, the
simulator and the exchange ask of it.
"""

from lightmoe.topology.parts import Device, Fabric, Link, Node, Rank
from lightmoe.topology.reader import parse_topology, read_topology
from lightmoe.topology.tree import Hop, Topology
from lightmoe.topology.writer import to_toml

__all__ = [
    "Device",
    "Fabric",
    "Hop",
    "Link",
    "Node",
    "Rank",
    "Topology",
    "parse_topology",
    "read_topology",
    "to_toml",
]
