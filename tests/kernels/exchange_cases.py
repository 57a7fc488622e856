"""Ranks whose tokens and experts are made up, as the kernels of the exchange see them, and the
arithmetic of that exchange in plain torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightmoe.kernels import reference
from lightmoe.kernels.exchange import MAX_RANKS, RowBlock
from tests.moe.cases import random_copies

POSITION_BITS = 20
_Addresses = ctypes.c_void_p * MAX_RANKS
_PULLED = ("weights", "pair_weight", "output_rows", "prefixes", "rows")
_Numbers = ctypes.c_int * MAX_RANKS


class PlacesArgs(ctypes.Structure):
    """light_places."""

    _fields_ = [
        ("segments", ctypes.c_void_p),
        ("copy_ranks", ctypes.c_void_p),
        ("num_experts", ctypes.c_int),
        ("num_copies", ctypes.c_int),
    ]


class ChunkArgs(ctypes.Structure):
    """light_chunk."""

    _fields_ = [
        ("begin", _Numbers),
        ("count", _Numbers),
        ("places", PlacesArgs),
        ("choices", ctypes.c_void_p),
        ("choice_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rank", "num_ranks", "num_experts_per_token")),
    ]


class PullArgs(ctypes.Structure):
    """light_exchange_pull_args."""

    _fields_ = [
        ("hidden", _Addresses),
        ("results", _Addresses),
        ("chunk", ChunkArgs),
        *((name, ctypes.c_void_p) for name in _PULLED),
        ("scale_offset", ctypes.c_longlong),
        ("width_bytes", ctypes.c_int),
    ]


class SumArgs(ctypes.Structure):
    """light_exchange_sum_args."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("sums", _Addresses),
        ("chunk", ChunkArgs),
        ("scale_offset", ctypes.c_longlong),
        ("width_bytes", ctypes.c_int),
    ]


