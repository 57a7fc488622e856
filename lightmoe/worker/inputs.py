"""What a rank's plan for one step becomes on its device, sent there in one copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
from lightmoe.layers.batched_attention import AttendTogether


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
    ends = itertools.accumulate(len(sequence.token_ids) for sequence in sequences)
    sampled = [
        (sequence.sequence_id, sequence.sampling, end - 1)
        for sequence, end in zip(sequences, ends, strict=True)
        if sequence.sampling is not None
    ]
    together = is_native(cache.keys)
    tables = tables_of(sequences, cache.block_size)
    token_ids, positions, cache_rows, last_rows, *columns = _upload(
        [
            [token for sequence in sequences for token in sequence.token_ids],
            [position for sequence in sequences for position in _positions(sequence)],
            [row for sequence in sequences for row in cache_rows_of(sequence, cache.block_size)],
            [row for _, _, row in sampled],
            *(_together(sequences, tables) if together else tables),
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
            attend(sequences, columns, cache),
        ),
        tuple((sequence_id, sampling) for sequence_id, sampling, _ in sampled),
        last_rows,
    )


def in_halves(
    sequences: Sequence[SequenceStep], num_tokens: int
) -> tuple[list[SequenceStep], list[SequenceStep]]:
    """The first `num_tokens` tokens of a step and the others; one sequence may be in both."""
    first: list[SequenceStep] = []
    second: list[SequenceStep] = []
    left = num_tokens
    for sequence in sequences:
        count = len(sequence.token_ids)
        if count <= left:
            first.append(sequence)
        elif left <= 0:
            second.append(sequence)
        else:
            head, tail = sequence.token_ids[:left], sequence.token_ids[left:]
            first.append(replace(sequence, token_ids=head, sampling=None))
            second.append(replace(sequence, token_ids=tail, start=sequence.start + left))
        left = max(0, left - count)
    return first, second


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what runs there."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _positions(sequence: SequenceStep) -> range:
    return range(sequence.start, sequence.start + len(sequence.token_ids))


def cache_rows_of(sequence: SequenceStep, block_size: int) -> Iterable[int]:
    """Where in the cache the keys of the sequence's tokens go."""
    for position in _positions(sequence):
        yield sequence.block_table[position // block_size] * block_size + position % block_size


def tables_of(sequences: Sequence[SequenceStep], block_size: int) -> list[list[int]]:
    """The blocks of each sequence that hold what it sees."""
    return [
        list(sequence.block_table[: (_positions(sequence).stop - 1) // block_size + 1])
        for sequence in sequences
    ]


def _together(sequences: Sequence[SequenceStep], tables: list[list[int]]) -> list[list[int]]:
    """Query starts, lengths, and the tables padded to as many blocks each."""
    sizes = (len(sequence.token_ids) for sequence in sequences)
    longest = max(map(len, tables), default=0)
    return [
        list(itertools.accumulate(sizes, initial=0)),
        [_positions(sequence).stop for sequence in sequences],
        pad_tables(tables, longest),
    ]


def pad_tables(tables: Sequence[Sequence[int]], num_blocks: int) -> list[int]:
    """The tables one after the other, each with as many blocks."""
    return [block for table in tables for block in (*table, *[0] * (num_blocks - len(table)))]


def _upload(columns: Sequence[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    packed = send(torch.tensor(list(itertools.chain(*columns)), dtype=torch.int64), device)
    parts: tuple[Tensor, ...] = packed.split([len(column) for column in columns])
    return parts


def _attend_one_by_one(
    sequences: Sequence[SequenceStep], tables: list[Tensor], cache: KVCache
) -> Attend:
    views, begin = [], 0
    for sequence, blocks in zip(sequences, tables, strict=True):
        end = begin + len(sequence.token_ids)
        seen = _positions(sequence).stop
        views.append(view_sequence(begin, end, seen, blocks, cache.keys.dtype))
        begin = end
    return AttendOneByOne(tuple(views))


def _attend_together(
    sequences: Sequence[SequenceStep], columns: list[Tensor], _: KVCache
) -> Attend:
    sizes = [len(column) for column in columns]
    starts, lengths, tables = torch.cat(columns).int().split(sizes)
    most = max((len(sequence.token_ids) for sequence in sequences), default=0)
    tables = tables.view(len(sequences), -1) if sequences else tables.view(0, 0)
    return AttendTogether(tables, starts, lengths, most)
