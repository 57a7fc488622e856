"""`LLM`: the engine without a server, for scripts and notebooks. Outputs are shaped like vLLM's."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import operator
import queue
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightmoe.config import LaunchConfig
from lightmoe.core import (
    FinishReason,
    LoadReport,
    Request,
    RequestOutput,
    SampledToken,
    SamplingParams,
)
from lightmoe.errors import RequestError
from lightmoe.launch import start_engine
from lightmoe.server.tokenizer import TextStream, Tokenizer
from lightmoe.telemetry.trace_folder import finish_folder
from lightmoe.worker.ray_group import Progress

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": ...} and {"prompt_token_ids": ...}."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability; `rank` counts from 1, None below the ones asked for."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers to a prompt.

    `moved_pairs` counts by position in prompt and answer what `overflow` redirected or dropped.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    moved_pairs: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class GenerationOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False


def _no_progress(stage: str, done: int, total: int) -> None:
    """Scripts are not told how far the ranks are."""


class LLM:
    """A model on this machine: `LLM("mixtral-lite", gpus=10).generate(["def f("])`.

    Takes the options of `lightmoe launch` as keywords (`LaunchConfig`). Use it in a `with` block,
    or call `close()`; the ranks also end with the process.
    """

    def __init__(
        self, model: str, *, gpus: int = 1, progress: Progress = _no_progress, **options: Any
    ) -> None:
        config = LaunchConfig.from_recipe(None, {"model": model, "gpus": gpus, **options})
        self._config = config
        self._launched = start_engine(config, progress)
        # Before Ray's own exit handler, which would pull the ranks from under the engine.
        atexit.register(self._launched.engine.close)
        self._ids = itertools.count()
        self._is_closed = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where its folder has none."""
        return self._launched.tokenizer

    @property
    def summary(self) -> str:
        """Which device, dtype, transport and placement were chosen, and why."""
        return self._launched.summary

    def default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for."""
        defaults: dict[str, Any] = dict(self._launched.engine.model.generation_defaults)
        return replace(SamplingParams(), **defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Continue every prompt; all run at once. Raises RequestError for one that cannot run."""
        listed = _as_list(prompts)
        params = sampling_params or self.default_sampling_params()
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise RequestError(
                f"{len(listed)} prompts and {len(each)} sampling_params; give one for all or each"
            )
        return self._run(
            [self._prepare(prompt, one) for prompt, one in zip(listed, each, strict=True)]
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
    ) -> list[GenerationOutput]:
        """Answer one conversation, rendered by the model's chat template."""
        token_ids = self._need_tokenizer().chat(messages)
        return self.generate([token_ids], sampling_params)

    def expert_load(self) -> LoadReport:
        """Tokens per layer and expert since the start."""
        return self._launched.engine.load()

    def close(self) -> None:
        """Stop the ranks, and write their trace where one was asked for; may be called twice."""
        engine, trace = self._launched.engine, self._config.trace
        atexit.unregister(engine.close)
        engine.close()
        if trace is not None and engine.failure is None and not self._is_closed:
            title = f"{engine.model.name}, {self._config.gpus} ranks"
            finish_folder(Path(trace).resolve(), self._config.gpus, title)
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; give prompts as token ids", "prompt")
        return self.tokenizer

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> _Generation:
        content = _content(prompt)
        if isinstance(content, str):
            text, token_ids = content, self._need_tokenizer().encode(content)
        else:
            text, token_ids = None, content
        output = GenerationOutput(
            request_id=str(next(self._ids)),
            prompt=text,
            prompt_token_ids=token_ids,
            outputs=[CompletionOutput(index) for index in range(params.n)],
        )
        return _Generation(output, params, self.tokenizer)

    def _run(self, generations: list[_Generation]) -> list[GenerationOutput]:
        engine = self._launched.engine
        waiting = deque(
            (generation, index, request)
            for generation in generations
            for index, request in enumerate(generation.requests())
        )
        events: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        running: dict[str, tuple[_Generation, int]] = {}
        try:
            while waiting or running:
                # The engine's queue has an end; a list of prompts need not.
                while waiting and len(running) < engine.max_num_queued_reqs:
                    generation, index, request = waiting.popleft()
                    engine.submit(request, events.put)
                    running[request.request_id] = (generation, index)
                self._take(events.get(), running)
        finally:
            for request_id in running:
                engine.abort(request_id)
        return [generation.output for generation in generations]

    def _take(self, event: RequestOutput, running: dict[str, tuple[_Generation, int]]) -> None:
        if event.request_id not in running:
            return  # ended here by a stop string; the engine had one more on the way
        generation, index = running[event.request_id]
        if event.error is not None:
            raise event.error
        if generation.take(index, event):
            del running[event.request_id]
            if event.finish_reason is None:
                self._launched.engine.abort(event.request_id)


