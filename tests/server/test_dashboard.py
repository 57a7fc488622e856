"""The routes `/` and `/events`: the page's policy, the feed's snapshots, its limit and its end."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from lightmoe.core import EngineStats, LoadReport, ModelInfo, OutputCallback, RankStats, Request
from lightmoe.errors import LightMoEError, RankError
from lightmoe.server import dashboard
from lightmoe.server.dashboard import HEARTBEAT, MAX_FEEDS, PAGE, dashboard_routes


class FakeEngine:
    """Four ranks, one of them spare; `tick` counts tokens."""

    def __init__(self) -> None:
        self.model = ModelInfo(
            name="mixtral-lite",
            folder="models/mixtral-lite",
            architecture="MixtralForCausalLM",
            num_layers=2,
            num_experts=3,
            vocab_size=4096,
            max_model_len=2048,
            eos_token_ids=(2,),
            generation_defaults={},
            dummy_weights=True,
        )
        self.error: LightMoEError | None = None
        self.num_tokens = 0
        self.num_loads = 0
        self.seconds = 0.0

    def submit(self, request: Request, on_output: OutputCallback) -> None:
        raise AssertionError("the dashboard submits nothing")

    def abort(self, request_id: str) -> None:
        raise AssertionError("the dashboard aborts nothing")

    def load(self) -> LoadReport:
        self.num_loads += 1
        return LoadReport(
            expert_tokens=np.arange(6).reshape(2, 3) * self.num_tokens,
            rank_pairs=np.arange(8).reshape(4, 2) * self.num_tokens,
            rank_kinds=["home", "home", "home", "spare"],
            placement=[[[0], [1], [2, 3]]] * 2,
        )

    def stats(self) -> EngineStats:
        self.seconds += 0.25
        return EngineStats(
            num_steps=self.num_tokens,
            num_running=0,
            num_waiting=0,
            num_prompt_tokens=0,
            num_generated_tokens=self.num_tokens,
            num_finished=0,
            num_preemptions=0,
            uptime_seconds=self.seconds,
            last_step_seconds=0.01,
            ranks=tuple(
                RankStats(
                    rank=rank,
                    kind="spare" if rank == 3 else "home",
                    num_running=0,
                    num_waiting=0,
                    kv_usage=0.0,
                )
                for rank in range(4)
            ),
        )


class OpenFeed:
    """One client of /events, spoken to in ASGI so that a feed without end can be read and left."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._left = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/events",
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }

        async def receive() -> dict[str, Any]:
            await self._left.wait()
            return {"type": "http.disconnect"}

        await self._app(scope, receive, self._sent.put)  # type: ignore[arg-type]

    async def start(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._sent.get(), 10)

    async def text(self) -> str:
        message = await asyncio.wait_for(self._sent.get(), 10)
        return message["body"].decode()

    async def snapshot(self) -> dict[str, Any]:
        text = await self.text()
        assert text.startswith("data: ")
        assert text.endswith("\n\n")
        return json.loads(text.removeprefix("data: "))

    async def leave(self) -> None:
        self._left.set()
        await asyncio.wait_for(self.task, 10)


