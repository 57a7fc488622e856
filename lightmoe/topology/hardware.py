"""What the probe asks of a machine with cards. `nvidia.py` asks real ones, tests made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Nearness = Literal["board", "switch", "switches", "host bridge", "socket", "machine", "unknown"]
"""What two cards have in common, as NVML says it; `unknown` where it does not."""

P2PResult = Literal["works", "not offered", "wrong bytes", "hangs"]
CopyKind = Literal["upload", "download", "peer"]

HOST = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class NvLinks:
    """The active NVLinks of a card to one remote: bus id of a card, empty for an NVSwitch."""

    num_links: int
    version: int
    bus_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card, numbered as ranks will see it.

    `numa_node` is -1 where the system does not tell; lanes and generations 0 likewise.
    """

    name: str
    bus_id: str
    memory_bytes: int
    compute_capability: str
    numa_node: int
    lanes: int
    generation: int
    max_lanes: int
    max_generation: int
    nvlinks: tuple[NvLinks, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """One stream of copies: from a card or HOST to a card or HOST. Host memory is pinned, and of
    the card's own socket where that is known."""

    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one card reaches: 16-bit matrix products, and reading plus writing its own memory."""

    flops_per_second: float
    bytes_per_second: float


class Hardware(Protocol):
    """A machine with cards. Every call ends within its time, or says so."""

    def cards(self) -> Sequence[Card]:
        """All cards, in the order of the ranks."""
        ...

    def nearness(self, first: int, second: int) -> Nearness:
        """What two cards have in common in the PCIe tree."""
        ...

    def test_p2p(self, source: int, target: int) -> P2PResult:
        """Copy a pattern from one card's memory to the other's and compare every byte."""
        ...

    def copy_rates(self, copies: Sequence[Copy], seconds: float) -> list[float]:
        """Bytes per second of each stream of copies, all running at once for about `seconds`."""
        ...

    def latency_seconds(self, copy: Copy) -> float:
        """Time of one copy of a few bytes, of many in a row: the host does not wait for each."""
        ...

    def speed(self, card: int) -> Speed:
        """What one card reaches alone."""
        ...
