"""The balancer over HTTP: the route's switch, what /health, /metrics and the load say of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngine, new_balance, new_client
from tests.server.test_http_bytes import check_error
from tests.server.test_server_metrics import samples

PATH = "/v1/experts/route"


@pytest.fixture
def guarded(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with new_client(engine, tokenizer, api_keys=["key"]) as client:
        yield client


@pytest.mark.parametrize("route", ["none", "even", "waterfill"])
def test_the_route_is_switched_and_shown(http: TestClient, engine: FakeEngine, route: str) -> None:
    answer = http.post(PATH, json={"route": route})

    assert (answer.status_code, answer.json()) == (200, {"route": route})
    assert engine.route == route
    assert http.get("/v1/experts/load").json()["route"] == route


@pytest.mark.parametrize("body", [{}, {"route": "lp"}, {"route": 1}, {"route": ["even"]}, []])
def test_what_is_no_route_is_refused(http: TestClient, engine: FakeEngine, body: object) -> None:
    answer = http.post(PATH, json=body)

    check_error(answer, 400)
    assert engine.route == "waterfill"


def test_the_switch_needs_the_key_and_post(guarded: TestClient, engine: FakeEngine) -> None:
    check_error(guarded.post(PATH, json={"route": "none"}), 401)
    assert engine.route == "waterfill"
    headers = {"Authorization": "Bearer key"}
    assert guarded.post(PATH, json={"route": "none"}, headers=headers).status_code == 200
    assert engine.route == "none"
    check_error(guarded.get(PATH, headers=headers), 405)


def test_another_page_cannot_switch_it(http: TestClient, engine: FakeEngine) -> None:
    answer = http.post(PATH, json={"route": "none"}, headers={"Origin": "http://evil.example"})

    check_error(answer, 403)
    assert engine.route == "waterfill"


def test_a_dead_balancer_is_told_and_serving_goes_on(http: TestClient, engine: FakeEngine) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    engine.balance_report = new_balance()
    assert http.get("/health").json() == {"status": "ok", "balancer": "ok"}
    engine.balance_report = new_balance(error="MemoryError: killed")
    answer = http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "balancer": "dead: MemoryError: killed"}


def test_metrics_of_the_balancer(http: TestClient, engine: FakeEngine) -> None:
    assert ("lightmoe_balancer_up", None) not in samples(http)
    engine.balance_report = new_balance()
    found = samples(http)
    assert found["lightmoe_migrations_total", None] == 1
    assert found["lightmoe_migrated_experts_total", None] == 3
    assert found["lightmoe_migrated_bytes_total", None] == 3000
    assert found["lightmoe_migration_wait_seconds_total", None] == 0.25
    assert found["lightmoe_balancer_heartbeat_age_seconds", None] == 0.5
    assert found["lightmoe_balancer_up", None] == 1
    assert found["lightmoe_placement_epoch", None] == 1
    engine.balance_report = new_balance(error="died")
    assert samples(http)["lightmoe_balancer_up", None] == 0


def test_the_load_report_says_what_was_moved(http: TestClient, engine: FakeEngine) -> None:
    assert http.get("/v1/experts/load").json()["balance"] is None
    engine.balance_report = new_balance()
    balance = http.get("/v1/experts/load").json()["balance"]
    assert balance["num_migrations"] == 1
    assert balance["events"] == [[1, "event 0"], [1, "event 1"]]
