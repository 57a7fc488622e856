"""POST /v1/completions: prompts as text or token ids, continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lightmoe.core import SampledToken, SamplingParams
from lightmoe.errors import RequestError
from lightmoe.server.answer import Prompt, respond
from lightmoe.server.body import read_json_body
from lightmoe.server.choice import Choice, Piece
from lightmoe.server.logprobs import completion_logprobs
from lightmoe.server.schema import CompletionRequest, parse_request
from lightmoe.server.service import Service, check_num_sequences
from lightmoe.server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


async def complete(service: Service, http_request: HttpRequest) -> Response:
    """Answers one request."""
    request = parse_request(await read_json_body(http_request), CompletionRequest)
    service.name_of(request.model)
    if request.echo and request.logprobs is not None:
        raise RequestError("echo with logprobs is not supported; leave one out", "echo")
    prompts = [_prompt(service, request, ids) for ids in await _token_ids(service, request)]
    return await respond(service, http_request, request, prompts, _shape(service, request, prompts))


async def _token_ids(service: Service, request: CompletionRequest) -> list[list[int]]:
    given = _prompts(request.prompt)
    if not given:
        raise RequestError("the prompt is empty", "prompt")
    check_num_sequences(len(given), request.n or 1)
    prompts = []
    for prompt in given:
        ids = await service.encode(prompt) if isinstance(prompt, str) else prompt
        service.check_token_ids(ids, "prompt")
        prompts.append(ids)
    return prompts


def _prompts(
    given: str | list[str] | list[int] | list[list[int]],
) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    return [ids] if ids else [item for item in given if not isinstance(item, int)]


def _prompt(service: Service, request: CompletionRequest, token_ids: Sequence[int]) -> Prompt:
    max_tokens = service.room_for(len(token_ids), request.max_tokens, _DEFAULT_MAX_TOKENS)
    params = service.sampling_params(request, max_tokens, request.logprobs)
    return Prompt(tuple(token_ids), params)


def _shape(
    service: Service, request: CompletionRequest, prompts: Sequence[Prompt]
) -> CompletionShape:
    echoes: list[str] = []
    if request.echo:
        tokenizer = service.need_tokenizer("leave echo out", "echo")
        echoes = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
    return CompletionShape(
        service.tokenizer,
        with_logprobs=request.logprobs is not None,
        with_token_ids=bool(request.return_token_ids) or service.tokenizer is None,
        echoes=[echo for echo in echoes for _ in range(request.n or 1)],
    )


class CompletionShape:
    """Entries of `choices` as /v1/completions words them.

    `token_ids` are added on request, and always where there is no tokenizer to make text.
    """

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        with_logprobs: bool,
        with_token_ids: bool,
        echoes: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._with_token_ids = with_token_ids
        self._echoes = echoes
        self.sends_tokens = with_logprobs or with_token_ids

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        """The prompt, where it shall be echoed."""
        if not self._echoes:
            return None
        return self._entry(choice.index, self._echoes[choice.index], (), None)

    def chunk(self, choice: Choice, piece: Piece) -> Mapping[str, Any]:
        """One piece of text."""
        entry = self._entry(choice.index, piece.text, piece.token_ids, piece.finish_reason)
        return entry | self._logprobs(piece.tokens, piece.offset)

    def whole(self, choice: Choice) -> Mapping[str, Any]:
        """The whole text."""
        echo = self._echoes[choice.index] if self._echoes else ""
        text = echo + choice.text
        entry = self._entry(choice.index, text, choice.token_ids, choice.finish_reason)
        return entry | self._logprobs(choice.tokens, 0)

    def _logprobs(self, tokens: Sequence[SampledToken], offset: int) -> dict[str, Any]:
        if not self._with_logprobs:
            return {}
        return {"logprobs": completion_logprobs(self._tokenizer, tokens, offset)}

    def _entry(
        self, index: int, text: str, token_ids: Sequence[int], finish_reason: str | None
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        if self._with_token_ids:
            entry["token_ids"] = list(token_ids)
        return entry
