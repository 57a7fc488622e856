"""The arithmetic around the bench of `--overflow`: who lies where, what a step is, what is said."""

from __future__ import annotations

import numpy as np
import pytest
from overflow_accuracy import placement_of, popular_together, row, steps_of, summary

from lightmoe.core import OverflowRule


def test_popular_experts_lie_together() -> None:
    load = np.array([[1, 9, 2, 8, 3], [5, 4, 3, 2, 1]])
    homes = popular_together(load, 2)
    assert homes.tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]
    placement = placement_of(homes, 2)
    assert placement.copies[0] == ((1,), (0,), (1,), (0,), (0,))
    assert [placement.num_slots(rank) for rank in range(2)] == [6, 4]


def test_a_window_is_run_but_for_its_last_token() -> None:
    assert list(steps_of([1, 2, 3, 4, 5], 3)) == [(0, [1, 2, 3]), (3, [4])]


def test_rows_compare_with_what_the_gates_asked_for() -> None:
    """Two ranks, two steps of 4 and 2 pairs a rank, one layer; the second rank dropped some."""
    everyone = np.array([[10.0, 0, 6, 2], [6.0, 3, 1, 0]])
    found = summary(everyone, np.array([4, 2])) | {"left_pairs": 0, "num_positions": 16}
    assert (found["chosen_pairs"], found["computed_pairs"], found["moved_pairs"]) == (12, 9, 3)
    assert found["max_over_mean"] == (6 / 4 + 2 / 2) / 2
    assert found["max_over_mean_worst"] == 1.5

    first = row("natural", 4, None, found, [])
    second = row("natural", 4, OverflowRule("drop", 1.1), found | {"nats": 32.0}, [first])

    assert first["perplexity"] == pytest.approx(np.e)
    assert (first["overflow"], first["perplexity_change"]) == ("none", 0.0)
    assert second["perplexity_change"] == pytest.approx(np.e - 1)
    assert second["moved_share"] == 0.25
