"""The page in a real browser: headless Chromium against a real server with a fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lightmoe.core import EngineStats, LoadReport, ModelInfo, OutputCallback, RankStats
from lightmoe.core import Request as GenerationRequest
from lightmoe.server.dashboard import dashboard_routes

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TEXT = ["\n", "    if n", " < 2", ":\n", "        return", " n\n", HOSTILE, "    return f(n - 1)"]
WAIT_SECONDS = 20.0


class FakeEngine:
    """Counts as an engine would: every token goes to two experts a layer, some of them hot."""

    def __init__(
        self, *, num_layers: int = 4, num_experts: int = 8, num_homes: int = 8, num_spares: int = 2
    ) -> None:
        self.model = ModelInfo(
            name="mixtral-lite",
            folder="models/mixtral-lite",
            architecture="MixtralForCausalLM",
            num_layers=num_layers,
            num_experts=num_experts,
            vocab_size=4096,
            max_model_len=2048,
            eos_token_ids=(2,),
            generation_defaults={},
        )
        self.error = None
        self.kinds = ["home"] * num_homes + ["spare"] * num_spares
        self.random = np.random.default_rng(7)
        self.skew = self.random.dirichlet(np.full(num_experts, 1.5), size=num_layers)
        self.placement = self._place(num_homes, num_spares)
        self.expert_tokens = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.rank_pairs = np.zeros((num_homes + num_spares, num_layers), dtype=np.int64)
        self.num_generated = self.num_steps = 0
        self.num_running = 0
        self.started = time.monotonic()

    def _place(self, num_homes: int, num_spares: int) -> list[list[list[int]]]:
        num_layers, num_experts = self.skew.shape
        placement = [
            [[expert % num_homes] for expert in range(num_experts)] for _ in range(num_layers)
        ]
        for layer in range(num_layers):
            hottest = np.argsort(-self.skew[layer])[: 2 * num_spares]
            for order, expert in enumerate(hottest):
                placement[layer][expert].append(num_homes + order % num_spares)
        return placement

    def step(self, num_tokens: int) -> None:
        """Routes that many tokens and counts them."""
        self.num_generated += num_tokens
        self.num_steps += 1
        for layer, chances in enumerate(self.skew):
            counts = self.random.multinomial(2 * num_tokens, chances)
            self.expert_tokens[layer] += counts
            for expert, count in enumerate(counts):
                ranks = self.placement[layer][expert]
                shares = self.random.multinomial(count, np.full(len(ranks), 1 / len(ranks)))
                self.rank_pairs[ranks, layer] += shares

    def submit(self, request: GenerationRequest, on_output: OutputCallback) -> None:
        raise AssertionError("the page speaks HTTP only")

    def abort(self, request_id: str) -> None:
        raise AssertionError("the page speaks HTTP only")

    def load(self) -> LoadReport:
        return LoadReport(self.expert_tokens, self.rank_pairs, self.kinds, self.placement)

    def stats(self) -> EngineStats:
        each, rest = divmod(self.num_running, len(self.kinds))
        ranks = tuple(
            RankStats(
                rank=rank,
                kind="spare" if kind == "spare" else "home",
                num_running=each + (rank < rest),
                num_waiting=0,
                kv_usage=min(1.0, 0.07 * (each + (rank < rest))),
            )
            for rank, kind in enumerate(self.kinds)
        )
        return EngineStats(
            num_steps=self.num_steps,
            num_running=self.num_running,
            num_waiting=0,
            num_prompt_tokens=0,
            num_generated_tokens=self.num_generated,
            num_finished=0,
            num_preemptions=0,
            uptime_seconds=time.monotonic() - self.started,
            last_step_seconds=0.03,
            ranks=ranks,
        )


class FakeCompletions:
    """POST /v1/completions as the server streams it, a token of every prompt each step."""

    def __init__(self, engine: FakeEngine, step_seconds: float = 0.03) -> None:
        self.engine = engine
        self.step_seconds = step_seconds
        self.api_key = ""
        self.text = TEXT
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: Request) -> Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "no such API key"}}, status_code=401)
        body = await request.json()
        self.bodies.append(body)
        if body["prompt"] == "refuse me":
            return JSONResponse({"error": {"message": "the prompt is refused"}}, status_code=400)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        num_choices = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
        if isinstance(body["prompt"], list) and isinstance(body["prompt"][0], int):
            num_choices = 1
        self.engine.num_running += num_choices
        try:
            for index in range(body["max_tokens"]):
                self.engine.step(num_choices)
                for choice in range(num_choices):
                    yield _event(self._choice(choice, index, body["max_tokens"]))
                await asyncio.sleep(self.step_seconds)
            if body["prompt"] == "break":
                yield _event({"error": {"message": "rank 3 stopped answering"}})
            yield "data: [DONE]\n\n"
        finally:
            self.engine.num_running -= num_choices

    def _choice(self, choice: int, index: int, max_tokens: int) -> dict[str, Any]:
        text = self.text[(index + choice) % len(self.text)]
        finish = "length" if index == max_tokens - 1 else None
        content = {"index": choice, "text": text, "token_ids": [index], "finish_reason": finish}
        return {"object": "text_completion", "choices": [content]}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def serving(
    engine: FakeEngine, completions: FakeCompletions, *, has_tokenizer: bool = True, port: int = 0
) -> Iterator[int]:
    """A server of the page on a free loopback port; yields the port."""
    is_stopping = threading.Event()
    routes = dashboard_routes(engine, has_tokenizer=has_tokenizer, is_stopping=is_stopping.is_set)
    routes.append(Route("/v1/completions", completions.answer, methods=["POST"]))
    config = uvicorn.Config(
        Starlette(routes=routes), host="127.0.0.1", port=port, log_level="warning"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        is_stopping.set()
        server.should_exit = True
        thread.join(timeout=WAIT_SECONDS)
        assert not thread.is_alive(), "the server did not stop: a feed stayed open"


def _wait(is_true: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _executable(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        remedy = f"{name} is missing; install it (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(remedy)
        pytest.skip(remedy)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless Chromium for all tests here."""
    chromium, chromedriver = _executable("chromium"), _executable("chromedriver")
    from selenium import webdriver

    driver = webdriver.Chrome(
        options=chromium_options(chromium, tmp_path_factory.mktemp("profile")),
        service=webdriver.ChromeService(executable_path=chromedriver),
    )
    yield driver
    driver.quit()


