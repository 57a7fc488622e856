"""Rows on their way from a card to the host's memory: chunk by chunk, beside what computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightmoe.kernels.streams import follow, on_stream
from lightmoe.moe.overlap_model import chunk_of


class Upload:
    """What one lane uploads, on a stream that lanes share.

    The card's copy engine carries the rows: a kernel would wait for the bus.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._arrived: list[torch.cuda.Event] = []

    def of_another_lane(self) -> Upload:
        """On the same stream."""
        return Upload(self.stream)

    @property
    def num_chunks(self) -> int:
        """Of what was begun last."""
        return len(self._arrived)

    def begin(
        self, parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int, num_chunks: int
    ) -> None:
        """Copy `num_tokens` rows of each source to its target, after what runs here has written.

        Sources must neither change nor be freed before the current stream, or one that it follows,
        has waited for the last chunk.
        """
        current = torch.cuda.current_stream(parts[0][0].device)
        follow(self.stream, current)
        self._arrived = []
        with on_stream(self.stream, current):
            for chunk in range(num_chunks):
                self._copy(parts, chunk_of(num_tokens, chunk, num_chunks))
                self._arrived.append(self.stream.record_event())

    def wait(self, chunk: int) -> None:
        """Let the current stream wait for a chunk: with the last one, for all."""
        self._arrived[chunk].wait()

    def _copy(self, parts: Sequence[tuple[Tensor, Tensor]], rows: slice) -> None:
        for source, target in parts:
            target[rows].copy_(source[rows], non_blocking=True)
