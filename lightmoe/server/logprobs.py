"""Log-probabilities in the shapes of the two routes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightmoe.core import SampledToken
from lightmoe.server.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0


def completion_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[SampledToken], offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of /v1/completions; text offsets count characters, from `offset` on."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += num_characters(tokenizer, token)
    return {
        "tokens": [_text(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {_text(tokenizer, token_id): _finite(logprob) for token_id, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""
    return {
        "content": [
            _entry(tokenizer, token.token_id, token.logprob)
            | {"top_logprobs": [_entry(tokenizer, *alternative) for alternative in token.top]}
            for token in tokens
        ]
    }


def num_characters(tokenizer: Tokenizer | None, token: SampledToken) -> int:
    """Characters that begin in a token: UTF-8 bytes that continue none."""
    if tokenizer is None:
        return 0
    return sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token.token_id))


def _entry(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": _text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }


def _text(tokenizer: Tokenizer | None, token_id: int) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    """JSON has no -inf, which is what a token has that sampling had ruled out."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
