"""One answer as it grows: tokens come in from the engine, text and the reason to end come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightmoe.core import FinishReason, RequestOutput, SampledToken, SamplingParams
from lightmoe.errors import LightMoEError, ShuttingDownError
from lightmoe.server.logprobs import num_characters
from lightmoe.server.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one output added: text, the tokens that have a part in it, and all tokens it counted.

    `offset` is the number of characters before `tokens` (kept where logprobs are asked for).
    """

    text: str
    tokens: tuple[SampledToken, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    offset: int


class Choice:
    """The state of one answer. A stop string ends it here, before the engine knows.

    `moved_pairs` has, by position in prompt and answer, the pairs that an OverflowRule moved.
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.text = ""
        self.tokens: list[SampledToken] = []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.moved_pairs: dict[int, int] = {}
        self._offset = 0
        self._counts_characters = params.logprobs is not None
        self._tokenizer = tokenizer
        self._stream: TextStream | None = None
        if tokenizer is not None:
            self._stream = TextStream(
                tokenizer, params.stop, params.skip_special_tokens, prompt_token_ids
            )

    def add(self, output: RequestOutput) -> Piece:
        """Takes one output; raises its error if the engine could not finish the request."""
        if output.finish_reason == "error":
            raise output.error or LightMoEError("the engine ended a request without saying why")
        if output.finish_reason == "abort":
            raise ShuttingDownError("the server stopped this request; send it again")
        for position, number in output.moved_pairs:
            self.moved_pairs[position] = self.moved_pairs.get(position, 0) + number
        num_tokens, num_counted = len(self.tokens), len(self.token_ids)
        text = self._add_tokens(output)
        if output.finish_reason is not None and self.finish_reason is None:
            text += self._flush()
            self.finish_reason = self.finish_reason or output.finish_reason
        self.text += text
        tokens = tuple(self.tokens[num_tokens:])
        offset = self._offset
        if self._counts_characters:
            self._offset += sum(num_characters(self._tokenizer, token) for token in tokens)
        return Piece(text, tokens, tuple(self.token_ids[num_counted:]), self.finish_reason, offset)

    def _add_tokens(self, output: RequestOutput) -> str:
        text = ""
        for position, token in enumerate(output.tokens, start=1):
            self.token_ids.append(token.token_id)
            if output.finish_reason == "stop" and position == len(output.tokens):
                break  # the token that ended the answer is counted, but not part of its text
            self.tokens.append(token)
            if self._stream is not None:
                text += self._stream.add([token.token_id])
                if self._stream.stopped:
                    self.finish_reason = "stop"
                    break
        return text

    def _flush(self) -> str:
        if self._stream is None:
            return ""
        text = self._stream.flush()
        if self._stream.stopped:
            self.finish_reason = "stop"
        return text
