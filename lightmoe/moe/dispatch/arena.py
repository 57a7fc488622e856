"""What lies where in the arenas: memory of every rank that all ranks' kernels address."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightmoe.errors import UsageError
from lightmoe.kernels.exchange import MAX_RANKS, MAX_TOKENS, RowBlock
from lightmoe.moe.overlap_model import MAX_CHUNKS

_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """What lies where in every rank's arena; `max_tokens` is what one rank runs in a step.

    With `summed` ranks give one weighted sum a token (summing.py), with `as_int8` that and the
    hidden states as int8.
    """

    num_ranks: int
    max_tokens: int
    num_experts: int
    num_experts_per_token: int
    width: int
    element_bytes: int
    summed: bool = False
    as_int8: bool = False

    def __post_init__(self) -> None:
        if self.num_ranks > MAX_RANKS or self.max_tokens >= MAX_TOKENS:
            raise UsageError(
                f"{self.num_ranks} ranks of {self.max_tokens} tokens a step; transport copy_engine"
                f" takes at most {MAX_RANKS} of fewer than {MAX_TOKENS}; use --transport nccl"
            )
        if self.as_int8 and (self.element_bytes != 2 or self.width % 16 or not self.summed):
            raise UsageError(
                f"payload int8 for rows of {self.width} numbers of {self.element_bytes} bytes,"
                f" summed {self.summed}; it takes a multiple of 16 of 2 bytes, and sums;"
                " use --payload full"
            )

    @property
    def max_pairs(self) -> int:
        """Pairs that one rank may have to compute for a step: all of them."""
        return self.num_ranks * self.max_tokens * self.num_experts_per_token

    @property
    def choice_stride(self) -> int:
        """Choices that a rank has room for."""
        return self.max_tokens * self.num_experts_per_token

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, in order."""
        prefixes = MAX_CHUNKS * self.num_ranks * (self.num_experts + 1)
        choices = self.num_ranks * self.choice_stride
        return {
            "choice_flags": 4 * MAX_RANKS,
            "pair_flags": 4 * MAX_RANKS,
            "choices": 4 * choices,
            "prefixes": 4 * prefixes,
            "weights": 4 * choices if self.summed else 0,
            "hidden": self.block.num_bytes,
            "results": self.num_ranks * self.block.num_bytes if self.summed else self._result_bytes,
        }

    @cached_property
    def block(self) -> RowBlock:
        """The hidden states of a rank, or the sums that a rank has for another's tokens."""
        return RowBlock(self.max_tokens, self.width, self.element_bytes, self.as_int8)

    @property
    def row_bytes(self) -> int:
        """Of a row that does not travel."""
        return self.width * self.element_bytes

    @property
    def _pair_bytes(self) -> int:
        return self.max_pairs * self.row_bytes

    @property
    def _result_bytes(self) -> int:
        """Of this rank's own tokens."""
        return self.choice_stride * self.row_bytes

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each part begins, and `end`."""
        padded = [-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in self.sizes.values()]
        return dict(zip((*self.sizes, "end"), itertools.accumulate(padded, initial=0), strict=True))

    @property
    def num_bytes(self) -> int:
        """Size of an arena."""
        return self.offsets["end"]

    @property
    def device_bytes(self) -> int:
        """What a rank needs beside its arena, at most.

        The pulled rows, and the addresses of their results, or results and weights to sum.
        """
        if self.summed:
            return 2 * self._pair_bytes + 4 * self.max_pairs
        carried = 0 if self.element_bytes == 2 else self._pair_bytes
        return self._pair_bytes + carried + self._result_bytes + 8 * self.max_pairs


def view_arena(arena: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of an arena as a tensor."""
    num_bytes = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    return arena[offset : offset + num_bytes].view(dtype).view(shape)
