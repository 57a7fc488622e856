"""What a machine is made of, field by field as in the files of topology/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Origin = Literal["measured", "public", "derived"]
"""Measured on such a machine, published by somebody, or worked out from one of these."""

DeviceKind = Literal["cuda", "cpu"]
LinkKind = Literal["pcie", "socket", "memory", "network"]
NodeKind = Literal["machine", "socket", "switch"]
FabricKind = Literal["nvswitch", "bridge", "loopback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of card or processor; the shares are what kernels reach of the peaks.

    | field | meaning |
    |---|---|
    | flops_per_second | peak of 16-bit matrix products summed in fp32; on a CPU fp32, one core |
    | bytes_per_second | peak of reading its memory |
    | compute_capability | "7.5" is sm_75; empty on a CPU |
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    flops_per_second: float
    bytes_per_second: float
    origin: Origin
    flops_share: float = 1.0
    bytes_share: float = 1.0
    compute_capability: str = ""
    source: str = ""

    @property
    def reached_flops_per_second(self) -> float:
        """What kernels reach of the matrix products' peak."""
        return self.flops_per_second * self.flops_share

    @property
    def reached_bytes_per_second(self) -> float:
        """What kernels reach of the memory's peak."""
        return self.bytes_per_second * self.bytes_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One kind of link: up is towards the machine's root (card to host), down away from it.

    Bandwidth is that of one such link; whoever passes it shares it. `duplex` false: both directions
    share one bandwidth. `lanes` and `generation` are those in use, max_ those that both ends have.
    """

    name: str
    kind: LinkKind
    up_bytes_per_second: float
    down_bytes_per_second: float
    latency_seconds: float
    origin: Origin
    duplex: bool = True
    lanes: int = 0
    generation: int = 0
    max_lanes: int = 0
    max_generation: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A place in the tree where links meet; the one without a parent is the root.

    `memory` names the link to the host memory there: what all cards below move at once.
    """

    name: str
    kind: NodeKind
    parent: str = ""
    link: str = ""
    memory: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank: its device, and the link by which it hangs in the tree."""

    device: str
    parent: str
    link: str
    bus_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """A way between ranks beside the tree: NVLink, or the loopback of CPU ranks.

    | field | meaning |
    |---|---|
    | bytes_per_second | one rank's, each direction, while all of them exchange |
    | pair_bytes_per_second | between two ranks while the others are silent |
    | shared | bytes_per_second is that of all ranks together, both directions |
    | message_seconds | what each message costs beside its bytes |
    """

    name: str
    kind: FabricKind
    ranks: tuple[int, ...]
    bytes_per_second: float
    pair_bytes_per_second: float
    latency_seconds: float
    origin: Origin
    shared: bool = False
    message_seconds: float = 0.0
    source: str = ""
