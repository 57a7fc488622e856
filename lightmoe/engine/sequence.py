"""A request while it runs: its tokens so far, where they are cached, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightmoe.core import (
    UNKNOWN_TOKEN,
    FinishReason,
    OutputCallback,
    Request,
    SamplingStep,
    SequenceStep,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` tokens of prompt + output have their keys and values in `block_table`.

    All of it as planned: steps under way count as run, and `num_pending` tokens are being chosen in
    them, behind those of `token_ids`.
    """

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
    num_pending: int = 0
    _moved_pairs: list[tuple[int, int]] = field(default_factory=list)
    _num_noted: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output with those that are being chosen."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Tokens chosen so far, with those that are being chosen."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_waiting(self) -> int:
        """Tokens that have not been run: 1 while decoding, more while the prompt is unfinished.

        The last one that it may have is not run: 0 while that is being chosen.
        """
        if self.num_pending and self.num_output_tokens >= self.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def is_penalised(self) -> bool:
        """Whether its next token depends on what all of its tokens are."""
        params = self.request.params
        return (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
        )

    def plan(self, num_tokens: int) -> SequenceStep:
        """Its part of a step with its next `num_tokens`, which count as run from now on."""
        start, end = self.num_computed, self.num_computed + num_tokens
        self.num_computed = end
        unknown = (UNKNOWN_TOKEN,) * (end - len(self.token_ids))
        step = SequenceStep(
            sequence_id=self.sequence_id,
            token_ids=(*self.token_ids[start:end], *unknown),
            start=start,
            block_table=tuple(self.block_table),
            sampling=self.sampling_step() if end == self.num_tokens else None,
        )
        self.num_pending += step.sampling is not None
        return step

    def sampling_step(self) -> SamplingStep:
        """What the sampler needs for the next token."""
        params = self.request.params
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
            history=tuple(self.token_ids) if self.is_penalised else (),
            banned_ids=tuple(sorted(self.stop_ids)) if too_short else (),
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Take the first pending token; says why the sequence is over, if it is."""
        self.token_ids.append(token_id)
        self.num_pending -= 1
        if token_id in self.stop_ids:
            return "stop"
        num_chosen = len(self.token_ids) - self.num_prompt_tokens
        return "length" if num_chosen >= self.max_tokens else None

    def note_moved(self, start: int, numbers: list[int]) -> None:
        """Pairs of the tokens at positions start, start + 1, ... that overflowed a rank.

        What runs again after a preemption has been noted.
        """
        positions = list(enumerate(numbers, start))[max(0, self._num_noted - start) :]
        self._moved_pairs += [(position, number) for position, number in positions if number]
        self._num_noted = max(self._num_noted, start + len(numbers))

    def take_moved(self) -> tuple[tuple[int, int], ...]:
        """Those since last asked, as RequestOutput has them."""
        moved = tuple(self._moved_pairs)
        self._moved_pairs.clear()
        return moved
