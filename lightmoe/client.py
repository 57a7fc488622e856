"""Python clients of a running server: `Client`, and `AsyncClient` with the same methods to await.

They know HTTP only. What is sent and what comes back is worked out by plain functions that both
share; the classes differ in how they wait.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import httpx

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

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""An idle connection is used that long: uvicorn closes it after 5 s, maybe under a new request."""

_REQUEST_ERRORS = {
    error.code: error
    for error in (UnknownModelError, RequestTooLargeError, QueueFullError, ShuttingDownError)
}
_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. With `n` above 1 it is the first; `raw["choices"]` has all of them.

    `finish_reason` is "stop" (the model or a stop string ended it) or "length".
    """

    text: str
    finish_reason: str | None
    num_prompt_tokens: int
    num_completion_tokens: int
    raw: dict[str, Any]


class Client:
    """Talks to a server and waits for its answers.

    Sampling fields (`max_tokens=64, temperature=0, stop=["\\n"], seed=1, ...`) are passed on as
    they are. What the server refuses is raised as the error of `lightmoe.errors` that it stands
    for; a server that cannot be reached as MachineError. `timeout` (seconds) is the longest
    silence that is waited out.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(**_http_options(self._url, api_key, timeout))

    def complete(self, prompt: Prompt, **sampling: Any) -> Completion:
        """Continues a text, or token ids."""
        return _completion(self._post(_COMPLETIONS, _completion_body(prompt, sampling)))

    def chat(self, messages: str | Messages, **sampling: Any) -> Completion:
        """Answers a conversation; a plain text is one message from the user."""
        return _completion(self._post(_CHAT, _chat_body(messages, sampling)))

    def stream(self, prompt: Prompt | Messages, **sampling: Any) -> Iterator[str]:
        """Yields the first answer's text as it comes; a list of messages is answered as a chat."""
        with closing(self.chunks(prompt, **sampling)) as chunks:
            for chunk in chunks:
                if text := _text_in(chunk):
                    yield text

    def chunks(
        self, prompt: Prompt | Messages, **sampling: Any
    ) -> Generator[dict[str, Any], None, None]:
        """Yields the stream's chunks as the server words them: OpenAI's JSON with `choices`."""
        path, body = _stream_request(prompt, sampling)
        with (
            _transport_errors(self._url),
            self._http.stream("POST", path, json=body) as response,
        ):
            if response.is_error:
                raise _error(response.status_code, response.read())
            reader = _EventReader()
            for line in response.iter_lines():
                if (chunk := reader.read(line)) is not None:
                    yield chunk
            reader.finish()

    def expert_load(self) -> dict[str, Any]:
        """Expert load since the server's start: tokens [layers][experts], pairs [ranks][layers]."""
        return self._get("/v1/experts/load")

    def health(self) -> dict[str, Any]:
        """`{"status": "ok"}`, or another status with its `reason`."""
        with _transport_errors(self._url):
            return _health(self._http.get("/health"))

    def models(self) -> list[dict[str, Any]]:
        """The served models; `id` is the name for `model=`."""
        return list(self._get("/v1/models")["data"])

    def _get(self, path: str) -> dict[str, Any]:
        with _transport_errors(self._url):
            return _content(self._http.get(path))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _transport_errors(self._url):
            return _content(self._http.post(path, json=body))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited; `stream` is an async iterator."""

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.AsyncClient(**_http_options(self._url, api_key, timeout))

    async def complete(self, prompt: Prompt, **sampling: Any) -> Completion:
        """Continues a text, or token ids."""
        return _completion(await self._post(_COMPLETIONS, _completion_body(prompt, sampling)))

    async def chat(self, messages: str | Messages, **sampling: Any) -> Completion:
        """Answers a conversation; a plain text is one message from the user."""
        return _completion(await self._post(_CHAT, _chat_body(messages, sampling)))

    async def stream(self, prompt: Prompt | Messages, **sampling: Any) -> AsyncIterator[str]:
        """Yields the first answer's text as it comes; a list of messages is answered as a chat."""
        async with aclosing(self.chunks(prompt, **sampling)) as chunks:
            async for chunk in chunks:
                if text := _text_in(chunk):
                    yield text

    async def chunks(
        self, prompt: Prompt | Messages, **sampling: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the stream's chunks as the server words them: OpenAI's JSON with `choices`."""
        path, body = _stream_request(prompt, sampling)
        with _transport_errors(self._url):
            async with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    raise _error(response.status_code, await response.aread())
                reader = _EventReader()
                async for line in response.aiter_lines():
                    if (chunk := reader.read(line)) is not None:
                        yield chunk
                reader.finish()

    async def expert_load(self) -> dict[str, Any]:
        """Expert load since the server's start: tokens [layers][experts], pairs [ranks][layers]."""
        return await self._get("/v1/experts/load")

    async def health(self) -> dict[str, Any]:
        """`{"status": "ok"}`, or another status with its `reason`."""
        with _transport_errors(self._url):
            return _health(await self._http.get("/health"))

    async def models(self) -> list[dict[str, Any]]:
        """The served models; `id` is the name for `model=`."""
        return list((await self._get("/v1/models"))["data"])

    async def _get(self, path: str) -> dict[str, Any]:
        with _transport_errors(self._url):
            return _content(await self._http.get(path))

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with _transport_errors(self._url):
            return _content(await self._http.post(path, json=body))

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _http_options(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        # How many answers run at once is the server's to limit.
        "limits": httpx.Limits(
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=IDLE_SECONDS,
        ),
        # A proxy from the environment would be asked for 127.0.0.1, too.
        "trust_env": False,
    }


def _completion_body(prompt: Prompt, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt if isinstance(prompt, str) else list(prompt), **sampling}


def _chat_body(messages: str | Messages, sampling: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"messages": [dict(message) for message in messages], **sampling}


def _stream_request(
    prompt: Prompt | Messages, sampling: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    if not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
        return _CHAT, {**_chat_body(cast(Messages, prompt), sampling), "stream": True}
    return _COMPLETIONS, {**_completion_body(cast(Prompt, prompt), sampling), "stream": True}


def _completion(raw: dict[str, Any]) -> Completion:
    choice, usage = raw["choices"][0], raw["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return Completion(
        text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"], raw
    )


def _content(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise _error(response.status_code, response.content)
    content = response.json()
    assert isinstance(content, dict)
    return content


def _health(response: httpx.Response) -> dict[str, Any]:
    """A server that is up but not well answers 503 with its status: that is no error here."""
    return dict(response.json()) if response.status_code == 503 else _content(response)


def _error(status: int, content: bytes) -> LightMoEError:
    try:
        return _error_of(status, json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        text = content[:200].decode("utf-8", "replace")
        return LightMoEError(f"the server answered {status} and no OpenAI error JSON: {text!r}")


def _error_of(status: int, error: Mapping[str, Any]) -> LightMoEError:
    message, param, code = error["message"], error.get("param"), error.get("code")
    if code in _REQUEST_ERRORS:
        return _REQUEST_ERRORS[code](message, param)
    if code == "rank_lost":
        return RankError(message)
    return RequestError(message, param) if 400 <= status < 500 else LightMoEError(message)


class _EventReader:
    """Reads the lines of an event stream; an error in it is raised, and so is its breaking off."""

    def __init__(self) -> None:
        self._is_done = False

    def read(self, line: str) -> dict[str, Any] | None:
        """The chunk in a line; None where there is none."""
        name, _, value = line.partition(":")
        value = value.strip()
        if name != "data" or self._is_done:
            return None
        if value == "[DONE]":
            self._is_done = True
            return None
        content: dict[str, Any] = json.loads(value)
        if "error" in content:
            raise _error_of(500, content["error"])
        return content

    def finish(self) -> None:
        """To be called when there are no more lines."""
        if not self._is_done:
            raise MachineError("the stream broke off before its end; is the server still running?")


def _text_in(chunk: Mapping[str, Any]) -> str:
    """The first answer's text in a chunk, often ""."""
    return "".join(_text_of(choice) for choice in chunk["choices"] if choice["index"] == 0)


def _text_of(choice: Mapping[str, Any]) -> str:
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return text or ""


@contextmanager
def _transport_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise MachineError(f"no answer from {url} in time; give a longer timeout=") from error
    except httpx.ConnectError as error:
        raise MachineError(
            f"nothing answers at {url} ({error}); is `lightmoe launch` running?"
        ) from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        what = str(error) or type(error).__name__
        raise MachineError(f"the connection to {url} failed: {what}") from error
