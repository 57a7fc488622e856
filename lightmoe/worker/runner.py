"""One step on one rank: a Batch in, the model over its rows, chosen tokens out."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import Batch, SampledToken, SequenceStep, StepResult
from lightmoe.layers.attention import AttentionStep, KVCache, SequenceView, view_sequence
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.worker.sampler import sample


class Runner:
    """Turns plans into tensors. It knows the model, the cache and the group, not the engine."""

    def __init__(self, decoder: Decoder, group: ExpertGroup, cache: KVCache) -> None:
        self._decoder = decoder
        self._group = group
        self._cache = cache
        self._device = cache.keys.device

    def step(self, batch: Batch) -> StepResult:
        """Run the batch; a rank without sequences serves its experts with zero rows."""
        started = time.perf_counter()
        if not sum(batch.tokens_per_rank):
            return self._result(batch, (), started)
        self._group.tokens_per_rank = batch.tokens_per_rank
        token_ids = [token for sequence in batch.sequences for token in sequence.token_ids]
        attention = self._attention_step(batch.sequences)
        hidden = self._decoder.forward(self._tensor(token_ids), attention)
        return self._result(
            batch, self._sample(batch.sequences, attention.sequences, hidden), started
        )

    def _result(self, batch: Batch, tokens: tuple[SampledToken, ...], started: float) -> StepResult:
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

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _attention_step(self, sequences: tuple[SequenceStep, ...]) -> AttentionStep:
        block_size = self._cache.block_size
        cache_rows: list[int] = []
        positions: list[int] = []
        views: list[SequenceView] = []
        begin = 0
        for sequence in sequences:
            end, seen = begin + len(sequence.token_ids), sequence.start + len(sequence.token_ids)
            for position in range(sequence.start, seen):
                positions.append(position)
                block = sequence.block_table[position // block_size]
                cache_rows.append(block * block_size + position % block_size)
            blocks = self._tensor(list(sequence.block_table))
            views.append(view_sequence(begin, end, seen, blocks, self._cache.keys.dtype))
            begin = end
        tables = self._decoder.rotary.tables(self._tensor(positions), self._cache.keys.dtype)
        return AttentionStep(self._cache, self._tensor(cache_rows), tables, tuple(views))

    def _sample(
        self, sequences: tuple[SequenceStep, ...], views: tuple[SequenceView, ...], hidden: Tensor
    ) -> tuple[SampledToken, ...]:
        """A token for every sequence whose prompt is finished."""
        chosen = [
            (sequence.sequence_id, sequence.sampling, view.end - 1)
            for sequence, view in zip(sequences, views, strict=True)
            if sequence.sampling is not None
        ]
        if not chosen:
            return ()
        last = hidden.index_select(0, self._tensor([row for _, _, row in chosen]))
        logits = self._decoder.logits(last).cpu().numpy()
        return tuple(
            sample(sequence_id, row, sampling)
            for (sequence_id, sampling, _), row in zip(chosen, logits, strict=True)
            if sampling is not None
        )