@asynccontextmanager
async def open_feed(app: Starlette) -> AsyncIterator[OpenFeed]:
    feed = OpenFeed(app)
    start = await feed.start()
    assert start["status"] == 200
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    try:
        yield feed
    finally:
        await feed.leave()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks of 1 ms; the heartbeat keeps its number of ticks."""
    monkeypatch.setattr(dashboard, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(dashboard, "HEARTBEAT_SECONDS", 0.008)


def make_app(engine: FakeEngine, **options: Any) -> Starlette:
    return Starlette(routes=dashboard_routes(engine, has_tokenizer=False, **options))


def test_page_policy_allows_its_own_style_and_script_only() -> None:
    response = TestClient(make_app(FakeEngine())).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        directive.split(" ", 1)
        for directive in response.headers["content-security-policy"].split("; ")
    )
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_page_has_no_way_to_run_what_it_shows_and_no_outside_source() -> None:
    html = PAGE.read_text(encoding="utf-8")
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "https://",
        "@import",
        " style=",
        " onclick=",
        " onload=",
        '<link rel="stylesheet',
    ):
        assert forbidden not in html
    urls = set(re.findall(r"http://[^'\"\s]+", html))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of SVG, not a request


def test_a_head_request_of_the_feed_ends() -> None:
    response = TestClient(make_app(FakeEngine())).head("/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


def test_snapshots_add_up_to_the_engine_s_totals() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.num_tokens = 2
        async with open_feed(make_app(engine)) as feed:
            first = await feed.snapshot()
            assert first["model"] == "mixtral-lite"
            assert first["dummy_weights"] is True
            assert first["has_tokenizer"] is False
            assert first["placement"] == [[[0], [1], [2, 3]]] * 2
            tokens = np.array(first["expert_tokens_total"])
            pairs = np.array([rank["pairs_total"] for rank in first["ranks"]])
            for num_tokens in (3, 10, 40):
                engine.num_tokens = num_tokens
                while tokens[1, 2] < 5 * num_tokens:
                    snapshot = await feed.snapshot()
                    tokens += np.array(snapshot["expert_tokens_recent"])
                    pairs += np.array([rank["pairs_recent"] for rank in snapshot["ranks"]])
                report = engine.load()
                assert (tokens == report.expert_tokens).all()
                assert (pairs == report.rank_pairs.sum(axis=1)).all()

    asyncio.run(scenario())


def test_an_idle_engine_is_asked_little_and_only_heartbeats_are_sent() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with open_feed(make_app(engine)) as feed:
            await feed.snapshot()
            assert [await feed.text() for _ in range(3)] == [HEARTBEAT] * 3
            assert engine.num_loads == 1
            engine.num_tokens = 1
            snapshot = await feed.snapshot()
            assert snapshot["num_generated_tokens"] == 1

    asyncio.run(scenario())


def test_every_client_has_its_own_deltas() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        app = make_app(engine)
        async with open_feed(app) as early:
            await early.snapshot()
            engine.num_tokens = 5
            async with open_feed(app) as late:
                assert (await late.snapshot())["expert_tokens_total"][1][2] == 25
                recent = (await early.snapshot())["expert_tokens_recent"]
                assert recent[1][2] == 25

    asyncio.run(scenario())


def test_feeds_are_limited_and_a_place_is_free_again_when_a_client_goes() -> None:
    async def scenario() -> None:
        app = make_app(FakeEngine())
        feeds = [OpenFeed(app) for _ in range(MAX_FEEDS)]
        assert [(await feed.start())["status"] for feed in feeds] == [200] * MAX_FEEDS

        refused = OpenFeed(app)
        assert (await refused.start())["status"] == 503
        error = json.loads(await refused.text())["error"]
        assert error["code"] == "too_many_feeds"
        assert str(MAX_FEEDS) in error["message"]
        await refused.task

        await feeds.pop().leave()
        async with open_feed(app) as feed:
            await feed.snapshot()
        for feed in feeds:
            await feed.leave()

    asyncio.run(scenario())


def test_feeds_end_when_the_server_stops() -> None:
    async def scenario() -> None:
        stopping: list[bool] = []
        feed = OpenFeed(make_app(FakeEngine(), is_stopping=lambda: bool(stopping)))
        await feed.start()
        await feed.snapshot()
        stopping.append(True)
        await asyncio.wait_for(feed.task, 10)

    asyncio.run(scenario())


def test_a_dead_engine_is_said_and_ends_the_feed() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        feed = OpenFeed(make_app(engine))
        await feed.start()
        await feed.snapshot()
        engine.error = RankError("rank 3 stopped answering after 5 s; restart the server")
        texts = []
        while not texts or "error" not in texts[-1]:
            texts.append(await feed.text())
        assert "rank 3 stopped answering" in json.loads(texts[-1][6:])["error"]["message"]
        await asyncio.wait_for(feed.task, 10)

    asyncio.run(scenario())
