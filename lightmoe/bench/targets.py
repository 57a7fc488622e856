"""What is measured: an engine in this process or a server over HTTP, and when its tokens come."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lightmoe.bench.sweep import NATURAL
from lightmoe.client import AsyncClient
from lightmoe.core import LoadReport, Request, RequestOutput, SamplingParams
from lightmoe.engine.engine import Engine
from lightmoe.errors import LightMoEError, MachineError

Prompt = Sequence[int]


@dataclass(slots=True)
class Stream:
    """One answer in time, in seconds of time.perf_counter(): when it was asked for, its tokens."""

    asked: float
    tokens: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What must be known of a target; `max_batch_size` None: it does not say."""

    model: str
    routing: str
    summary: str
    vocab_size: int
    max_model_len: int
    max_batch_size: int | None = None


class Target(Protocol):
    """Runs batches."""

    facts: Facts

    def run(self, prompts: Sequence[Prompt], num_tokens: int) -> list[Stream]:
        """Continue all prompts at once by `num_tokens` tokens each, whatever the tokens are."""

    def load(self) -> LoadReport:
        """Expert load since the start."""

    def num_preemptions(self) -> int | None:
        """Sequences preempted since the start; None where the target does not say."""


class EngineTarget:
    """An engine in this process: no HTTP, no text."""

    def __init__(self, engine: Engine, summary: str, routing: str) -> None:
        self._engine = engine
        self._ids = itertools.count()
        self.facts = Facts(
            model=engine.model.name,
            routing=routing,
            summary=summary,
            vocab_size=engine.model.vocab_size,
            max_model_len=engine.model.max_model_len,
            max_batch_size=engine.max_num_queued_reqs,
        )

    def run(self, prompts: Sequence[Prompt], num_tokens: int) -> list[Stream]:
        """Submit all, wait for all; the error of the first that failed is raised."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        answers: dict[str, _Answer] = {}
        try:
            for prompt in prompts:
                name = f"bench-{next(self._ids)}"
                answers[name] = _Answer()
                request = Request(request_id=name, prompt_token_ids=tuple(prompt), params=params)
                self._engine.submit(request, answers[name])
            for answer in answers.values():
                answer.wait()
        except BaseException:
            for name in answers:
                self._engine.abort(name)
            raise
        return [answer.stream for answer in answers.values()]

    def load(self) -> LoadReport:
        """The engine's."""
        return self._engine.load()

    def num_preemptions(self) -> int:
        """The engine's."""
        return self._engine.stats().num_preemptions


class _Answer:
    """Takes the outputs of one request on the engine's thread."""

    def __init__(self) -> None:
        self.stream = Stream(time.perf_counter())
        self._error: LightMoEError | None = None
        self._is_over = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        now = time.perf_counter()
        self.stream.tokens.extend([now] * len(output.tokens))
        self._error = self._error or output.error
        if output.finish_reason is not None:
            self._is_over.set()

    def wait(self) -> None:
        """Until it is over."""
        self._is_over.wait()
        if self._error is not None:
            raise self._error


class ServerTarget:
    """A running server: what its clients see, one connection for each answer.

    Use it in a `with` block. Reading thousands of events a second keeps this process busy, too:
    what the ranks can do without HTTP is EngineTarget's to say.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, api_key=api_key)
        try:
            self.facts = self._ask_facts(url)
        except BaseException:
            self.close()
            raise

    def _ask_facts(self, url: str) -> Facts:
        entry = self._runner.run(self._client.models())[0]
        if "vocab_size" not in entry:
            raise MachineError(f"{url} does not tell its vocab_size; is it a Light-MoE server?")
        return Facts(
            model=entry["id"],
            routing=entry["routing_skew"] or NATURAL,
            summary=f"the server at {url}",
            vocab_size=entry["vocab_size"],
            max_model_len=entry["max_model_len"],
        )

    def run(self, prompts: Sequence[Prompt], num_tokens: int) -> list[Stream]:
        """Ask for all at once; the error of the first that failed is raised."""
        return self._runner.run(self._run(prompts, num_tokens))

    async def _run(self, prompts: Sequence[Prompt], num_tokens: int) -> list[Stream]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._stream(prompt, num_tokens)) for prompt in prompts]
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__
        return [task.result() for task in tasks]

    async def _stream(self, prompt: Prompt, num_tokens: int) -> Stream:
        stream = Stream(time.perf_counter())
        chunks = self._client.chunks(
            prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True, return_token_ids=True
        )
        async for chunk in chunks:
            now = time.perf_counter()
            num_new = sum(len(choice["token_ids"]) for choice in chunk["choices"])
            stream.tokens.extend([now] * num_new)
        return stream

    def load(self) -> LoadReport:
        """From /v1/experts/load."""
        return _load_report(self._runner.run(self._client.expert_load()))

    def num_preemptions(self) -> None:
        """Not asked for."""

    def close(self) -> None:
        """Close the connections; may be called twice."""
        self._runner.run(self._client.close())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _load_report(document: dict[str, Any]) -> LoadReport:
    return LoadReport(
        expert_tokens=np.array(document["expert_tokens"], dtype=np.int64),
        rank_pairs=np.array(document["rank_pairs"], dtype=np.int64),
        rank_kinds=document["rank_kinds"],
        placement=document["placement"],
        epoch=document["epoch"],
        num_steps=document["num_steps"],
        rank_seconds=document["rank_seconds"],
        route=document["route"],
    )
