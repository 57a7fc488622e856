"""The experts that this rank holds, as slots of one pool, and their grouped products."""

from __future__ import annotations

import functools

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
        self.num_slots = num_slots
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
        product = functools.partial(kernels.grouped_product, deterministic=deterministic)
        self._up = product(pool.gate_up, swiglu=True)
        self._down = product(pool.down)

    def outpace(self, operations_per_byte: float) -> bool:
        """Whether results are made faster than they leave: 2 D F operations make 2 D bytes."""
        return bool(self._pool.down.shape[2] < operations_per_byte)

    def tokens_per_tile(self, num_pairs: int, num_groups: int) -> int:
        """How many pairs a tile of both products has."""
        return kernels.tokens_per_tile(
            self._pool.gate_up,
            max(1, num_pairs),  # the first of many chunks may have no tokens
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
        if not self._pool.num_slots:
            # A rank without experts computes nothing, but takes part in the exchange.
            return rows
        return self._up(
            rows,
            receipt.groups,
            receipt.pair_row,
            max_ctas=max_ctas,
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
        if not self._pool.num_slots:
            return inner if output is None else output
        return self._down(
            inner,
            receipt.groups,
            pair_weight=receipt.pair_weight,
            max_ctas=max_ctas,
            groups_settled=True,
            expected=receipt.expected,
            output=output,
            output_rows=receipt.output_rows,
        )
