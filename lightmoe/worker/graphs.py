"""Decode steps as CUDA graphs: what a step launches is recorded once, and replayed in one call.

A graph serves up to `batch` sequences of one token each, padded: rows behind the last one compute
what the first sequence does, into a block of the cache that nobody reads, and count for nobody.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightmoe.core import UNKNOWN_TOKEN, SequenceStep
from lightmoe.kernels.checks import is_native
from lightmoe.kernels.exchange import COUNTED_PAIRS
from lightmoe.kernels.products import make_room_on_stream
from lightmoe.layers.attention import AttentionStep, KVCache
from lightmoe.layers.batched_attention import AttendTogether
from lightmoe.models.decoder import Decoder
from lightmoe.moe.dispatch import ExpertGroup
from lightmoe.worker.chosen import ChosenTokens
from lightmoe.worker.device_sampler import best_rows
from lightmoe.worker.inputs import send

logger = logging.getLogger(__name__)

MAX_BATCH = 64
MAX_GRAPHS = 64
"""Of a rank; a graph is some megabytes of host and device memory."""

_Key = tuple[int, int, str]
"""Rows, blocks of the longest sequence, and how experts are routed."""


def bucket(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, where it reads a step from, and the logits [B, V] that it writes.

    `numbers` int64 holds how many sequences are real, then token, position and cache row of each,
    then their block tables. A token below 0 is a place of ChosenTokens.
    """

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    logits: Tensor


class DecodeGraphs:
    """The graphs of one rank, made when they are first needed: by batch and longest sequence."""

    def __init__(
        self, decoder: Decoder, group: ExpertGroup, cache: KVCache, chosen: ChosenTokens
    ) -> None:
        self._chosen = chosen
        self._decoder = decoder
        self._group = group
        self._cache = cache
        self._recorded: OrderedDict[_Key, _Recorded] = OrderedDict()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
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

    def has(self, sequences: Sequence[SequenceStep], batch: int) -> bool:
        """Whether a graph of this step is recorded."""
        return self.fits(sequences) and self._key(sequences, batch) in self._recorded

    def _key(self, sequences: Sequence[SequenceStep], batch: int) -> _Key:
        length = max((sequence.start + 1 for sequence in sequences), default=1)
        return batch, bucket(-(-length // self._cache.block_size)), self._group.route

    def run(self, sequences: Sequence[SequenceStep], batch: int) -> Tensor:
        """One token of each sequence, padded to `batch` -> logits [sequences, V].

        The likeliest token of each row is what the next step finds, unless others are put there.
        """
        key = self._key(sequences, batch)
        numbers = torch.from_numpy(self._numbers(sequences, batch, key[1]))
        if key in self._recorded:
            recorded = self._recorded[key]
            self._recorded.move_to_end(key)
            recorded.numbers.copy_(numbers.pin_memory(), non_blocking=True)
            recorded.graph.replay()
            return recorded.logits[: len(sequences)]
        # The ranks meet once a step in any case, so the first time is the step itself.
        sent = send(numbers, self._cache.keys.device)
        logits = self._forward(sent, batch, key[1])
        self._recorded[key] = self._record(sent, batch, key[1])
        return logits[: len(sequences)]

    def _numbers(
        self, sequences: Sequence[SequenceStep], batch: int, num_blocks: int
    ) -> np.ndarray:
        """The step as one array int64, as `_Recorded` says."""
        block_size, scratch = self._cache.block_size, self._cache.scratch_row
        count = len(sequences)
        numbers = np.zeros(1 + batch * (3 + num_blocks), dtype=np.int64)
        numbers[0] = count
        tokens, positions, cache_rows = numbers[1 : 1 + 3 * batch].reshape(3, batch)
        tables = numbers[1 + 3 * batch :].reshape(batch, num_blocks)
        cache_rows[count:], tables[count:, 0] = scratch, scratch // block_size
        for row, sequence in enumerate(sequences):
            token, start, table = sequence.token_ids[0], sequence.start, sequence.block_table
            last = start // block_size
            unknown = token == UNKNOWN_TOKEN
            tokens[row] = self._chosen.place_of(sequence.sequence_id) if unknown else token
            positions[row] = start
            cache_rows[row] = table[last] * block_size + start % block_size
            tables[row, : last + 1] = table[: last + 1]
        if count:
            for column in (tokens, positions, tables):
                column[count:] = column[0]
        return numbers

    def _record(self, numbers: Tensor, batch: int, num_blocks: int) -> _Recorded:
        """Record the step that has just run, which has loaded all it needs. Nothing runs here."""
        started = time.perf_counter()
        while len(self._recorded) >= MAX_GRAPHS:
            torch.cuda.synchronize()  # it may be running
            forgotten, _ = self._recorded.popitem(last=False)
            logger.info("forgot the graph of %s, the one that was not used longest", forgotten)
        static, graph = numbers.clone(), torch.cuda.CUDAGraph()
        stream = self._capture_stream(numbers.device)
        # Other threads of this process may talk to the driver meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits = self._forward(static, batch, num_blocks)
        self._pool = self._pool or graph.pool()
        logger.info(
            "recorded a graph of %d sequences of up to %d positions in %.2f s",
            batch,
            num_blocks * self._cache.block_size,
            time.perf_counter() - started,
        )
        return _Recorded(graph, static, logits)

    def _capture_stream(self, device: torch.device) -> torch.cuda.Stream:
        """One for all graphs, for which the kernels' own memory is there: none zeroes it again."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                make_room_on_stream(device)
            self._stream.synchronize()
        return self._stream

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
            hidden = decoder.forward(self._chosen.fill(token_ids), step)
        finally:
            group.num_real = decoder.load.counted = None
        if group.peers is not None:
            group.peers.pair_counter.count()
        logits = decoder.logits(hidden)
        self._chosen.put(best_rows(logits))
        return logits