class GiveArgs(ctypes.Structure):
    """light_exchange_give_args."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pairs", "output_rows", "num_pairs")),
        *((name, ctypes.c_int) for name in ("most_pairs", "width_bytes")),
    ]


class CombineArgs(ctypes.Structure):
    """light_exchange_combine_args."""

    _fields_ = [
        ("results", _Addresses),
        ("places", PlacesArgs),
        *((name, ctypes.c_void_p) for name in ("prefixes", "choices", "weights", "output")),
        ("scale_offset", ctypes.c_longlong),
        *(
            (name, ctypes.c_int)
            for name in (
                *("first_token", "num_tokens", "rank", "num_experts_per_token", "width_bytes"),
                *("together", "summed"),
            )
        ),
    ]


class CountArgs(ctypes.Structure):
    """light_exchange_count_args."""

    _fields_ = [
        ("chunk", ChunkArgs),
        ("rows_sent", ctypes.c_void_p),
        ("results_sent", ctypes.c_void_p),
        ("summed", ctypes.c_int),
    ]


@dataclass
class Ranks:
    """W ranks of T tokens with K experts each, of which one chunk, `spans`, is exchanged.

    `target` and `position` [W, T, K] say where each pair of the chunk is computed; -1: nowhere.
    """

    block: RowBlock
    dtype: torch.dtype
    spans: list[slice]
    hidden: Tensor  # [W, T, D]
    weights: Tensor  # fp32 [W, T, K]
    choices: Tensor  # int32 [W, T * K]
    segments: Tensor  # int32 [W, E, copies, 2]
    copy_ranks: Tensor  # int32 [E, copies]
    prefixes: Tensor  # int32 [W, E + 1]
    target: Tensor
    position: Tensor
    num_pairs: list[int]

    @classmethod
    def random(cls, seed: int, dtype: torch.dtype, as_int8: bool) -> Ranks:
        """Any sizes, replicas, ranks without tokens, tokens that go nowhere."""
        numbers = np.random.default_rng(seed)
        num_ranks, per_token = int(numbers.integers(1, 6)), int(numbers.integers(1, 7))
        num_experts, num_tokens = int(numbers.integers(per_token, 14)), 17
        width = 16 * int(numbers.integers(1, 80))
        copies = random_copies(numbers, num_experts, num_ranks, int(numbers.integers(8)))
        most = max(map(len, copies))
        table = torch.tensor([[*ranks, *[-1] * (most - len(ranks))] for ranks in copies]).int()
        ends = [sorted(numbers.integers(0, num_tokens + 1, size=2)) for _ in range(num_ranks)]
        spans = [slice(int(first), int(end)) for first, end in ends]
        experts = np.stack(
            [
                [numbers.permutation(num_experts)[:per_token] for _ in range(num_tokens)]
                for _ in range(num_ranks)
            ]
        )
        experts[numbers.random(experts.shape[:2]) < 0.1] = -1
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num_ranks, num_tokens, width, generator=generator)
        hidden *= 10 ** torch.empty(num_ranks, num_tokens, 1).uniform_(-3, 3, generator=generator)
        hidden[torch.rand(num_ranks, num_tokens, generator=generator) < 0.1] = 0
        ranks = cls(
            block=RowBlock(num_tokens, width, dtype.itemsize, as_int8),
            dtype=dtype,
            spans=spans,
            hidden=hidden.to(dtype),
            weights=torch.rand(num_ranks, num_tokens, per_token, generator=generator),
            choices=torch.full((num_ranks, num_tokens * per_token), -1, dtype=torch.int32),
            segments=torch.zeros(num_ranks, num_experts, most, 2, dtype=torch.int32),
            copy_ranks=table,
            prefixes=torch.zeros(num_ranks, num_experts + 1, dtype=torch.int32),
            target=torch.full(experts.shape, -1),
            position=torch.full(experts.shape, -1),
            num_pairs=[0] * num_ranks,
        )
        ranks._place(numbers, experts)
        return ranks

    def _place(self, numbers: np.random.Generator, experts: np.ndarray) -> None:
        """Deal each source's pairs of an expert to its copies, at any cut, side by side there."""
        num_ranks, _, per_token = experts.shape
        for expert, table in enumerate(self.copy_ranks.tolist()):
            held = [rank for rank in table if rank >= 0]
            for source in range(num_ranks):
                span = self.spans[source]
                where = np.argwhere(experts[source, span] == expert) + [span.start, 0]
                cuts = sorted(numbers.integers(0, len(where) + 1, size=len(held) - 1))
                for copy, (begin, end) in enumerate(
                    zip([0, *cuts], [*cuts, len(where)], strict=True)
                ):
                    rank = held[copy]
                    base = self.num_pairs[rank]
                    self.segments[source, expert, copy] = torch.tensor([end, base])
                    for number in range(begin, end):
                        token, k = where[number]
                        self.target[source, token, k] = rank
                        self.position[source, token, k] = base + number - begin
                        choice = expert << POSITION_BITS | number
                        self.choices[source, token * per_token + k] = choice
                    self.num_pairs[rank] += end - begin
                self.prefixes[source, expert + 1 :] += len(where)
                self.segments[source, expert, len(held) :] = self.segments[
                    source, expert, len(held) - 1
                ]

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.spans)

    def places(self) -> PlacesArgs:
        """As the kernels take them."""
        return PlacesArgs(
            self.segments.data_ptr(), self.copy_ranks.data_ptr(), *self.copy_ranks.shape
        )

    def chunk(self, rank: int) -> ChunkArgs:
        """The chunk as one rank sees it."""
        return ChunkArgs(
            _Numbers(*(span.start for span in self.spans)),
            _Numbers(*(span.stop - span.start for span in self.spans)),
            self.places(),
            self.choices.data_ptr(),
            self.choices.shape[1],
            rank,
            self.num_ranks,
            self.weights.shape[2],
        )

    def result_rows(self) -> Tensor:
        """Where each pair's result lies on its token's rank: by expert, then position [W, T, K]."""
        choices = self.choices.view(self.weights.shape).long()
        first = torch.tensor([span.start for span in self.spans]) * self.weights.shape[2]
        expert, position = choices >> POSITION_BITS, choices % (1 << POSITION_BITS)
        before = self.prefixes.long().gather(1, expert.clamp(min=0).flatten(1)).view_as(expert)
        return first[:, None, None] + before + position

    def blocks(self, num_blocks: int) -> Tensor:
        """Room for so many blocks, poisoned: uint8 [blocks, bytes]."""
        return torch.full((num_blocks, self.block.num_bytes), 0xC7, dtype=torch.uint8)

    def published(self) -> Tensor:
        """The hidden states of all ranks as they lie in the arenas: uint8 [W, bytes]."""
        arenas = self.blocks(self.num_ranks)
        for arena, hidden in zip(arenas, self.hidden, strict=True):
            if self.block.as_int8:
                codes, scales = reference.permute_int8(hidden, torch.arange(len(hidden)))
                self._codes(arena).copy_(codes)
                self._scales(arena).copy_(scales)
            else:
                self._rows(arena).copy_(hidden)
        return arenas

    def _rows(self, arena: Tensor) -> Tensor:
        size = self.block.num_rows * self.block.row_bytes
        return arena[:size].view(self.dtype).view(self.block.num_rows, -1)

    def _codes(self, arena: Tensor) -> Tensor:
        return arena[: self.block.scale_offset].view(torch.int8).view(self.block.num_rows, -1)

    def _scales(self, arena: Tensor) -> Tensor:
        return arena[self.block.scale_offset :][: 4 * self.block.num_rows].view(torch.float32)

    def pulled(self) -> Tensor:
        """What a token's row becomes on any rank [W, T, D]."""
        if not self.block.as_int8:
            return self.hidden
        flat = self.hidden.flatten(0, 1)
        codes, scales = reference.permute_int8(flat, torch.arange(len(flat)))
        return reference.dequantize_rows(codes, scales, self.dtype).view_as(self.hidden)

    def sum_here(self, pairs: Tensor, rank: int, source: int, token: int) -> Tensor | None:
        """The float32 sum [D] of a token's results on a rank, in ascending k; None: it has none."""
        target, position = self.target[source, token], self.position[source, token]
        total = None
        for k in range(len(target)):
            if target[k] == rank:
                total = torch.zeros(pairs.shape[1]) if total is None else total
                total += pairs[position[k]].float()
        return total

    def as_it_travels(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """A sum's numbers or codes [D], and its scale."""
        if not self.block.as_int8:
            return total.to(self.dtype), None
        codes, scales = reference.permute_int8(total[None], torch.zeros(1, dtype=torch.int64))
        return codes[0], scales[0]

    def combined(self, results: list[Tensor], source: int, token: int) -> Tensor:
        """The sum of a token's sums, over ascending ranks [D]."""
        total = torch.zeros(results[0].shape[1])
        for rank, pairs in enumerate(results):
            here = self.sum_here(pairs, rank, source, token)
            if here is not None:
                numbers, scale = self.as_it_travels(here)
                total += numbers.float() if scale is None else scale * numbers.float()
        return total.to(self.dtype)

    def addresses(self, arenas: Tensor) -> ctypes.Array:
        """Of the first block of each."""
        return _Addresses(*(arena.data_ptr() for arena in arenas))
