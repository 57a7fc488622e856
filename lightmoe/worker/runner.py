"""One step on one rank: a Batch in, the model over its rows, chosen tokens out."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import Batch, SampledToken, SamplingStep, StepResult
from lightmoe.layers.attention import KVCache
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.telemetry.trace import span
from lightmoe.worker.device_sampler import sample_rows, stays_on_device
from lightmoe.worker.graphs import DecodeGraphs
from lightmoe.worker.inputs import in_halves, step_inputs
from lightmoe.worker.sampler import sample

Sampled = tuple[tuple[int, SamplingStep], ...]
"""Sequences that get a token, and how it is drawn."""


class Runner:
    """Turns plans into tensors. It knows the model, the cache and the group, not the engine."""

    def __init__(
        self, decoder: Decoder, group: ExpertGroup, cache: KVCache, *, use_graphs: bool = True
    ) -> None:
        self._decoder = decoder
        self._group = group
        self._cache = cache
        self._graphs: DecodeGraphs | None = None
        if use_graphs and DecodeGraphs.serve(group, cache):
            self._graphs = DecodeGraphs(decoder, group, cache)

    def step(self, batch: Batch) -> StepResult:
        """Run the batch; a rank without sequences serves its experts with zero rows."""
        started = time.perf_counter()
        if not sum(batch.tokens_per_rank):
            return self._result(batch, (), started)
        graphs, num_rows = self._graphs, 0
        if graphs is not None:
            # Every rank sees the same numbers, so all of them pad or none does.
            num_rows = graphs.padded(batch.tokens_per_rank)
        self._group.tokens_per_rank = (
            (num_rows,) * len(batch.tokens_per_rank) if num_rows else batch.tokens_per_rank
        )
        if graphs is not None and num_rows and graphs.fits(batch.sequences):
            return self._result(batch, self._replay(graphs, batch, num_rows), started)
        # Ranks that replay a padded step's graph run it whole, so it is cut in two on none.
        rows, sampled = self._forward(batch, whole=num_rows > 0)
        for lane in self._group.lanes:
            lane.count_pairs()
        tokens: tuple[SampledToken, ...] = ()
        if sampled:
            with span("sampler"):
                tokens = choose(self._decoder.logits(rows), sampled)
        return self._result(batch, tokens, started)

    def _forward(self, batch: Batch, *, whole: bool) -> tuple[Tensor, Sampled]:
        """The last rows [sampled, D] of the sequences that get a token, and which these are."""
        decoder = self._decoder
        if not whole and decoder.overlap.cuts_in_two(max(batch.tokens_per_rank)):
            return self._forward_halves(batch)
        with span("inputs"):
            inputs = step_inputs(batch.sequences, self._cache, decoder.rotary)
        hidden = decoder.forward(inputs.token_ids, inputs.attention)
        return hidden.index_select(0, inputs.last_rows), inputs.sampled

    def _forward_halves(self, batch: Batch) -> tuple[Tensor, Sampled]:
        """The same, cut in two on every rank: the exchange of a half behind the other's work."""
        group, tokens = self._group, batch.tokens_per_rank
        first = tuple(count // 2 for count in tokens)
        second = tuple(count - half for count, half in zip(tokens, first, strict=True))
        with span("inputs"):
            halves = [
                step_inputs(sequences, self._cache, self._decoder.rotary)
                for sequences in in_halves(batch.sequences, first[group.rank])
            ]

        def begin_half(half: int) -> None:
            group.tokens_per_rank = (first, second)[half]

        group.in_halves = True
        try:
            hidden = self._decoder.forward_halves(
                [(half.token_ids, half.attention) for half in halves], begin_half
            )
        finally:
            group.in_halves = False
        rows = [
            part.index_select(0, half.last_rows) for part, half in zip(hidden, halves, strict=True)
        ]
        return torch.cat(rows), (*halves[0].sampled, *halves[1].sampled)

    def _replay(
        self, graphs: DecodeGraphs, batch: Batch, num_rows: int
    ) -> tuple[SampledToken, ...]:
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
        if not sampled:
            return ()
        if len(sampled) < len(logits):
            logits = logits[[row for row, _, _ in sampled]]
        with span("sampler"):
            return choose(logits, tuple((number, sampling) for _, number, sampling in sampled))

    def _result(self, batch: Batch, tokens: tuple[SampledToken, ...], started: float) -> StepResult:
        for lane in self._group.lanes:
            self._group.layer_pairs += lane.take_pairs()
            lane.check()
        layer_pairs = self._group.layer_pairs.astype(np.int32)
        self._group.layer_pairs[:] = 0
        return StepResult(
            rank=self._group.rank,
            step=batch.step,
            tokens=tokens,
            expert_tokens=self._decoder.load.take(),
            layer_pairs=layer_pairs,
            seconds=time.perf_counter() - started,
        )


def choose(logits: Tensor, sampled: Sampled) -> tuple[SampledToken, ...]:
    """A token for each row of logits [B, V]: on a GPU there, unless a request asks for more."""
    there = [logits.is_cuda and stays_on_device(step) for _, step in sampled]
    if any(there) and not all(there):
        parts = [[row for row, on_gpu in enumerate(there) if on_gpu == which] for which in (0, 1)]
        return tuple(
            token
            for rows in parts
            for token in choose(logits[rows], tuple(sampled[row] for row in rows))
        )
    if all(there):
        token_ids = sample_rows(logits, [step for _, step in sampled])
        return tuple(
            SampledToken(sequence_id, token)
            for (sequence_id, _), token in zip(sampled, token_ids, strict=True)
        )
    return tuple(
        sample(sequence_id, row, step)
        for (sequence_id, step), row in zip(sampled, logits.cpu().numpy(), strict=True)
    )
