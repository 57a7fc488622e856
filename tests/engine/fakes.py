"""A WorkerGroup without tensors, whose answers show whether the engine used the KV cache right.

Every rank "caches" the token that was run at each position, in the blocks that the plan names. The
next token is a checksum of what a sequence then reads back through its block table: a block that
was shared, freed too early or not computed again after a preemption changes the answer.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lightmoe.core import (
    UNKNOWN_TOKEN,
    Batch,
    ModelInfo,
    RankInfo,
    Request,
    RequestOutput,
    SampledToken,
    SamplingParams,
    SequenceStep,
    StepResult,
)
from lightmoe.engine.engine import Engine, SchedulerConfig
from lightmoe.errors import LightMoEError
from lightmoe.moe.placement import initial_placement

BLOCK_SIZE = 4
VOCAB_SIZE = 50
EOS = 7
WAIT_SECONDS = 120
UNWRITTEN = -1


def next_token(token_ids: Sequence[int], banned: Sequence[int] = ()) -> int:
    """What the fake model says after these tokens."""
    token = zlib.crc32(bytes(token_ids)) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, stop_ids: Sequence[int] = (), min_tokens: int = 0
) -> list[int]:
    """What a request should answer, computed without an engine."""
    token_ids = list(prompt)
    for position in range(num_tokens):
        token_ids.append(next_token(token_ids, stop_ids if position < min_tokens else ()))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt) :]


class FakeRank:
    """One rank's cache, and what it checks of every plan."""

    def __init__(self, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = np.full(num_blocks * BLOCK_SIZE, UNWRITTEN, dtype=np.int64)
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._before: dict[int, int] = {}  # what sequences got in the last step

    def run(self, plan: Sequence[SequenceStep]) -> tuple[SampledToken, ...]:
        """The tokens of the sequences whose prompts are finished."""
        assert sum(len(part.token_ids) for part in plan) <= self._max_num_batched_tokens
        assert len(plan) <= self._max_num_seqs
        assert len({part.sequence_id for part in plan}) == len(plan)
        blocks = [block for part in plan for block in part.block_table]
        assert len(set(blocks)) == len(blocks), "a block belongs to two sequences"
        tokens = tuple(token for part in plan for token in self._run_sequence(part))
        self._before = {token.sequence_id: token.token_id for token in tokens}
        return tokens

    def _run_sequence(self, part: SequenceStep) -> list[SampledToken]:
        assert part.token_ids, "a sequence without tokens has no place in a step"
        known = [*part.token_ids]
        if known[-1] == UNKNOWN_TOKEN:
            known[-1] = self._before[part.sequence_id]
        assert UNKNOWN_TOKEN not in known
        rows = [
            part.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(part.start + len(part.token_ids))
        ]
        self.cache[rows[part.start :]] = known
        if part.sampling is None:
            return []
        seen = self.cache[rows].tolist()
        assert UNWRITTEN not in seen
        return [SampledToken(part.sequence_id, next_token(seen, part.sampling.banned_ids))]


class FakeWorkers:
    """A WorkerGroup of FakeRanks. `pause()` holds the next step; `fail_with` breaks it.

    `in_step` is set while a step is held.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        num_ranks: int = 1,
        num_blocks: int = 64,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
    ) -> None:
        self.placement = initial_placement(2, 4, num_ranks)
        self.ranks = [
            RankInfo(
                rank=rank,
                kind="home",
                device="fake",
                num_slots=8,
                weight_bytes=0,
                num_kv_blocks=num_blocks,
            )
            for rank in range(num_ranks)
        ]
        self._fakes = [
            FakeRank(num_blocks, max_num_seqs, max_num_batched_tokens) for _ in range(num_ranks)
        ]
        self.batches: list[Sequence[Batch]] = []
        self.fail_with: Exception | None = None
        self.check_fails_with: LightMoEError | None = None
        self.spoil: Callable[[SampledToken], SampledToken] = lambda token: token
        self.num_closed = 0
        self._under_way: deque[Sequence[Batch]] = deque()
        self.most_under_way = 0
        self._may_run = threading.Event()
        self._may_run.set()
        self._pause_before: int | None = None
        self.in_step = threading.Event()

    def pause(self) -> None:
        """Hold the next step."""
        self._may_run.clear()

    def pause_before_step(self, step: int) -> None:
        """Hold the step of that number; steps count from 0."""
        self._pause_before = step

    def resume(self) -> None:
        """Let steps go on."""
        self._may_run.set()

    def begin(self, batches: Sequence[Batch]) -> None:
        """Note a step; it runs when it is waited for."""
        self._under_way.append(batches)
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        assert self.most_under_way <= 2

    def finish(self) -> list[StepResult]:
        """Run the first of the steps on every rank."""
        batches = self._under_way.popleft()
        if batches[0].step == self._pause_before:
            self.pause()
        if not self._may_run.is_set():
            self.in_step.set()
        assert self._may_run.wait(WAIT_SECONDS)
        self.in_step.clear()
        if self.fail_with is not None:
            raise self.fail_with
        self.batches.append(batches)
        sizes = tuple(sum(len(part.token_ids) for part in batch.sequences) for batch in batches)
        results = []
        for rank, batch in enumerate(batches):
            assert batch.tokens_per_rank == sizes
            tokens = tuple(map(self.spoil, self._fakes[rank].run(batch.sequences)))
            expert_tokens = np.full((2, 4), sizes[rank], dtype=np.int32)
            layer_pairs = np.full(2, rank + 1, dtype=np.int32)
            results.append(StepResult(rank, batch.step, tokens, expert_tokens, layer_pairs))
        return results

    def check(self) -> None:
        """Fails when told to."""
        if self.check_fails_with is not None:
            raise self.check_fails_with

    def close(self) -> None:
        """Count the calls."""
        self.num_closed += 1


class Answer:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._finished = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        assert not self._finished.is_set(), "an output after the last one"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._finished.set()

    def wait(self) -> Answer:
        """Wait for the last output."""
        assert self._finished.wait(WAIT_SECONDS)
        return self

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for output in self.outputs for token in output.tokens]

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> LightMoEError | None:
        return self.outputs[-1].error


def new_engine(
    workers: FakeWorkers,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_num_queued_reqs: int = 1024,
    max_model_len: int = 60,
) -> Engine:
    """An engine over the fake ranks, not started."""
    model = ModelInfo(
        name="fake",
        folder="",
        architecture="Fake",
        num_layers=2,
        num_experts=4,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        generation_defaults={},
    )
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_queued_reqs=max_num_queued_reqs,
    )
    return Engine(model, workers, config)


def new_request(request_id: str, prompt: Sequence[int] = (1, 2, 3), **params: object) -> Request:
    """Greedy, eight tokens unless said otherwise."""
    values = {"temperature": 0.0, "max_tokens": 8, **params}
    return Request(
        request_id=request_id, prompt_token_ids=tuple(prompt), params=SamplingParams(**values)
    )
