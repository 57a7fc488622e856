"""Keys, hosts and origins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from lightmoe.server.app import allowed_hosts_for
from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngine, new_client
from tests.server.test_http_bytes import check_error

KEYS = ["first-key", "schlüssel"]


@pytest.fixture
def guarded(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with new_client(engine, tokenizer, api_keys=KEYS) as client:
        yield client


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_open_paths(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


GUARDED = ["/v1/models", "/v1/experts/load", "/metrics", "/version", "/openapi.json", "/events"]
TRICKS = ["//v1/models", "//health", "/health/", "/health/../v1/models", "/HEALTH", "/v1/unknown"]


@pytest.mark.parametrize("path", [*GUARDED, *TRICKS, "/v1/..%2fhealth", "/v1/models;/health"])
def test_guarded_paths(guarded: TestClient, path: str) -> None:
    response = guarded.get(f"http://127.0.0.1:8000{path}")
    assert check_error(response, 401)["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guarded_posts(guarded: TestClient, engine: FakeEngine, path: str) -> None:
    check_error(guarded.post(path, json={"prompt": "hello"}), 401)
    assert engine.submitted == []


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_any_of_the_keys_opens(guarded: TestClient, key: str, scheme: str) -> None:
    # Header values are Latin-1 for ASGI, and UTF-8 for those who write keys.
    headers = {"Authorization": f"{scheme} {key}".encode()}
    response = guarded.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyy", "Basic first-key", "first-key"],
)
def test_wrong_keys(guarded: TestClient, value: str) -> None:
    check_error(guarded.get("/v1/models", headers={"Authorization": value}), 401)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"]
)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_foreign_hosts(http: TestClient, host: str, path: str) -> None:
    check_error(http.get(path, headers={"Host": host}), 403)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "[::1]"]
)
def test_names_of_the_loopback(http: TestClient, host: str) -> None:
    assert http.get("/health", headers={"Host": host}).status_code == 200


def test_any_host_where_the_bound_address_is_public(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    with new_client(engine, tokenizer, allowed_hosts=allowed_hosts_for("0.0.0.0")) as client:
        assert client.get("/health", headers={"Host": "moe.example"}).status_code == 200


@pytest.mark.parametrize(
    ("bound", "name", "is_allowed"),
    [
        ("127.0.0.1", "localhost", True),
        ("localhost", "127.0.0.1", True),
        ("::1", "::1", True),
        ("127.0.0.2", "127.0.0.2", True),
        ("127.0.0.2", "evil.example", False),
        ("127.0.0.1", "127.0.0.2", False),
        ("192.0.2.7", "*", True),
        ("moe.example", "*", True),
        ("::", "*", True),
    ],
)
def test_allowed_hosts_for(bound: str, name: str, is_allowed: bool) -> None:
    assert (name in allowed_hosts_for(bound)) == is_allowed


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9000", "http://127.0.0.1", ""]
)
def test_foreign_origins(http: TestClient, engine: FakeEngine, origin: str) -> None:
    headers = {"Origin": origin}
    response = http.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    check_error(response, 403)
    assert not any(name.startswith("access-control") for name in response.headers)
    assert engine.submitted == []


def test_the_page_s_own_origin(http: TestClient) -> None:
    headers = {"Origin": "http://127.0.0.1:8000"}
    response = http.post("/v1/completions", json={"prompt": "hello"}, headers=headers)
    assert response.status_code == 200
    assert not any(name.startswith("access-control") for name in response.headers)
