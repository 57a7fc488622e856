"""The route of CPU ranks in C++: cute_kernels/cpu/route.cpp, built when the package is installed.

Where no C++ compiler was there then, there is no such library, and route_reference.py does it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from lightmoe.errors import UsageError
from lightmoe.kernels.route import ROUTE_NUMBERS
from lightmoe.kernels.route_reference import Nearness

REMEDY = "install a C++17 compiler (apt-get install g++), then install lightmoe again"
_NAME = "lightmoe.kernels._light_route"


@functools.cache
def library_path() -> Path | None:
    """Where the library is; None where the installation could not build it."""
    found = importlib.util.find_spec(_NAME)
    return None if found is None or found.origin is None else Path(found.origin)


@functools.cache
def _assign_of(path: Path) -> Any:
    assign = ctypes.CDLL(str(path)).light_route_assign
    counts, table = (
        np.ctypeslib.ndpointer(dtype, flags="C_CONTIGUOUS") for dtype in (np.int64, np.int32)
    )
    assigned = np.ctypeslib.ndpointer(np.int64, flags=("C_CONTIGUOUS", "WRITEABLE"))
    assign.argtypes = [counts, table, table, *[ctypes.c_int] * 6, assigned]
    return assign


def assign(
    counts: np.ndarray,
    copy_ranks: np.ndarray,
    route: str,
    sweeps: int,
    path: Path,
    nearness: Nearness = (),
) -> np.ndarray:
    """What each source rank sends to each copy: counts [W, E], int32 [E, C] -> int64 [W, E, C].

    `copy_ranks` are the holders of each expert, home first, then -1. The integers are those of
    route_reference's `assign` of its `share_tokens`. UsageError where the copies or levels
    make no sense.
    """
    num_ranks, num_experts = counts.shape
    if len(copy_ranks) != num_experts:
        raise UsageError(f"route: copies of {len(copy_ranks)} experts for {num_experts} experts")
    if route not in ROUTE_NUMBERS:
        raise UsageError(f"route {route!r} is unknown; give one of {list(ROUTE_NUMBERS)}")
    levels = _table_of(tuple(map(tuple, nearness)))
    if len(levels) and levels.shape[1] != num_ranks:
        raise UsageError(f"route: nearness of {levels.shape[1]} ranks for {num_ranks} ranks")
    num_copies = copy_ranks.shape[1]
    assigned = np.zeros((num_ranks, num_experts, num_copies), dtype=np.int64)
    sizes = (num_ranks, num_experts, num_copies, len(levels), ROUTE_NUMBERS[route], sweeps)
    counts = np.ascontiguousarray(counts, dtype=np.int64)
    failed = _assign_of(path)(counts, copy_ranks, levels, *sizes, assigned)
    if failed:
        raise UsageError(f"route: copies are not ranks of 0 to {num_ranks - 1}, once an expert")
    return assigned


@functools.lru_cache(maxsize=16)
def _table_of(nearness: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """int32 [N, W] of as many levels; [0] without any."""
    table = np.array(nearness, dtype=np.int32)
    table.flags.writeable = False
    return table
