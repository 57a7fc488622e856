"""Against a real uvicorn: the official client, clients that leave, and bodies that do not end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from lightmoe.errors import QueueFullError, RankError
from tests.server.fakes import ANSWER, FakeEngine, wait_until

MEBIBYTE = 2**20
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def official(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_official_client_completions(official: openai.OpenAI, engine: FakeEngine) -> None:
    answer = official.completions.create(model="tiny", prompt="hello", max_tokens=60, logprobs=1)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(engine.answer) + 1
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == len(engine.answer)

    chunks = list(
        official.completions.create(
            model="tiny",
            prompt="hello",
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert chunks[-1].usage == answer.usage


def test_official_client_chat(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == ANSWER
    chunks = list(
        official.chat.completions.create(  # type: ignore[call-overload]
            model="tiny", messages=HELLO, stream=True, logprobs=True, top_logprobs=1
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_official_client_models_and_errors(official: openai.OpenAI, engine: FakeEngine) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    assert official.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as missing:
        official.completions.create(model="gpt-5", prompt="hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        official.completions.create(model="tiny", prompt="hello", temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    engine.refusal = QueueFullError("full")
    with pytest.raises(openai.RateLimitError):
        official.completions.create(model="tiny", prompt="hello")


def test_official_client_sees_an_error_in_a_stream(
    official: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.failure, engine.fail_after = RankError("rank 3 died"), 3
    stream = official.completions.create(model="tiny", prompt="hello", stream=True)
    with pytest.raises(openai.APIError, match="rank 3 died"):
        list(stream)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 3])
def test_a_client_that_leaves_ends_its_requests(
    url: str, engine: FakeEngine, is_stream: bool, hold_after: int
) -> None:
    engine.hold_after = hold_after
    body = {"prompt": "hello", "n": 2, "stream": is_stream, "ignore_eos": True}
    with _connection(url) as client:
        client.sendall(_post("/v1/completions", json.dumps(body).encode()))
        wait_until(lambda: engine.num_running == 2, "both choices run")
        time.sleep(0.05)
    left = time.monotonic()
    wait_until(lambda: engine.num_running == 0, "both choices are aborted")
    assert time.monotonic() - left < 1
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.submitted)
    engine.hold_after = None
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "hello"}).status_code == 200


def test_many_clients_that_leave_at_once_leave_nothing(url: str, engine: FakeEngine) -> None:
    engine.hold_after = 1
    body = json.dumps({"prompt": "hello", "stream": True}).encode()
    for _ in range(50):
        with _connection(url) as client:
            client.sendall(_post("/v1/completions", body))
    # The last ones may not even have been read yet.
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, "the server answers")
    wait_until(lambda: engine.num_running == 0, "all are aborted")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_64_mebibytes(url: str, is_chunked: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * MEBIBYTE

    content = chunks() if is_chunked else b" " * (64 * MEBIBYTE)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_never_comes_frees_its_place(url: str, engine: FakeEngine) -> None:
    with _connection(url) as client:
        client.sendall(_post("/v1/completions", b'{"prompt": "hel', length=100))
        time.sleep(0.05)
        assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "hello"}).status_code == 200
    assert len(engine.submitted) == 1


def test_a_body_that_comes_too_slowly(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightmoe.server.body.BODY_SECONDS", 0.2)
    with _connection(url) as client:
        client.sendall(_post("/v1/completions", b'{"prompt": "hel', length=100))
        received = b""
        while part := client.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in received
    assert engine.submitted == []


def test_two_requests_on_one_connection_get_their_own_answers(url: str) -> None:
    first = _post("/v1/completions", b'{"prompt": "hello", "max_tokens": 1}')
    with _connection(url) as client:
        client.sendall(
            first + b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while part := client.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200") == 2
    assert received.index(b'"text_completion"') < received.index(b'"version"')


@pytest.mark.parametrize(
    "header", [b"X: " + b"x" * MEBIBYTE, b"X: y\r\n" * 1000 + b"X:" + b"z" * 99_999]
)
def test_large_headers(url: str, header: bytes) -> None:
    with _connection(url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + header)
        received = client.recv(65536)
    assert received.startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{url}/health").status_code == 200


def test_garbage_instead_of_http(url: str) -> None:
    with _connection(url) as client:
        client.sendall(b"\x16\x03\x01\x00\xff" * 20 + b"\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{url}/health").status_code == 200


def _connection(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=10)


def _post(path: str, body: bytes, length: int | None = None) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body