class _Generation:
    """One prompt while its answers come in."""

    def __init__(
        self, output: GenerationOutput, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.output = output
        self._params = params
        self._tokenizer = tokenizer
        self._streams = [self._stream() for _ in output.outputs]

    def _stream(self) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return TextStream(
            self._tokenizer,
            self._params.stop,
            self._params.skip_special_tokens,
            self.output.prompt_token_ids,
        )

    def requests(self) -> list[Request]:
        """One engine request per answer."""
        seed = self._params.seed
        return [
            Request(
                request_id=f"{self.output.request_id}-{answer.index}",
                prompt_token_ids=tuple(self.output.prompt_token_ids),
                params=self._params
                if seed is None
                else replace(self._params, seed=seed + answer.index),
            )
            for answer in self.output.outputs
        ]

    def take(self, index: int, event: RequestOutput) -> bool:
        """Add what a step brought; True when this answer is complete."""
        answer, stream = self.output.outputs[index], self._streams[index]
        for position, number in event.moved_pairs:
            answer.moved_pairs[position] = answer.moved_pairs.get(position, 0) + number
        for token in event.tokens:
            answer.token_ids.append(token.token_id)
            self._add_logprobs(answer, token)
        # The token that ended an answer is not part of its text.
        spoken = event.tokens[:-1] if event.finish_reason == "stop" else event.tokens
        if stream is not None:
            answer.text += stream.add([token.token_id for token in spoken])
            if event.finish_reason is not None:
                answer.text += stream.flush()
            if stream.stopped:
                answer.finish_reason, answer.stop_reason = "stop", stream.stop_string
        if event.finish_reason is not None and answer.finish_reason is None:
            answer.finish_reason = event.finish_reason
        if (
            event.finish_reason == "stop"
            and event.tokens[-1].token_id in self._params.stop_token_ids
        ):
            answer.stop_reason = event.tokens[-1].token_id
        self.output.finished = all(answer.finish_reason for answer in self.output.outputs)
        return answer.finish_reason is not None

    def _add_logprobs(self, answer: CompletionOutput, token: SampledToken) -> None:
        if self._params.logprobs is None:
            return
        entry = {
            candidate: Logprob(logprob, place, self._text(candidate))
            for place, (candidate, logprob) in enumerate(token.top, start=1)
        }
        entry.setdefault(token.token_id, Logprob(token.logprob, None, self._text(token.token_id)))
        answer.logprobs = [*(answer.logprobs or []), entry]
        answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + token.logprob

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed


def _content(prompt: Prompt) -> str | list[int]:
    """The text or the token ids of a prompt, however it was given."""
    content: Any = prompt
    if isinstance(prompt, Mapping):
        content = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(content, str):
        return content
    with contextlib.suppress(TypeError):  # not a sequence of integers, numpy's included
        token_ids = [operator.index(token) for token in content]
        if not any(isinstance(token, bool) for token in content):
            return token_ids
    raise RequestError(
        f"a prompt is {str(prompt)[:80]!r}; give a text, a list of token ids, or a dict with"
        " prompt or prompt_token_ids",
        "prompt",
    )
