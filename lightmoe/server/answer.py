"""From engine requests to the answer of either route, whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lightmoe.core import Request, SamplingParams
from lightmoe.errors import LightMoEError
from lightmoe.server import sse
from lightmoe.server.choice import Choice, Piece
from lightmoe.server.errors import error_answer, internal_error_body, logger
from lightmoe.server.schema import GenerationRequest
from lightmoe.server.service import Service
from lightmoe.server.submission import Submission


class Shape(Protocol):
    """How one route words its answers: the entries of `choices`, and the names of the objects."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    sends_tokens: bool  # whether a piece without text is worth a chunk

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        """The entry that a stream sends before the first token, if any."""

    def chunk(self, choice: Choice, piece: Piece) -> Mapping[str, Any]:
        """The entry for one piece of a stream."""

    def whole(self, choice: Choice) -> Mapping[str, Any]:
        """The entry of a finished answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one prompt and how to continue it."""

    token_ids: tuple[int, ...]
    params: SamplingParams


async def respond(
    service: Service,
    http_request: HttpRequest,
    request: GenerationRequest,
    prompts: Sequence[Prompt],
    shape: Shape,
) -> Response:
    """Runs `n` choices of every prompt and answers as the request wants it."""
    answer = Answer(service, request, prompts, shape)
    answer.submission.start()
    if request.stream:
        return _EventStream(answer)
    async with answer.submission.watching(http_request.receive):
        return JSONResponse(await answer.whole())


class Answer:
    """One answer in the making.

    Choices are numbered prompt by prompt; choice i of a prompt has seed + i.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        shape: Shape,
    ) -> None:
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._shape = shape
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._id = f"{shape.id_prefix}-{uuid4().hex}"
        self._created = int(time.time())
        self._model_name = service.name_of(request.model)
        self._overflow = service.model.overflow
        self._choices: list[Choice] = []
        requests = []
        for prompt in prompts:
            for params in _params_of_choices(prompt.params, request.n or 1):
                index = len(self._choices)
                self._choices.append(Choice(index, prompt.token_ids, params, service.tokenizer))
                requests.append(
                    Request(
                        request_id=f"{self._id}-{index}",
                        prompt_token_ids=prompt.token_ids,
                        params=params,
                    )
                )
        self.submission = Submission(service.engine, requests)

    async def whole(self) -> dict[str, Any]:
        """The finished answer."""
        async for _ in self._pieces():
            continue
        entries = [self._shape.whole(choice) for choice in self._choices]
        return self._frame(self._shape.whole_object, entries) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as events. Errors are events too: a stream that just ends reads as success."""
        try:
            async for content in self._chunks():
                yield sse.event(content)
        except ClientDisconnect:
            return
        except LightMoEError as error:
            yield sse.event(error_answer(error)[1])
        except Exception:
            logger.exception("a stream failed")
            yield sse.event(internal_error_body())
        yield sse.DONE

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        for choice in self._choices:
            opening = self._shape.opening(choice)
            if opening is not None:
                yield self._chunk(opening)
        async for choice, piece in self._pieces():
            worth_a_chunk = piece.text or (piece.token_ids and self._shape.sends_tokens)
            if worth_a_chunk or piece.finish_reason is not None:
                yield self._chunk(self._shape.chunk(choice, piece))
        if self._include_usage:
            yield self._frame(self._shape.chunk_object, []) | {"usage": self._usage()}

    async def _pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        async for index, output in self.submission.outputs():
            choice = self._choices[index]
            piece = choice.add(output)
            if choice.finish_reason is not None:
                self.submission.end(index)
            yield choice, piece

    def _chunk(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        chunk = self._frame(self._shape.chunk_object, [entry])
        if self._continuous_usage:
            chunk["usage"] = self._usage(is_whole=False)
        elif self._include_usage:
            chunk["usage"] = None
        return chunk

    def _frame(self, kind: str, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_name,
            "choices": list(entries),
        }

    def _usage(self, *, is_whole: bool = True) -> dict[str, Any]:
        num_generated = sum(len(choice.token_ids) for choice in self._choices)
        usage: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
        }
        if self._overflow is not None:
            moved = [choice.moved_pairs for choice in self._choices]
            num_pairs = sum(sum(choice.values()) for choice in moved)
            usage["overflow"] = {"mode": self._overflow.mode, "pairs": num_pairs}
            if is_whole:  # [position, pairs] by choice
                usage["overflow"]["positions"] = [sorted(choice.items()) for choice in moved]
        return usage


class _EventStream(StreamingResponse):
    """A streamed answer; however it ends, even before its start, its engine requests end too."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream", headers=sse.HEADERS)
        self._submission = answer.submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._submission.watching(receive):
            await super().__call__(scope, receive, send)


def _params_of_choices(params: SamplingParams, num_choices: int) -> list[SamplingParams]:
    if params.seed is None:
        return [params] * num_choices
    return [replace(params, seed=params.seed + index) for index in range(num_choices)]
