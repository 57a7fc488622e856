"""What clients may send, as pydantic models: types here, bounds of sampling in SamplingParams.

Unknown fields are ignored (client libraries keep adding them), except those that would change
the answer if they were honoured: they are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from lightmoe.core import MAX_CHOICES, MAX_LOGPROBS, MAX_STOP_STRINGS
from lightmoe.errors import RequestError

MAX_PROMPTS = 64
MAX_SEQUENCES = 64
MAX_MESSAGES = 256
MAX_STOP_TOKEN_IDS = 128

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenIds = Annotated[list[Integer], Field(fail_fast=True)]
Prompts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
PromptsOfIds = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
StopStrings = Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]


class _Strict(BaseModel):
    """No coercion ("5" is no number, true is no integer) and no NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """Which events of a stream carry token counts."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(_Strict):
    """The fields that both routes share. None means: the model's default, else vLLM's."""

    model: str | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | StopStrings | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions; prompts are texts or token ids."""

    prompt: str | Prompts | TokenIds | PromptsOfIds
    logprobs: Integer | None = None
    echo: bool | None = None


class TextPart(_Strict):
    """One part of a message; text is the only kind that is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)]

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class RouteRequest(_Strict):
    """The body of POST /v1/experts/route."""

    route: Literal["waterfill", "even", "none"]


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "chat_template": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
}
"""Fields that would change the answer, with the values that ask for nothing."""

RequestModel = TypeVar("RequestModel", bound=BaseModel)


def parse_request(body: bytes, model: type[RequestModel]) -> RequestModel:
    """A request from its JSON, or RequestError saying what is wrong and in which field."""
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object; send {...}")
    _refuse_unsupported(content)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from None


def _refuse_unsupported(content: dict[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value not in harmless:
            raise RequestError(f"{name} is not supported; leave it out", name)


def _request_error(error: ValidationError) -> RequestError:
    """The first complaint, without the value: pydantic would echo all of it, for every branch."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    location = details[0]["loc"]
    field = str(location[0]) if location else None
    complaints = dict.fromkeys(
        detail["msg"] for detail in details[:8] if detail["loc"][:1] == location[:1]
    )
    return RequestError(f"{field}: {' / '.join(list(complaints)[:4])}", field)
