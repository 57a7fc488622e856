"""The Python clients against a real server, and against servers that are not there or not well."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightmoe.client import AsyncClient, Client
from lightmoe.errors import (
    LightMoEError,
    MachineError,
    QueueFullError,
    RankError,
    RequestError,
    RequestTooLargeError,
    ShuttingDownError,
    UnknownModelError,
)
from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import ANSWER, FakeEngine, new_engine, running_server, write_tokenizer

KEY = "secret"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Iterator[FakeEngine]:
    engine = new_engine(tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def url(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[str]:
    with running_server(engine, tokenizer, api_keys=[KEY]) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, api_key=KEY, timeout=20) as client:
        yield client


def with_async_client(url: str, use: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with AsyncClient(url, api_key=KEY, timeout=20) as client:
            return await use(client)

    return asyncio.run(run())


async def gather_texts(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


def test_complete(client: Client, engine: FakeEngine) -> None:
    answer = client.complete("hello", max_tokens=60, temperature=0, seed=5)
    assert answer.text == ANSWER
    assert answer.finish_reason == "stop"
    assert answer.num_prompt_tokens == len(engine.submitted[0].prompt_token_ids)
    assert answer.num_completion_tokens == len(engine.answer) + 1
    assert answer.raw["object"] == "text_completion"
    assert engine.submitted[0].params.seed == 5
    assert client.complete([2, 3], max_tokens=2).finish_reason == "length"
    assert engine.submitted[1].prompt_token_ids == (2, 3)


def test_chat(client: Client, engine: FakeEngine) -> None:
    assert client.chat("hello").text == client.chat(HELLO).text == ANSWER
    first, second = engine.submitted
    assert first.prompt_token_ids == second.prompt_token_ids


@pytest.mark.parametrize("prompt", ["hello", [2, 3], HELLO])
def test_stream(client: Client, url: str, prompt: Any) -> None:
    pieces = list(client.stream(prompt, max_tokens=60))
    assert len(pieces) > 5
    assert "".join(pieces) == ANSWER
    assert all(pieces)

    async def stream(client: AsyncClient) -> list[str]:
        return await gather_texts(client.stream(prompt, max_tokens=60))

    assert with_async_client(url, stream) == pieces


def test_a_stream_of_several_choices_gives_the_first(client: Client) -> None:
    assert "".join(client.stream("hello", max_tokens=60, n=3)) == ANSWER


def test_leaving_a_stream_ends_the_request(client: Client, engine: FakeEngine) -> None:
    engine.hold_after = 2
    stream = client.stream("hello", max_tokens=60)
    next(stream)
    assert engine.num_running == 1
    stream.close()  # type: ignore[attr-defined]
    for _ in range(500):
        if engine.num_running == 0:
            return
        threading.Event().wait(0.01)
    pytest.fail("the request still runs")


def test_the_rest(client: Client) -> None:
    assert client.health() == {"status": "ok"}
    assert client.models()[0]["id"] == "tiny"
    assert client.expert_load()["expert_tokens"] == [[4, 0, 2], [3, 3, 0]]


def test_the_same_awaited(url: str, engine: FakeEngine) -> None:
    async def use(client: AsyncClient) -> None:
        answers = await asyncio.gather(
            client.complete("hello", max_tokens=60), client.chat("hello"), client.chat(HELLO)
        )
        assert [answer.text for answer in answers] == [ANSWER] * 3
        assert await client.health() == {"status": "ok"}
        assert (await client.models())[0]["id"] == "tiny"
        assert (await client.expert_load())["num_ranks"] == 2
        with pytest.raises(UnknownModelError, match="nobody"):
            await client.complete("hello", model="nobody")
        engine.failure = RankError("rank 3 died")
        with pytest.raises(RankError, match="rank 3"):
            await gather_texts(client.stream("hello"))

    with_async_client(url, use)


def test_refusals_are_our_own_errors(client: Client, engine: FakeEngine) -> None:
    with pytest.raises(RequestError, match="temperature") as bad:
        client.complete("hello", temperature=7)
    assert bad.value.param == "temperature"
    with pytest.raises(UnknownModelError, match="nobody"):
        client.complete("hello", model="nobody")
    with pytest.raises(UnknownModelError):
        list(client.stream("hello", model="nobody"))
    with pytest.raises(RequestTooLargeError, match="4 MiB"):
        client.complete("x" * 5_000_000)
    for error in (QueueFullError("256 wait"), ShuttingDownError("stopping")):
        engine.refusal = error
        with pytest.raises(type(error), match=str(error)):
            client.complete("hello")


@pytest.mark.parametrize("fail_after", [0, 3])
def test_an_error_in_a_stream_is_raised(
    client: Client, engine: FakeEngine, fail_after: int
) -> None:
    engine.failure, engine.fail_after = RankError("rank 3 died"), fail_after
    pieces: list[str] = []
    with pytest.raises(RankError, match="rank 3 died"):
        pieces.extend(client.stream("hello"))
    assert bool(pieces) == bool(fail_after)
    with pytest.raises(RankError):
        client.complete("hello")


def test_a_wrong_key(url: str) -> None:
    for key in (None, "wrong"):
        with Client(url, api_key=key) as client:
            assert client.health() == {"status": "ok"}
            with pytest.raises(RequestError, match="key"):
                client.models()


def test_an_unwell_server(client: Client, engine: FakeEngine) -> None:
    engine.error = RankError("rank 3 died; start the server again")
    assert client.health()["status"] == "unavailable"
    with pytest.raises(RankError, match="rank 3"):
        client.complete("hello")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        for call in (client.health, client.models, lambda: list(client.stream("hello"))):
            with pytest.raises(MachineError, match="lightmoe launch"):
                call()
    with Client("nonsense") as client, pytest.raises(MachineError):
        client.health()


def answers_with(content: bytes) -> Iterator[str]:
    """A server that sends these bytes to its first client and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TEXT = b'data: {"choices": [{"index": 0, "text": "hi"}]}\n\n'


def test_a_stream_that_breaks_off_is_no_success() -> None:
    for url in answers_with(EVENTS + TEXT):
        with Client(url) as client:
            stream = client.stream("hello")
            assert next(stream) == "hi"
            with pytest.raises(MachineError, match="broke off"):
                next(stream)


def test_comments_and_other_fields_of_a_stream_are_skipped() -> None:
    events = b": ping\n\nevent: x\n" + TEXT + b"data: [DONE]\n\ndata: {}\n\n"
    for url in answers_with(EVENTS + events):
        with Client(url) as client:
            assert list(client.stream("hello")) == ["hi"]


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n[]",
        b'HTTP/1.1 500 X\r\nContent-Length: 16\r\n\r\n{"error": "nope"}',
    ],
)
def test_errors_of_others_on_the_way(content: bytes) -> None:
    for url in answers_with(content):
        with Client(url) as client, pytest.raises(LightMoEError, match="50"):
            client.models()


def test_silence_is_not_waited_out_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Client(url, timeout=0.2) as client, pytest.raises(MachineError, match="timeout="):
            client.models()


def test_importing_the_client_loads_nothing_heavy(checkout: Path) -> None:
    code = (
        "import sys, lightmoe.client;"
        "print([m for m in ('torch', 'ray', 'transformers', 'starlette') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
