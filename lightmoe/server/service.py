"""What the routes share: engine, tokenizer, names, and the steps to an engine request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightmoe.core import ModelInfo, SamplingParams
from lightmoe.errors import RequestError, UnknownModelError
from lightmoe.server.protocol import ServingEngine
from lightmoe.server.schema import MAX_SEQUENCES, GenerationRequest
from lightmoe.server.tokenizer import Tokenizer

_SAMPLING_FIELDS = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "skip_special_tokens",
}
_DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Service:
    """One served model and the names that it answers to; the first is the one it gives."""

    engine: ServingEngine
    tokenizer: Tokenizer | None
    model_names: tuple[str, ...]

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self.engine.model

    def name_of(self, requested: str | None) -> str:
        """The name to answer with; UnknownModelError for a model that is not served here."""
        if requested is None:
            return self.model_names[0]
        if requested not in self.model_names:
            raise UnknownModelError(
                f"model {requested[:200]!r} is not served here; there is {self.model_names[0]!r}",
                "model",
            )
        return requested

    def need_tokenizer(self, remedy: str, field: str) -> Tokenizer:
        """The tokenizer, or RequestError with the remedy where the model has none."""
        if self.tokenizer is None:
            raise RequestError(f"model {self.model_names[0]!r} has no tokenizer; {remedy}", field)
        return self.tokenizer

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. The work is done on a thread, for long texts take seconds."""
        tokenizer = self.need_tokenizer("send the prompt as token ids", "prompt")
        if not text:
            raise RequestError("the prompt is empty", "prompt")
        self.check_length(text, "prompt")
        return await asyncio.to_thread(tokenizer.encode, text)

    def check_length(self, text: str, field: str) -> None:
        """Refuses a text that is too long whatever its tokens are, before encoding takes time."""
        num_at_least = self.tokenizer.fewest_tokens(text) if self.tokenizer is not None else 0
        if num_at_least >= self.model.max_model_len:
            raise RequestError(
                f"the prompt has at least {num_at_least} tokens and the model takes "
                f"{self.model.max_model_len} in all; shorten it",
                field,
            )

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises RequestError for an empty prompt or an id that the model does not have."""
        if not token_ids:
            raise RequestError("the prompt is empty", field)
        for token_id in token_ids:
            if not 0 <= token_id < self.model.vocab_size:
                raise RequestError(
                    f"token id {token_id} is not in the vocabulary; "
                    f"give ids from 0 to {self.model.vocab_size - 1}",
                    field,
                )

    def room_for(self, num_prompt_tokens: int, asked: int | None, default: int | None) -> int:
        """How many tokens may be generated; `asked` must fit, a default is cut to what fits."""
        limit = self.model.max_model_len
        room = limit - num_prompt_tokens
        if room <= 0 or (asked is not None and asked > room):
            wanted = default if asked is None else asked
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is "
                f"{'not set' if wanted is None else wanted}, but the model takes {limit} in all; "
                "shorten the prompt or lower max_tokens",
                "prompt" if room <= 0 else "max_tokens",
            )
        if asked is not None:
            return asked
        return room if default is None else min(default, room)

    def sampling_params(
        self, request: GenerationRequest, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        """The request's sampling over the model's defaults over ours; for one choice."""
        fields: dict[str, Any] = {
            name: value
            for name, value in self.model.generation_defaults.items()
            if name in _DEFAULTABLE
        }
        if "top_k" in fields:
            fields["top_k"] = int(fields["top_k"])
        fields |= request.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
        if fields.get("stop"):
            self.need_tokenizer("use stop_token_ids", "stop")
        return SamplingParams(max_tokens=max_tokens, seed=request.seed, logprobs=logprobs, **fields)


def check_num_sequences(num_prompts: int, num_choices: int) -> None:
    """Raises RequestError when one HTTP request asks for too many answers."""
    if num_prompts * num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{num_prompts} prompts times n {num_choices} are more than {MAX_SEQUENCES} answers; "
            "send fewer at once",
            "n",
        )
