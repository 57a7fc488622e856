"""One thread a product, as every rank has: a second one may cut a sum elsewhere."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
