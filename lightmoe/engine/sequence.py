"""A request while it runs: its tokens so far, where they are cached, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightmoe.core import FinishReason, OutputCallback, Request, SamplingStep


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` tokens of prompt + output have their keys and values in `block_table`."""

    sequence_id: int
    request: Request
    on_output: OutputCallback
    rank: int
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens chosen so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_waiting(self) -> int:
        """Tokens that have not been run: 1 while decoding, more while the prompt is unfinished."""
        return len(self.token_ids) - self.num_computed

    def sampling_step(self) -> SamplingStep:
        """What the sampler needs for the next token."""
        params = self.request.params
        penalised = (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
        )
        too_short = self.num_output_tokens < params.min_tokens
        return SamplingStep(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            seed=self.seed,
            position=self.num_output_tokens,
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            num_prompt_tokens=self.num_prompt_tokens,
            history=tuple(self.token_ids) if penalised else (),
            banned_ids=tuple(sorted(self.stop_ids)) if too_short else (),
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Take a chosen token; says why the sequence is over, if it is."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if self.num_output_tokens >= self.max_tokens else None
