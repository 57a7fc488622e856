"""What other implementations reached for the same layers: published here as shares of the floor."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("peers.json")


@functools.cache
def published() -> dict[str, Any]:
    """peers.json: device, date, label, conditions, and rows of shares by implementation."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def shares(shape: str, tokens: int, dtype: str) -> dict[str, float]:
    """Share of the floor of each implementation that was measured there; none: {}."""
    for row in published()["rows"]:
        if (row["shape"], row["tokens"], row["dtype"]) == (shape, tokens, dtype):
            return dict(row["share_of_floor"])
    return {}


def best(shape: str, tokens: int, dtype: str) -> tuple[str, float] | None:
    """The best implementation's name and share of the floor."""
    found = shares(shape, tokens, dtype)
    return max(found.items(), key=lambda item: item[1]) if found else None
