"""The page at `/` and the feed that keeps it alive at `/events`.

The page is one static file; its Content-Security-Policy names the hashes of its own style and
script, so nothing else can run in it, whatever a model writes.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightmoe.server.errors import error_answer, error_body
from lightmoe.server.protocol import ServingEngine
from lightmoe.server.sse import event
from lightmoe.telemetry.dashboard import SnapshotFeed

MAX_FEEDS = 32
TICK_SECONDS = 0.25
HEARTBEAT_SECONDS = 2.0
HEARTBEAT = ": idle\n\n"

PAGE = Path(__file__).with_name("static") / "index.html"


def dashboard_routes(
    engine: ServingEngine,
    *,
    has_tokenizer: bool,
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[Route]:
    """The routes `/` (the page) and `/events` (its feed, server-sent events).

    Open feeds end within a tick once `is_stopping()` is true, so that a server that waits for its
    connections before it stops does not wait for pages.
    """
    page = PAGE.read_bytes()
    headers = _page_headers(page.decode("utf-8"))
    feeds = _Feeds(engine, has_tokenizer, is_stopping)

    async def show_page(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return [Route("/", show_page), Route("/events", feeds.open)]


def _page_headers(html: str) -> dict[str, str]:
    """No source of anything but the page's own inline style and script, and this server's data."""
    policy = (
        "default-src 'none'; "
        f"style-src {_inline_hashes(html, 'style')}; "
        f"script-src {_inline_hashes(html, 'script')}; "
        "connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _inline_hashes(html: str, tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = (b64encode(sha256(text.encode("utf-8")).digest()).decode("ascii") for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


class _Feeds:
    """The open feeds of one server: at most MAX_FEEDS, each with a memory of what it has sent."""

    def __init__(
        self, engine: ServingEngine, has_tokenizer: bool, is_stopping: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._has_tokenizer = has_tokenizer
        self._is_stopping = is_stopping
        self._num_open = 0

    async def open(self, request: Request) -> Response:
        """Answers `/events`: a feed, or 503 with the remedy when too many pages are open."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._num_open >= MAX_FEEDS:
            return _too_many_feeds()
        self._num_open += 1
        return _FeedResponse(self._events(), on_end=self._close)

    def _close(self) -> None:
        self._num_open -= 1

    async def _events(self) -> AsyncIterator[str]:
        feed = SnapshotFeed(self._engine.model, has_tokenizer=self._has_tokenizer)
        silent_seconds = 0.0
        while not self._is_stopping():
            if self._engine.error is not None:
                yield event(error_answer(self._engine.error)[1])
                return
            stats = self._engine.stats()
            if feed.has_news(stats):
                yield event(feed.snapshot(self._engine.load(), stats))
                silent_seconds = 0.0
            elif silent_seconds >= HEARTBEAT_SECONDS:
                yield HEARTBEAT
                silent_seconds = 0.0
            await asyncio.sleep(TICK_SECONDS)
            silent_seconds += TICK_SECONDS


class _FeedResponse(StreamingResponse):
    """An event stream that says when it ended, also when the client left before its first event."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _too_many_feeds() -> JSONResponse:
    message = f"{MAX_FEEDS} pages are open already; close one"
    body = error_body(503, message, None, "too_many_feeds")
    return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})
