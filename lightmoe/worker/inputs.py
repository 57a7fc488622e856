"""What a rank's plan for one step becomes on its device, sent there in one copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightmoe.core import SamplingStep, SequenceStep
from lightmoe.kernels.checks import is_native
from lightmoe.layers.attention import (
    Attend,
    AttendOneByOne,
    AttentionStep,
    KVCache,
    view_sequence,
)
from lightmoe.layers.basic import Rotary
from lightmoe.layers.batched_attention import AttendTogether, group_queries


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tokens [T] of all sequences, one after the other, and what attention must know of them.

    `sampled` names the sequences that get a token, and `last_rows` [sampled] their last rows.
    """

    token_ids: Tensor
    attention: AttentionStep
    sampled: tuple[tuple[int, SamplingStep], ...]
    last_rows: Tensor


def step_inputs(sequences: Sequence[SequenceStep], cache: KVCache, rotary: Rotary) -> StepInputs:
    """The inputs of these sequences' next step."""
    together = is_native(cache.keys)
    runs = _runs(sequences) if together else [[sequence] for sequence in sequences]
    ordered = [sequence for run in runs for sequence in run]
    tables = [_block_table(run, cache.block_size) for run in runs]
    ends = itertools.accumulate(len(sequence.token_ids) for sequence in ordered)
    sampled = [
        (sequence.sequence_id, sequence.sampling, end - 1)
        for sequence, end in zip(ordered, ends, strict=True)
        if sequence.sampling is not None
    ]
    token_ids, positions, cache_rows, last_rows, *block_tables = _upload(
        [
            [token for sequence in ordered for token in sequence.token_ids],
            [position for sequence in ordered for position in _positions(sequence)],
            [row for sequence in ordered for row in _cache_rows(sequence, cache.block_size)],
            [row for _, _, row in sampled],
            *tables,
        ],
        cache.keys.device,
    )
    attend = _attend_together if together else _attend_one_by_one
    return StepInputs(
        token_ids,
        AttentionStep(
            cache,
            cache_rows,
            rotary.tables(positions, cache.keys.dtype),
            attend(runs, positions, block_tables, cache),
        ),
        tuple((sequence_id, sampling) for sequence_id, sampling, _ in sampled),
        last_rows,
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what runs there."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _runs(sequences: Sequence[SequenceStep]) -> list[list[SequenceStep]]:
    """Sequences whose attention runs together: those with one token that are about as long."""
    by_length = sorted(sequences, key=_length_class)
    runs: list[list[SequenceStep]] = []
    for length_class, together in itertools.groupby(by_length, key=_length_class):
        run = list(together)
        runs += [run] if length_class else [[sequence] for sequence in run]
    return runs


def _length_class(sequence: SequenceStep) -> int:
    """0 for a piece of a prompt; so padding at most doubles what a sequence attends over."""
    return 0 if len(sequence.token_ids) > 1 else (sequence.start + 1).bit_length()


def _positions(sequence: SequenceStep) -> range:
    return range(sequence.start, sequence.start + len(sequence.token_ids))


def _cache_rows(sequence: SequenceStep, block_size: int) -> Iterable[int]:
    for position in _positions(sequence):
        yield sequence.block_table[position // block_size] * block_size + position % block_size


def _block_table(run: Sequence[SequenceStep], block_size: int) -> list[int]:
    """The blocks of each sequence of a run, padded to as many each."""
    tables = [
        sequence.block_table[: (_positions(sequence).stop - 1) // block_size + 1]
        for sequence in run
    ]
    longest = max(map(len, tables))
    return [block for table in tables for block in (*table, *[0] * (longest - len(table)))]


def _upload(columns: Sequence[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    packed = send(torch.tensor(list(itertools.chain(*columns)), dtype=torch.int64), device)
    parts: tuple[Tensor, ...] = packed.split([len(column) for column in columns])
    return parts


def _attend_one_by_one(
    runs: list[list[SequenceStep]], _: Tensor, block_tables: list[Tensor], cache: KVCache
) -> Attend:
    views, begin = [], 0
    for (sequence,), blocks in zip(runs, block_tables, strict=True):
        end = begin + len(sequence.token_ids)
        seen = _positions(sequence).stop
        views.append(view_sequence(begin, end, seen, blocks, cache.keys.dtype))
        begin = end
    return AttendOneByOne(tuple(views))


def _attend_together(
    runs: list[list[SequenceStep]],
    positions: Tensor,
    block_tables: list[Tensor],
    cache: KVCache,
) -> Attend:
    groups, begin = [], 0
    for run, blocks in zip(runs, block_tables, strict=True):
        end = begin + sum(len(sequence.token_ids) for sequence in run)
        tokens = slice(begin, end)
        by_sequence = positions[tokens].view(len(run), -1)
        groups.append(group_queries(tokens, by_sequence, blocks.view(len(run), -1), cache))
        begin = end
    return AttendTogether(tuple(groups))
