"""The tokens of the last step, where the next one finds them before the driver has them.

A plan that is made ahead of a step's end names the token that a sequence gets in it UNKNOWN_TOKEN.
In its stead the rank names the row that chose it, and the device, which runs steps in order, looks
the token up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightmoe.core import UNKNOWN_TOKEN, SequenceStep


class ChosenTokens:
    """One token of each row that chose, int64 [capacity], always in the same memory."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._rows: dict[int, int] = {}

    def put(self, tokens: Tensor) -> None:
        """The tokens [rows] of a step, on its device."""
        self._tokens[: len(tokens)].copy_(tokens)

    def first(self, count: int) -> Tensor:
        """The tokens of that many rows, which the next step overwrites."""
        return self._tokens[:count]

    def belong_to(self, sequence_ids: Sequence[int]) -> None:
        """Whose the rows of the step are that is enqueued now."""
        self._rows = {sequence_id: row for row, sequence_id in enumerate(sequence_ids)}

    def place_of(self, sequence_id: int) -> int:
        """What stands for the sequence's last token: -1 - its row."""
        return -1 - self._rows[sequence_id]

    def named(self, sequence: SequenceStep) -> SequenceStep:
        """With its place for a token that is unknown."""
        if sequence.token_ids[-1] != UNKNOWN_TOKEN:
            return sequence
        place = self.place_of(sequence.sequence_id)
        return replace(sequence, token_ids=(*sequence.token_ids[:-1], place))

    def fill(self, token_ids: Tensor) -> Tensor:
        """Tokens in place of places, int64 [T]. What was no token is 0: its sequence has ended."""
        rows = (-1 - token_ids).clamp_(min=0)
        chosen = self._tokens.index_select(0, rows)
        return torch.where(token_ids < 0, chosen, token_ids).clamp_(min=0)
