"""Sets of intervals against sets of integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightmoe.telemetry.intervals import intersect, length, subtract, union

Pairs = list[tuple[int, int]]
PAIRS = st.lists(st.tuples(st.integers(-20, 60), st.integers(-20, 60)), max_size=12)


def points(pairs: Pairs) -> set[int]:
    """Every integer that a pair covers, its end not."""
    return {point for begin, end in pairs for point in range(begin, end)}


def of(intervals: np.ndarray) -> set[int]:
    """The same of a result, after a look at its order and gaps."""
    assert intervals.dtype == np.int64
    assert intervals.shape == (len(intervals), 2)
    flat = intervals.ravel()
    assert (np.diff(flat) > 0).all(), "sorted, disjoint, not even touching"
    return points([(begin, end) for begin, end in intervals.tolist()])


@given(PAIRS)
def test_a_union_covers_what_any_interval_covers(pairs: Pairs) -> None:
    covered = union(pairs)
    assert of(covered) == points(pairs)
    assert length(covered) == len(points(pairs))


@given(PAIRS, PAIRS)
def test_difference_and_intersection_are_those_of_sets(these: Pairs, those: Pairs) -> None:
    one, other = union(these), union(those)
    assert of(subtract(one, other)) == points(these) - points(those)
    assert of(intersect(one, other)) == points(these) & points(those)


@given(PAIRS, PAIRS)
def test_what_is_hidden_and_what_is_exposed_add_up(these: Pairs, those: Pairs) -> None:
    one, other = union(these), union(those)
    assert length(subtract(one, other)) + length(intersect(one, other)) == length(one)
