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
    """SwiGLU experts over pairs sorted by slot."""

    def __init__(self, pool: SlotPool, *, deterministic: bool = True) -> None:
        self._pool = pool
        self._deterministic = deterministic

    def tokens_per_tile(self, num_pairs: int, num_groups: int) -> int:
        """How many pairs a tile of both products has."""
        return kernels.tokens_per_tile(
            self._pool.gate_up,
            num_pairs,
            num_groups,
            swiglu=True,
            deterministic=self._deterministic,
        )

    def __call__(
        self,
        rows: Tensor,
        receipt: Receipt,
        *,
        output: Tensor | None = None,
        max_ctas: int | None = None,
    ) -> Tensor:
        """`up` and `down`: [R, D] -> [P, D]."""
        inner = self.up(rows, receipt, max_ctas=max_ctas)
        return self.down(inner, receipt, output=output, max_ctas=max_ctas)

    def up(self, rows: Tensor, receipt: Receipt, *, max_ctas: int | None = None) -> Tensor:
        """The first product of every pair: [R, D] -> [P, F], in the receipt's order.

        `max_ctas` bounds the multiprocessors.
        """
        if not len(self._pool.blobs):
            # A rank without experts computes nothing, but takes part in the exchange.
            return rows
        return kernels.grouped_gemm(
            rows,
            self._pool.gate_up,
            receipt.groups,
            receipt.pair_row,
            swiglu=True,
            max_ctas=max_ctas,
            deterministic=self._deterministic,
            expected=receipt.expected,
        )

    def down(
        self,
        inner: Tensor,
        receipt: Receipt,
        *,
        output: Tensor | None = None,
        max_ctas: int | None = None,
    ) -> Tensor:
        """The second product: [P, F] -> [P, D].

        Results that go where the receipt says are not returned: [0, D]. `output` is written and
        returned where given.
        """
        if not len(self._pool.blobs):
            return inner if output is None else output
        return kernels.grouped_gemm(
            inner,
            self._pool.down,
            receipt.groups,
            pair_weight=receipt.pair_weight,
            max_ctas=max_ctas,
            deterministic=self._deterministic,
            groups_settled=True,
            expected=receipt.expected,
            output=output,
            output_rows=receipt.output_rows,
        )
