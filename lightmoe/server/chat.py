"""POST /v1/chat/completions: messages through the model's own chat template, answered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lightmoe.core import SampledToken
from lightmoe.errors import RequestError
from lightmoe.server.answer import Prompt, respond
from lightmoe.server.body import read_json_body
from lightmoe.server.choice import Choice, Piece
from lightmoe.server.logprobs import chat_logprobs
from lightmoe.server.schema import ChatRequest, parse_request
from lightmoe.server.service import Service
from lightmoe.server.tokenizer import Tokenizer


async def chat(service: Service, http_request: HttpRequest) -> Response:
    """Answers one request."""
    request = parse_request(await read_json_body(http_request), ChatRequest)
    service.name_of(request.model)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    tokenizer = service.need_tokenizer(
        "send token ids to /v1/completions instead of messages", "messages"
    )
    token_ids = await _token_ids(service, tokenizer, request)
    prompt = _prompt(service, request, token_ids)
    shape = ChatShape(tokenizer, bool(request.logprobs), bool(request.return_token_ids))
    return await respond(service, http_request, request, [prompt], shape)


async def _token_ids(service: Service, tokenizer: Tokenizer, request: ChatRequest) -> list[int]:
    messages = [{"role": message.role, "content": message.text} for message in request.messages]
    if not any(message["content"] for message in messages):
        raise RequestError("all messages are empty", "messages")
    for message in messages:
        service.check_length(message["content"], "messages")
    token_ids = await asyncio.to_thread(tokenizer.chat, messages)
    service.check_token_ids(token_ids, "messages")
    return token_ids


def _prompt(service: Service, request: ChatRequest, token_ids: Sequence[int]) -> Prompt:
    asked = request.max_completion_tokens
    if asked is None:
        asked = request.max_tokens
    max_tokens = service.room_for(len(token_ids), asked, None)
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = service.sampling_params(request, max_tokens, num_logprobs)
    return Prompt(tuple(token_ids), params)


class ChatShape:
    """Entries of `choices` as /v1/chat/completions words them."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool, with_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids
        self.sends_tokens = with_logprobs or with_token_ids

    def opening(self, choice: Choice) -> Mapping[str, Any]:
        """Who is speaking, before the first word."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: Choice, piece: Piece) -> Mapping[str, Any]:
        """One piece of text."""
        delta = {"content": piece.text} if piece.text else {}
        entry = {"index": choice.index, "delta": delta}
        return entry | self._rest(piece.tokens, piece.token_ids, piece.finish_reason)

    def whole(self, choice: Choice) -> Mapping[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        entry = {"index": choice.index, "message": message}
        return entry | self._rest(choice.tokens, choice.token_ids, choice.finish_reason)

    def _rest(
        self, tokens: Sequence[SampledToken], token_ids: Sequence[int], finish_reason: str | None
    ) -> dict[str, Any]:
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": finish_reason}
        if self._with_logprobs:
            rest["logprobs"] = chat_logprobs(self._tokenizer, tokens)
        if self._with_token_ids:
            rest["token_ids"] = list(token_ids)
        return rest
