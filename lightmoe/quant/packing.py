"""The one blob layout of an expert: what a slot holds, and what a migration moves.

[ gate F x D | up F x D | down D x F ]      row-major, one dtype, no padding
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Sizes of one expert: D model width, F expert width."""

    hidden_size: int
    expert_size: int

    @property
    def num_elements(self) -> int:
        """Elements of one blob."""
        return 3 * self.hidden_size * self.expert_size

    def views(self, blobs: Tensor) -> tuple[Tensor, Tensor]:
        """Blobs [S, elements] as gate_up [S, 2F, D] and down [S, D, F], sharing memory."""
        border = 2 * self.hidden_size * self.expert_size
        gate_up = blobs[:, :border].unflatten(1, (2 * self.expert_size, self.hidden_size))
        down = blobs[:, border:].unflatten(1, (self.hidden_size, self.expert_size))
        return gate_up, down

    def write(self, blob: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Fill one blob [elements] from gate, up [F, D] and down [D, F]."""
        gate_up_view, down_view = self.views(blob.unsqueeze(0))
        gate_up_view[0, : self.expert_size] = gate
        gate_up_view[0, self.expert_size :] = up
        down_view[0] = down
