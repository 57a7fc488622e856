"""Finds the description that somebody measured of exactly these cards, for `--topology auto`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightmoe.topology.nvidia import bus_name
from lightmoe.topology.reader import read_topology
from lightmoe.topology.tree import Topology

CardName = tuple[str, str]
"""A card as the driver names it: its product, and where it is on the bus."""


def find_topology(folders: Iterable[Path], cards: Sequence[CardName]) -> Topology | None:
    """The first file of the folders whose first ranks are these cards at these places, cut to them.

    Files that are something else are none of our business; UsageError where one that describes
    these cards is wrong.
    """
    wanted = [(name, bus_name(bus_id)) for name, bus_id in cards]
    if not wanted or not all(bus_id for _, bus_id in cards):
        return None
    for folder in folders:
        for path in sorted(folder.glob("*.toml")):
            if _cards_of(path)[: len(wanted)] == wanted:
                return read_topology(path).first(len(wanted))
    return None


def _cards_of(path: Path) -> list[CardName]:
    """Device and bus id of every rank, in order; empty for what is no description."""
    try:
        ranks: Any = tomllib.loads(path.read_text(encoding="utf-8")).get("ranks")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return []
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        return []
    return [(str(rank.get("device", "")), str(rank.get("bus_id", ""))) for rank in ranks]
