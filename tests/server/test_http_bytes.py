"""Bodies and headers that no client should send: one clear error each, and the server goes on."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.testclient import TestClient

from lightmoe.server.body import MAX_BODY_BYTES
from tests.server.fakes import FakeEngine

ROUTES = ["/v1/completions", "/v1/chat/completions"]
JSON = {"Content-Type": "application/json"}
LONG = 2000

BAD_BODIES = {
    "truncated": b'{"prompt": "hel',
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "text": b'"hello"',
    "no json": b"prompt=hello",
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "hello"}',
    "deep arrays": b"[" * 100_000,
    "deep prompt": b'{"prompt": ' + b"[" * 100_000,
    "deep unknown field": b'{"prompt": "hello", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    "long integer": b'{"prompt": "hello", "max_tokens": ' + b"9" * 5000 + b"}",
    "long integer in an unknown field": b'{"prompt": "hello", "x": ' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate in a message": b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
    "trailing text": b'{"prompt": "hello"} x',
    "not a number": b'{"prompt": "hello", "x": NaN}',
    "single quotes": b"{'prompt': 'hello'}",
    "nothing": b"\x00" * 64,
}


def check_error(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < LONG
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_bodies(http: TestClient, engine: FakeEngine, route: str, body: bytes) -> None:
    start = time.perf_counter()
    error = check_error(http.post(route, content=body, headers=JSON), 400)
    assert time.perf_counter() - start < 2
    assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


def test_the_last_of_duplicate_keys_counts(http: TestClient, engine: FakeEngine) -> None:
    body = b'{"prompt": "hello", "max_tokens": 3, "max_tokens": 4}'
    assert http.post(ROUTES[0], content=body, headers=JSON).status_code == 200
    assert engine.submitted[0].params.max_tokens == 4


def test_a_nul_in_the_prompt_is_text(http: TestClient) -> None:
    assert http.post(ROUTES[0], json={"prompt": "a\x00b"}).status_code == 200


def test_a_body_over_the_limit(http: TestClient) -> None:
    fits = b'{"prompt": [], "x": "' + b"x" * (MAX_BODY_BYTES - 23) + b'"}'
    assert len(fits) == MAX_BODY_BYTES
    check_error(http.post(ROUTES[0], content=fits, headers=JSON), 400)
    error = check_error(http.post(ROUTES[0], content=fits + b" ", headers=JSON), 413)
    assert error["code"] == "request_too_large"


def test_a_chunked_body_over_the_limit(http: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * 2**20

    check_error(http.post(ROUTES[0], content=chunks(), headers=JSON), 413)


@pytest.mark.parametrize("length", ["9" * 30, "5000000"])
def test_a_declared_length_over_the_limit_is_refused_unread(http: TestClient, length: str) -> None:
    headers = JSON | {"Content-Length": length}
    check_error(http.post(ROUTES[0], content=b"{}", headers=headers), 413)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_other_kinds_of_content(http: TestClient, kind: str) -> None:
    headers = {"Content-Type": kind}
    error = check_error(http.post(ROUTES[0], content=b'{"prompt": "x"}', headers=headers), 415)
    assert "application/json" in str(error["message"])


def test_a_charset_is_no_other_kind(http: TestClient) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = b'{"prompt": "hello"}'
    assert http.post(ROUTES[0], content=body, headers=headers).status_code == 200


def test_compressed_bodies_are_not_unpacked(http: TestClient) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    headers = JSON | {"Content-Encoding": "gzip"}
    check_error(http.post(ROUTES[0], content=bomb, headers=headers), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("GET", "/v1/embeddings", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("GET", "/" + "x" * 5000, 404),
        ("GET", "/v1/models/" + "x" * 5000, 404),
        ("GET", "/static/..%2f..%2fapp.py", 404),
    ],
)
def test_routes_and_methods(http: TestClient, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    check_error(response, status)
    if status == 405:
        assert response.headers["allow"]


def test_a_large_error_is_cut(http: TestClient) -> None:
    for body in (
        {"prompt": "x", "model": "m" * 100_000},
        {"prompt": ["x"] * 63 + [{"a": "b" * 100_000}]},
        {"prompt": [["a"] * 1000] * 64},
        {"prompt": "x", "stop": "s" * 100_000},
        {"prompt": "x", "temperature": "t" * 100_000},
        {"prompt": "x", "n" * 1000: 1, "max_tokens": []},
    ):
        response = http.post(ROUTES[0], json=body)
        check_error(response, 404 if "model" in body else 400)


def test_a_million_wrong_items_do_not_take_long(http: TestClient) -> None:
    body = b'{"prompt": [1' + b',"a"' * 900_000 + b"]}"
    start = time.perf_counter()
    check_error(http.post(ROUTES[0], content=body, headers=JSON), 400)
    assert time.perf_counter() - start < 5
