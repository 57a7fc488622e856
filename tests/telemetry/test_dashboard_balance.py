"""What the page is told of the balancer: every event once, to every page."""

from __future__ import annotations

from lightmoe.telemetry.dashboard import SnapshotFeed
from tests.server.fakes import new_balance
from tests.telemetry.test_dashboard_feed import MODEL, make_load, make_stats


def texts(feed: SnapshotFeed, num_events: int) -> list[str]:
    load = make_load()
    load.balance = new_balance(num_events=num_events)
    balance = feed.snapshot(load, make_stats(1.0))["balance"]
    assert isinstance(balance, dict)
    return [text for _, text in balance["events"]]


def test_every_event_is_told_once() -> None:
    feed = SnapshotFeed(MODEL, has_tokenizer=True)
    assert texts(feed, 2) == ["event 0", "event 1"]
    assert texts(feed, 2) == []
    assert texts(feed, 5) == ["event 2", "event 3", "event 4"]
    assert texts(SnapshotFeed(MODEL, has_tokenizer=True), 5) == [f"event {n}" for n in range(5)]


def test_without_a_balancer_there_is_only_the_route() -> None:
    load = make_load()
    load.route = "even"
    snapshot = SnapshotFeed(MODEL, has_tokenizer=True).snapshot(load, make_stats(1.0))
    assert snapshot["route"] == "even"
    assert "balance" not in snapshot
