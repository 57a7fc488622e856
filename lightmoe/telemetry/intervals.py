"""Arithmetic on sets of intervals: int64 [N, 2], begin and end, sorted and disjoint."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def union(intervals: Iterable[tuple[int, int]]) -> np.ndarray:
    """The set that any intervals cover, in any order; empty ones do not count."""
    pairs = np.array(sorted(pair for pair in intervals if pair[0] < pair[1]), dtype=np.int64)
    if not len(pairs):
        return np.empty((0, 2), dtype=np.int64)
    ends = np.maximum.accumulate(pairs[:, 1])
    begins = np.concatenate([[True], pairs[1:, 0] > ends[:-1]])
    lasts = np.concatenate([begins[1:], [True]])
    return np.stack([pairs[begins, 0], ends[lasts]], axis=1)


def subtract(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """What of `these` is not in `those`."""
    if not len(these) or not len(those):
        return these
    gap_begins = np.concatenate([[these[0, 0]], those[:, 1]])
    gap_ends = np.concatenate([those[:, 0], [these[-1, 1]]])
    return intersect(these, union(zip(gap_begins.tolist(), gap_ends.tolist(), strict=True)))


def intersect(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """What is in both."""
    first = np.searchsorted(those[:, 1], these[:, 0], side="right")
    last = np.searchsorted(those[:, 0], these[:, 1], side="left")
    parts = [
        (max(begin, low), min(end, high))
        for (begin, end), start, stop in zip(these.tolist(), first, last, strict=True)
        for low, high in those[start:stop].tolist()
    ]
    return union(parts)


def length(intervals: np.ndarray) -> int:
    """How much they cover."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())
