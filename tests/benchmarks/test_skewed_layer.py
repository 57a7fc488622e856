"""The bench of a skewed layer on CPU ranks: its loads, its ratios, and that answers are equal."""

from __future__ import annotations

from typing import Any

import bench_skewed_layer
import numpy as np
import pytest
from bench_skewed_layer import Layout
from ep_ranks import run_ranks


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    options = {
        "shapes": ["tiny"],
        "seeds": [0],
        "spares": 1,
        "slots_per_spare": 6,
        "tokens": 64,
        "routing_skew": "zipf:1.0",
        "road": "ipc",
    }
    measured: list[dict[str, Any]] = run_ranks(3, bench_skewed_layer.bench, options)
    return measured


def row_of(rows: list[dict[str, Any]], case: str, route: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["case"], row["route"]) == (case, route)]
    return row


def test_replicas_and_the_route_level_what_the_skew_does(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 9
    alone = row_of(rows, "no replicas", "none")
    spare, even = row_of(rows, "spare", "waterfill"), row_of(rows, "spare", "even")
    assert row_of(rows, "uniform", "none")["max_over_mean"] < 1.2
    assert alone["max_over_mean"] == pytest.approx(alone["optimum"])
    assert alone["max_over_mean"] >= 1.5, "two of three ranks have all of it"
    assert spare["optimum"] <= spare["max_over_mean"] < 1.2
    assert spare["max_over_mean"] <= even["max_over_mean"] < alone["max_over_mean"]
    assert row_of(rows, "spare", "none")["max_over_mean"] >= 1.5
    assert row_of(rows, "spread", "waterfill")["max_over_mean"] < 1.2


def test_answers_are_those_without_replicas(rows: list[dict[str, Any]]) -> None:
    equal = {(row["case"], row["route"]): row["equal"] for row in rows}
    uniform = [equal.pop(("uniform", "none")), equal.pop(("uniform, homes", "none"))]
    assert uniform == [None, None], "another routing, other answers"
    assert set(equal.values()) == {True}


def test_ratios_are_of_tokens_per_second(rows: list[dict[str, Any]]) -> None:
    uniform, alone = row_of(rows, "uniform", "none"), row_of(rows, "no replicas", "none")
    spare = row_of(rows, "spare", "waterfill")
    assert uniform["over_uniform"] == 1
    assert uniform["over_no_replicas"] is None
    assert spare["tokens_per_second"] == pytest.approx(3 * 64 * 1e3 / spare["layer_ms"]["median"])
    assert spare["over_no_replicas"] == pytest.approx(
        spare["tokens_per_second"] / alone["tokens_per_second"]
    )
    assert spare["predicted"] == pytest.approx(alone["max_over_mean"] / spare["optimum"])


def test_contiguous_homes_leave_the_spares_empty() -> None:
    placement = Layout(128, 8, 2, 32).contiguous(6)

    held = placement.slot_table[0] >= 0
    assert (np.diff(placement.homes[0]) >= 0).all()
    assert sorted(held.sum(axis=0).tolist()) == [0, 0, 21, 21, 21, 21, 22, 22]
    assert placement.num_slots(0) == 22 == Layout(128, 8, 2, 1).most_slots(0)
