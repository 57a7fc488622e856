"""A small real tokenizer, an engine that answers from a script, and a server around both."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from starlette.testclient import TestClient
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lightmoe.core import (
    BalanceEvent,
    BalanceReport,
    EngineStats,
    LoadReport,
    ModelInfo,
    OutputCallback,
    RankStats,
    Request,
    RequestOutput,
    SampledToken,
)
from lightmoe.errors import LightMoEError
from lightmoe.server.app import create_app
from lightmoe.server.tokenizer import Tokenizer

CORPUS = ["hello world, the cat sat on the mat", "def fibonacci(n): return n if n < 2 else"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ANSWER = "hello 😀 world, 漢字 and the cat"
MAX_MODEL_LEN = 128


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE tokenizer in Hugging Face layout; `<s>` is put in front of prompts."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@dataclass
class _Running:
    request: Request
    on_output: OutputCallback
    num_sent: int = 0


@dataclass
class FakeEngine:
    """Answers every request with `answer`, one token a step, on a thread as the real engine does.

    `hold_after` keeps requests running for ever after so many tokens; `fail_after` ends them with
    `failure`; `refusal` is raised by submit().
    """

    model: ModelInfo
    answer: list[int]
    error: LightMoEError | None = None
    refusal: Exception | None = None
    failure: LightMoEError | None = None
    fail_after: int = 0
    hold_after: int | None = None
    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    route: str = "waterfill"
    balance_report: BalanceReport | None = None

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OutputCallback) -> None:
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            self.submitted.append(request)
            self._running[request.request_id] = _Running(request, on_output)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            self._running.pop(request_id, None)

    @property
    def num_running(self) -> int:
        with self._changed:
            return len(self._running)

    def load(self) -> LoadReport:
        return LoadReport(
            expert_tokens=np.array([[4, 0, 2], [3, 3, 0]]),
            rank_pairs=np.array([[4, 3], [2, 3]]),
            rank_kinds=["home", "spare"],
            placement=[[[0], [0], [0, 1]], [[0, 1], [0], [0]]],
            epoch=1,
            num_steps=7,
            route=self.route,
            balance=self.balance_report,
        )

    def balance(self) -> BalanceReport | None:
        return self.balance_report

    def set_route(self, route: str) -> None:
        self.route = route

    def stats(self) -> EngineStats:
        ranks = (
            RankStats(rank=0, kind="home", num_running=1, num_waiting=0, kv_usage=0.5),
            RankStats(rank=1, kind="spare", num_running=0, num_waiting=0, kv_usage=0.0),
        )
        return EngineStats(
            num_steps=7,
            num_running=self.num_running,
            num_waiting=0,
            num_prompt_tokens=11,
            num_generated_tokens=22,
            num_finished=3,
            num_preemptions=0,
            uptime_seconds=1.5,
            last_step_seconds=0.01,
            ranks=ranks,
        )

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            with self._changed:
                work = [running for running in self._running.values() if not self._holds(running)]
                if not work:
                    self._changed.wait(0.01)
            for running in work:
                self._step(running)

    def _holds(self, running: _Running) -> bool:
        return self.hold_after is not None and running.num_sent >= self.hold_after

    def _step(self, running: _Running) -> None:
        output = self._next_output(running)
        running.num_sent += 1
        if output.finish_reason is not None:
            with self._changed:
                self._running.pop(running.request.request_id, None)
        running.on_output(output)

    def _next_output(self, running: _Running) -> RequestOutput:
        request, position = running.request, running.num_sent
        name, params = request.request_id, request.params
        if self.failure is not None and position >= self.fail_after:
            return RequestOutput(name, (), "error", self.failure)
        eos = self.model.eos_token_ids[0]
        if params.ignore_eos:
            token_id = self.answer[position % len(self.answer)]
        else:
            token_id = [*self.answer, eos][position]
        token = SampledToken(0, token_id, -0.5, ((token_id, -0.5), (5, -float("inf"))))
        if not params.ignore_eos and token_id in (eos, *params.stop_token_ids):
            return RequestOutput(name, (token,), "stop")
        is_last = position + 1 == params.max_tokens
        return RequestOutput(name, (token,), "length" if is_last else None)


def new_balance(error: str | None = None, num_events: int = 2) -> BalanceReport:
    """A balancer that has moved three experts; events are numbered from the first ever."""
    return BalanceReport(
        num_migrations=1,
        num_moved_experts=3,
        moved_bytes=3000,
        waited_seconds=0.25,
        heartbeat_age_seconds=0.5,
        error=error,
        events=tuple(BalanceEvent(1, f"event {number}") for number in range(num_events)),
        num_events=num_events,
    )


def new_engine(tokenizer: Tokenizer) -> FakeEngine:
    """An engine that runs; close() it."""
    model = ModelInfo(
        name="tiny",
        folder="",
        architecture="MixtralForCausalLM",
        num_layers=2,
        num_experts=3,
        vocab_size=tokenizer.vocab_size,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(1,),
        generation_defaults={"temperature": 0.7, "top_k": 20.0},
    )
    return FakeEngine(model, tokenizer.encode(ANSWER, add_special_tokens=False))


def new_client(engine: FakeEngine, tokenizer: Tokenizer | None, **options: object) -> TestClient:
    """A client of the application itself, without sockets."""
    app = create_app(engine, tokenizer, **options)  # type: ignore[arg-type]
    return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


@contextmanager
def running_server(
    engine: FakeEngine, tokenizer: Tokenizer | None, **options: object
) -> Iterator[str]:
    """A real server on a free port of the loopback; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(engine, tokenizer, **options)  # type: ignore[arg-type]
        config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        wait_until(lambda: server.started, "the server has started")
        yield url
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Returns as soon as `condition()` is true; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in {seconds} s not true: {what}"
        time.sleep(0.01)


def events_of(response: httpx.Response) -> list[dict[str, object]]:
    """The JSON of a whole event stream, which must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line for line in response.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def texts(entries: Sequence[dict[str, object]]) -> str:
    """The text of a stream's completions chunks."""
    return "".join(entry["choices"][0]["text"] for entry in entries if entry["choices"])  # type: ignore[index]
