"""Decode steps as CUDA graphs: what a step launches is recorded once, and replayed in one call.

A graph serves up to `batch` sequences of one token each, padded: rows behind the last one compute
what the first sequence does, into a block of the cache that nobody reads, and count for nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightmoe.core import SequenceStep
from lightmoe.kernels.checks import is_native
from lightmoe.kernels.exchange import COUNTED_PAIRS
from lightmoe.layers.attention import AttentionStep, KVCache
from lightmoe.layers.batched_attention import AttendTogether
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.worker.inputs import cache_rows_of, pad_tables, send, tables_of

logger = logging.getLogger(__name__)

MAX_BATCH = 64


def bucket(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, where it reads a step from, and the logits [B, V] that it writes.

    `numbers` int64 holds how many sequences are real, then token, position and cache row of each,
    then their block tables.
    """

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    logits: Tensor


class DecodeGraphs:
    """The graphs of one rank, made when they are first needed: by batch and longest sequence."""

    def __init__(self, decoder: Decoder, group: ExpertGroup, cache: KVCache) -> None:
        self._decoder = decoder
        self._group = group
        self._cache = cache
        self._recorded: dict[tuple[int, int, str], _Recorded] = {}
        self._pool: Any = None
        per_token = decoder.num_experts_per_token
        self.max_batch = min(MAX_BATCH, COUNTED_PAIRS // per_token)

    @staticmethod
    def serve(group: ExpertGroup, cache: KVCache) -> bool:
        """Whether steps here may be graphs: 16 bits on a GPU, and no host in the exchange."""
        no_host = group.communicator is None or group.peers is not None
        return is_native(cache.keys) and no_host

    def padded(self, tokens_per_rank: Sequence[int]) -> int:
        """Tokens that every rank takes a step for, 0 where the step is too large."""
        most = max(tokens_per_rank)
        return bucket(most) if most <= self.max_batch else 0

    def fits(self, sequences: Sequence[SequenceStep]) -> bool:
        """Whether a graph can run these: one token of each."""
        return all(len(sequence.token_ids) == 1 for sequence in sequences)

    def run(self, sequences: Sequence[SequenceStep], batch: int) -> Tensor:
        """One token of each sequence, padded to `batch` -> logits [sequences, V]."""
        length = max((sequence.start + 1 for sequence in sequences), default=1)
        num_blocks = bucket(-(-length // self._cache.block_size))
        key = (batch, num_blocks, self._group.route)
        numbers = self._numbers(sequences, batch, num_blocks)
        if key in self._recorded:
            recorded = self._recorded[key]
            recorded.numbers.copy_(numbers)
            recorded.graph.replay()
            return recorded.logits[: len(sequences)]
        # The ranks meet once a step in any case, so the first time is the step itself.
        logits = self._forward(numbers, batch, num_blocks)
        self._recorded[key] = self._record(numbers, batch, num_blocks)
        return logits[: len(sequences)]

    def _numbers(self, sequences: Sequence[SequenceStep], batch: int, num_blocks: int) -> Tensor:
        """The step as one tensor on the device, sent there in one copy."""
        block_size, scratch = self._cache.block_size, self._cache.scratch_row
        tokens = [sequence.token_ids[0] for sequence in sequences]
        positions = [sequence.start for sequence in sequences]
        cache_rows = [row for one in sequences for row in cache_rows_of(one, block_size)]
        tables = tables_of(sequences, block_size)
        missing = batch - len(tokens)
        tokens += (tokens[:1] or [0]) * missing
        positions += (positions[:1] or [0]) * missing
        cache_rows += [scratch] * missing
        tables += (tables[:1] or [[scratch // block_size]]) * missing
        flat = [len(sequences), *tokens, *positions, *cache_rows, *pad_tables(tables, num_blocks)]
        return send(torch.tensor(flat, dtype=torch.int64), self._cache.keys.device)

    def _record(self, numbers: Tensor, batch: int, num_blocks: int) -> _Recorded:
        """Record the step that has just run, which has loaded all it needs. Nothing runs here."""
        started = time.perf_counter()
        static, graph = numbers.clone(), torch.cuda.CUDAGraph()
        # Other threads of this process may talk to the driver meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(static, batch, num_blocks)
        self._pool = self._pool or graph.pool()
        logger.info(
            "recorded a graph of %d sequences of up to %d positions in %.2f s",
            batch,
            num_blocks * self._cache.block_size,
            time.perf_counter() - started,
        )
        return _Recorded(graph, static, logits)

    def _forward(self, numbers: Tensor, batch: int, num_blocks: int) -> Tensor:
        decoder, group, cache = self._decoder, self._group, self._cache
        num_real, token_ids, positions, cache_rows, tables = numbers.split(
            [1, batch, batch, batch, batch * num_blocks]
        )
        rows = torch.arange(batch, device=numbers.device)
        real = (rows < num_real).int()
        attend = AttendTogether(
            tables.int().view(batch, num_blocks),
            torch.arange(batch + 1, dtype=torch.int32, device=numbers.device),
            (positions + 1).int(),
            max_queries=1,
        )
        step = AttentionStep(
            cache,
            cache_rows,
            decoder.rotary.tables(positions, cache.keys.dtype),
            attend,
        )
        group.num_real = num_real.int()
        decoder.load.counted = real.repeat_interleave(decoder.num_experts_per_token)
        try:
            hidden = decoder.forward(token_ids, step)
        finally:
            group.num_real = decoder.load.counted = None
        if group.peers is not None:
            group.peers.count_pairs()
        return decoder.logits(hidden)
