"""What row-invariant means, as a check that every operator's test calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_ROWS = 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_rows(
    num_rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normal rows [num_rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator).to(dtype)


def assert_row_invariant(operator: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    """A row alone, among any others and at any position: the same bits."""
    together = operator(rows)
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.randperm(len(rows), generator=generator)
    assert torch.equal(operator(rows[shuffled]), together[shuffled])
    for size in (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33):
        for start in (0, len(rows) - size):
            part = rows[start : start + size].clone()
            assert torch.equal(operator(part), together[start : start + size]), (size, start)
    for row in range(len(rows)):
        assert torch.equal(operator(rows[row : row + 1].clone())[0], together[row]), row
