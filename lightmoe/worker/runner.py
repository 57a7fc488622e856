"""One step on one rank: a Batch in, the model over its rows, chosen tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import Batch, SampledToken, SamplingStep, SequenceStep, StepResult
from lightmoe.layers.attention import KVCache
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.telemetry.trace import span
from lightmoe.worker.chosen import ChosenTokens
from lightmoe.worker.device_sampler import sample_rows, stays_on_device
from lightmoe.worker.graphs import MAX_BATCH, DecodeGraphs
from lightmoe.worker.inputs import in_halves, send, step_inputs
from lightmoe.worker.report import Report
from lightmoe.worker.sampler import sample

Sampled = tuple[tuple[int, SamplingStep], ...]
"""Sequences that get a token, and how it is drawn."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that is enqueued. `is_done` says whether `result` would wait; call that once."""

    is_done: Callable[[], bool]
    result: Callable[[], StepResult]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Tokens int64 [rows] of these sequences, and those that the host has drawn, by row."""

    sequence_ids: list[int]
    tokens: Tensor
    by_host: dict[int, SampledToken]

    def read(self, tokens: np.ndarray) -> tuple[SampledToken, ...]:
        """The tokens when they have arrived."""
        drawn = zip(self.sequence_ids, tokens.tolist(), strict=True)
        return tuple(
            self.by_host.get(row) or SampledToken(sequence_id, token)
            for row, (sequence_id, token) in enumerate(drawn)
        )


class Runner:
    """Turns plans into tensors. It knows the model, the cache and the group, not the engine."""

    def __init__(
        self, decoder: Decoder, group: ExpertGroup, cache: KVCache, *, use_graphs: bool = True
    ) -> None:
        self._decoder = decoder
        self._group = group
        self._cache = cache
        # A sequence has a block at least.
        self._chosen = ChosenTokens(max(cache.num_blocks, MAX_BATCH), cache.keys.device)
        self._ended = 0.0
        self._graphs: DecodeGraphs | None = None
        if use_graphs and DecodeGraphs.serve(group, cache):
            self._graphs = DecodeGraphs(decoder, group, cache, self._chosen)

    def step(self, batch: Batch) -> StepResult:
        """Run the batch; a rank without sequences serves its experts with zero rows."""
        return self.begin(batch).result()

    def is_quick(self, batch: Batch) -> bool:
        """Whether to enqueue the batch is one replay, of a step whose tokens may be unknown."""
        graphs = self._graphs
        if graphs is None or self._decoder.overflow is not None:
            return False
        num_rows = graphs.padded(batch.tokens_per_rank)
        return num_rows > 0 and graphs.has(batch.sequences, num_rows)

    def begin(self, batch: Batch) -> RunningStep:
        """Enqueue the batch behind what runs. On a GPU its result may be waited for later."""
        started = time.perf_counter()
        if not sum(batch.tokens_per_rank):
            return self._enqueued(batch, self._drawn((), self._chosen.first(0)), started)
        graphs, num_rows = self._graphs, 0
        if graphs is not None:
            # Every rank sees the same numbers, so all of them pad or none does.
            num_rows = graphs.padded(batch.tokens_per_rank)
        self._group.tokens_per_rank = (
            (num_rows,) * len(batch.tokens_per_rank) if num_rows else batch.tokens_per_rank
        )
        if graphs is not None and num_rows and graphs.fits(batch.sequences):
            return self._enqueued(batch, self._replay(graphs, batch, num_rows), started)
        # Ranks that replay a padded step's graph run it whole, so it is cut in two on none.
        rows, sampled = self._forward(batch, whole=num_rows > 0)
        for lane in self._group.lanes:
            lane.pair_counter.count()
        if not sampled:
            return self._enqueued(batch, self._drawn((), self._chosen.first(0)), started)
        return self._enqueued(batch, self._draw(self._decoder.logits(rows), sampled), started)

    def _forward(self, batch: Batch, *, whole: bool) -> tuple[Tensor, Sampled]:
        """The last rows [sampled, D] of the sequences that get a token, and which these are."""
        decoder = self._decoder
        if not whole and decoder.overlap.cuts_in_two(max(batch.tokens_per_rank)):
            return self._forward_halves(batch)
        with span("inputs"):
            inputs = step_inputs(self._named(batch), self._cache, decoder.rotary)
            token_ids = self._chosen.fill(inputs.token_ids)
        hidden = decoder.forward(token_ids, inputs.attention)
        return hidden.index_select(0, inputs.last_rows), inputs.sampled

    def _named(self, batch: Batch) -> list[SequenceStep]:
        return [self._chosen.named(sequence) for sequence in batch.sequences]

    def _forward_halves(self, batch: Batch) -> tuple[Tensor, Sampled]:
        """The same, cut in two on every rank: the exchange of a half behind the other's work."""
        group, tokens = self._group, batch.tokens_per_rank
        first = tuple(count // 2 for count in tokens)
        second = tuple(count - half for count, half in zip(tokens, first, strict=True))
        with span("inputs"):
            halves = [
                step_inputs(sequences, self._cache, self._decoder.rotary)
                for sequences in in_halves(self._named(batch), first[group.rank])
            ]

        def begin_half(half: int) -> None:
            group.tokens_per_rank = (first, second)[half]

        group.in_halves = True
        try:
            hidden = self._decoder.forward_halves(
                [(self._chosen.fill(half.token_ids), half.attention) for half in halves], begin_half
            )
        finally:
            group.in_halves = False
        rows = [
            part.index_select(0, half.last_rows) for part, half in zip(hidden, halves, strict=True)
        ]
        return torch.cat(rows), (*halves[0].sampled, *halves[1].sampled)

    def _replay(self, graphs: DecodeGraphs, batch: Batch, num_rows: int) -> _Drawn:
        alone = self._group.peers is None
        pairs = self._group.layer_pairs.copy()
        with span("graph"):
            logits = graphs.run(batch.sequences, num_rows)
        if alone:  # what a recorded step does on the host, it does once
            num_pairs = len(batch.sequences) * self._decoder.num_experts_per_token
            self._group.layer_pairs[:] = pairs + num_pairs
        sampled = [
            (row, sequence.sequence_id, sequence.sampling)
            for row, sequence in enumerate(batch.sequences)
            if sequence.sampling is not None
        ]
        steps = tuple((number, sampling) for _, number, sampling in sampled)
        if len(steps) < len(logits):
            logits = logits[[row for row, _, _ in sampled]]
        elif all(stays_on_device(step) and not step.temperature > 0 for _, step in steps):
            return self._drawn(steps, self._chosen.first(len(steps)))  # the graph's own choice
        return self._draw(logits, steps)

    def _draw(self, logits: Tensor, sampled: Sampled) -> _Drawn:
        """A token for each row of logits [B, V], left where the next step finds it."""
        with span("sampler"):
            tokens, by_host = choose(logits, sampled)
            self._chosen.put(tokens)
        return self._drawn(sampled, tokens, by_host)

    def _drawn(
        self, sampled: Sampled, tokens: Tensor, by_host: dict[int, SampledToken] | None = None
    ) -> _Drawn:
        sequence_ids = [sequence_id for sequence_id, _ in sampled]
        self._chosen.belong_to(sequence_ids)
        return _Drawn(sequence_ids, tokens, by_host or {})

    def _enqueued(self, batch: Batch, drawn: _Drawn, started: float) -> RunningStep:
        """All that the device is to do for the step is enqueued: what will be known of it."""
        group = self._group
        counts = [self._decoder.load.move(), *(lane.pair_counter.move() for lane in group.lanes)]
        report = Report([drawn.tokens, *counts])
        layer_pairs = group.layer_pairs.copy()
        group.layer_pairs[:] = 0
        overflow = None if self._decoder.overflow is None else self._decoder.overflow.take()

        def result() -> StepResult:
            tokens, expert_tokens, *pairs = report.read()
            for lane in group.lanes:
                lane.check()
            # A step that was enqueued behind another began when that had ended.
            begun, self._ended = max(started, self._ended), time.perf_counter()
            return StepResult(
                rank=group.rank,
                step=batch.step,
                tokens=drawn.read(tokens),
                expert_tokens=expert_tokens,
                layer_pairs=sum(pairs, layer_pairs).astype(np.int32),
                seconds=self._ended - begun,
                overflow=overflow,
            )

        return RunningStep(report.is_here, result)


def choose(logits: Tensor, sampled: Sampled) -> tuple[Tensor, dict[int, SampledToken]]:
    """A token for each row of logits [B, V], int64 [B] beside them, and what the host has drawn.

    On a GPU rows are drawn there, without waiting for them, unless a request asks for more.
    """
    steps = [step for _, step in sampled]
    rows = [row for row, step in enumerate(steps) if not (logits.is_cuda and stays_on_device(step))]
    read = logits if len(rows) == len(steps) else logits[rows]
    by_host = {
        row: sample(sampled[row][0], numbers, steps[row])
        for row, numbers in zip(rows, read.cpu().numpy() if rows else (), strict=True)
    }
    drawn = torch.tensor([token.token_id for token in by_host.values()], dtype=torch.int64)
    if len(rows) == len(steps):
        return send(drawn, logits.device), by_host
    tokens = sample_rows(logits, steps)
    if rows:
        tokens[send(torch.tensor(rows), logits.device)] = send(drawn, logits.device)
    return tokens, by_host
