"""What a step has counted and chosen, on its way from the device while the next one runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Report:
    """Integer tensors of one device, sent to the host in one copy that nobody waits for."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._shapes = [part.shape for part in parts]
        numbers = torch.cat([part.flatten().to(torch.int32) for part in parts])
        self._arrived: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(len(numbers), dtype=torch.int32, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def is_here(self) -> bool:
        """Whether `read` would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> list[np.ndarray]:
        """The parts, int32."""
        if self._arrived is not None:
            self._arrived.synchronize()
        sizes = [shape.numel() for shape in self._shapes]
        return [
            part.view(shape).numpy().copy()
            for part, shape in zip(self._numbers.split(sizes), self._shapes, strict=True)
        ]