def chromium_options(chromium: str, profile: Path) -> Any:
    """A browser that talks to nobody but the page's server, and keeps its console for the test."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1440,900",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return options


def _text(browser: Any, selector: str) -> str:
    return browser.execute_script(
        "return document.querySelector(arguments[0]).textContent", selector
    )


def _open(browser: Any, port: int) -> None:
    browser.get(f"http://127.0.0.1:{port}/")
    _wait(lambda: _text(browser, "#status") == "connected")


def _generate(browser: Any, prompt: str) -> None:
    field = browser.find_element("id", "prompt")
    field.clear()
    field.send_keys(prompt)
    browser.find_element("id", "generate").click()


def _set(browser: Any, element_id: str, value: object) -> None:
    script = (
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input')); field.dispatchEvent(new Event('change'));"
    )
    browser.execute_script(script, element_id, str(value))


def _pixels(browser: Any, figure: str) -> bytes:
    script = "return document.querySelector(arguments[0] + ' canvas').toDataURL()"
    return browser.execute_script(script, figure).encode()


def _is_done(browser: Any) -> bool:
    return browser.find_element("id", "generate").is_enabled()


def _console(browser: Any, *, but: str = "\0") -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if but not in entry["message"]]


def test_text_streams_and_cells_light_up(browser: Any) -> None:
    engine = FakeEngine()
    completions = FakeCompletions(engine)
    with serving(engine, completions) as port:
        _open(browser, port)
        tiles = browser.find_elements("css selector", ".tile")
        spares = browser.find_elements("css selector", ".tile.spare")
        assert len(tiles) == 10
        assert [tile.get_attribute("data-rank") for tile in spares] == ["8", "9"]
        assert all("spare" in tile.text for tile in spares)
        assert _text(browser, "#model") == "mixtral-lite"
        dark_experts, dark_ranks = _pixels(browser, "#expert-map"), _pixels(browser, "#rank-map")

        _generate(browser, "def f(n):")
        _wait(lambda: "if n < 2" in _text(browser, "#text"))
        _wait(lambda: _pixels(browser, "#expert-map") != dark_experts)
        _wait(lambda: _pixels(browser, "#rank-map") != dark_ranks)
        _wait(lambda: "hottest: layer" in _text(browser, "#hottest"))
        _wait(lambda: float(_text(browser, "#rate")) > 1)
        _wait(lambda: _is_done(browser))

        assert _text(browser, "#output") == "def f(n):" + "".join(
            TEXT[index % len(TEXT)] for index in range(128)
        )
        assert _text(browser, "#tokens") == "128"
        assert _text(browser, "#finish") == "length"
        assert 5 < float(_text(browser, "#speed")) < 40
        assert 0 < float(_text(browser, "#ttft")) < 5000
        assert browser.title == "Light-MoE"
        assert browser.find_elements("css selector", "img") == []
        assert _console(browser) == []
    assert completions.bodies[0]["max_tokens"] == 128
    assert completions.bodies[0]["temperature"] == 0.7


def test_load_since_the_start_is_the_engine_s(browser: Any) -> None:
    engine = FakeEngine()
    engine.step(500)
    with serving(engine, FakeCompletions(engine)) as port:
        _open(browser, port)
        engine.step(300)
        _wait(lambda: _text(browser, "#generated") == "800")
        browser.find_element("id", "show-total").click()
        ratios = engine.expert_tokens / engine.expert_tokens.mean(axis=1, keepdims=True)
        layer, expert = np.unravel_index(ratios.argmax(), ratios.shape)
        hottest = f"hottest: layer {layer} expert {expert}, {ratios.max():.1f}× mean"
        _wait(lambda: hottest in _text(browser, "#hottest"))
        pairs = engine.rank_pairs.sum(axis=1)
        for tile, share in zip(
            browser.find_elements("css selector", ".tile"), pairs / pairs.mean(), strict=True
        ):
            assert f"{share:.2f}×" in tile.text
        assert _console(browser) == []


def test_pointing_at_a_cell_tells_its_load_and_who_holds_it(browser: Any) -> None:
    from selenium.webdriver import ActionChains

    engine = FakeEngine()
    engine.step(400)
    with serving(engine, FakeCompletions(engine)) as port:
        _open(browser, port)
        canvas = browser.find_element("css selector", "#expert-map canvas")
        ActionChains(browser).move_to_element(canvas).perform()
        tip = browser.find_element("id", "tip").text
        layer, expert = (int(part.split()[1]) for part in tip.splitlines()[0].split(", "))
        assert f"{engine.expert_tokens[layer, expert]} tokens since start" in tip
        held = [
            tile.get_attribute("data-rank")
            for tile in browser.find_elements("css selector", ".tile[data-holds]")
        ]
        assert held == [str(rank) for rank in sorted(engine.placement[layer][expert])]


def test_parallel_streams_share_one_request_and_stop_together(browser: Any) -> None:
    engine = FakeEngine()
    completions = FakeCompletions(engine)
    with serving(engine, completions) as port:
        _open(browser, port)
        _set(browser, "num-streams", 32)
        _set(browser, "max-tokens", 100000)
        _generate(browser, "x")
        _wait(lambda: int(_text(browser, "#tokens").replace("–", "0")) > 100)
        assert len(browser.find_elements("css selector", "#streams button")) == 32
        browser.find_elements("css selector", "#streams button")[31].click()
        _wait(lambda: HOSTILE in _text(browser, "#text"))
        _wait(lambda: _text(browser, "#running") == "32")
        browser.find_element("id", "stop").click()
        _wait(lambda: _is_done(browser))
        _wait(lambda: engine.num_running == 0)
        assert not browser.find_element("id", "error").is_displayed()
        assert _console(browser) == []
    assert completions.bodies[0]["prompt"] == ["x"] * 32


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("refuse me", "the prompt is refused"), ("break", "rank 3 stopped answering")],
)
def test_errors_are_shown_in_place(browser: Any, prompt: str, message: str) -> None:
    engine = FakeEngine()
    with serving(engine, FakeCompletions(engine)) as port:
        _open(browser, port)
        _set(browser, "max-tokens", 3)
        _generate(browser, prompt)
        _wait(lambda: _text(browser, "#error") == message)
        _wait(lambda: _is_done(browser))
        assert _console(browser, but="status of 400") == []


def test_dummy_weights_take_token_ids(browser: Any) -> None:
    engine = FakeEngine(num_layers=48, num_experts=128)
    object.__setattr__(engine.model, "dummy_weights", True)
    completions = FakeCompletions(engine)
    with serving(engine, completions, has_tokenizer=False) as port:
        _open(browser, port)
        assert browser.find_element("id", "dummy").text == "dummy weights"
        _set(browser, "max-tokens", 3)
        _generate(browser, "1, two")
        assert '"two"' in _text(browser, "#error")
        _generate(browser, "1, 2, 3")
        _wait(lambda: _text(browser, "#output") == "1, 2, 3, 0, 1, 2")
        assert _console(browser) == []
    assert [body["prompt"] for body in completions.bodies] == [[1, 2, 3]]


def test_an_api_key_is_asked_for_and_sent(browser: Any) -> None:
    engine = FakeEngine()
    completions = FakeCompletions(engine)
    completions.api_key = "open sesame"
    with serving(engine, completions) as port:
        _open(browser, port)
        assert not browser.find_element("id", "key").is_displayed()
        _set(browser, "max-tokens", 3)
        _generate(browser, "x")
        _wait(lambda: browser.find_element("id", "key").is_displayed())
        browser.find_element("id", "key").send_keys("open sesame")
        browser.find_element("id", "generate").click()
        _wait(lambda: _text(browser, "#finish") == "length")
        assert _console(browser, but="status of 401") == []


def test_a_lost_connection_is_said_and_found_again(browser: Any) -> None:
    engine = FakeEngine()
    completions = FakeCompletions(engine)
    with serving(engine, completions) as port:
        _open(browser, port)
    _wait(lambda: "connection lost, retrying" in _text(browser, "#status"))
    assert browser.find_element("id", "status").get_attribute("data-state") == "lost"
    with serving(engine, completions, port=port):
        _wait(lambda: _text(browser, "#status") == "connected")
    assert _console(browser, but="ERR_CONNECTION_REFUSED") == []


def test_the_page_and_the_real_routes_understand_each_other(browser: Any, url: str) -> None:
    body = {"prompt": "hello", "max_tokens": 64}
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    try:
        browser.get(url)
        _wait(lambda: _text(browser, "#status") == "connected")
        _set(browser, "num-streams", 3)
        _set(browser, "max-tokens", 64)
        _generate(browser, "hello")
        _wait(lambda: _text(browser, "#finish") == "stop" and _is_done(browser))
        assert not browser.find_element("id", "error").is_displayed()
        assert _text(browser, "#text") == answer["choices"][0]["text"]
        assert int(_text(browser, "#tokens")) == 3 * answer["usage"]["completion_tokens"]
        assert _console(browser) == []
    finally:
        browser.get("about:blank")  # closes the feed, so that the server can stop
