"""The experts that this rank holds, as slots of one pool, and their grouped products."""

from __future__ import annotations

import torch
from torch import Tensor

from lightmoe import kernels
from lightmoe.moe.dispatch.base import Receipt
from lightmoe.quant.packing import ExpertLayout


class SlotPool:
    """All slots of a rank, all layers, in one allocation [S, elements of one expert]."""

    def __init__(
        self, num_slots: int, layout: ExpertLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blobs = torch.zeros(num_slots, layout.num_elements, dtype=dtype, device=device)
        self.gate_up, self.down = layout.views(self.blobs)  # [S, 2F, D], [S, D, F]

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.blobs.numel() * self.blobs.element_size()


class Experts:
    """SwiGLU experts over rows sorted by slot."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool

    def __call__(self, rows: Tensor, receipt: Receipt) -> Tensor:
        """The product of every pair: [R, D] -> [P, D], in the receipt's order."""
        slots, pairs_per_slot = receipt.slots, receipt.pairs_per_slot
        gate_up = kernels.grouped_gemm(
            rows, self._pool.gate_up, slots, pairs_per_slot, receipt.pair_row
        )
        return kernels.grouped_gemm(kernels.swiglu(gate_up), self._pool.down, slots, pairs_per_slot)
