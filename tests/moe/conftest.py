"""Gloo groups for the tests of the exchange, and one thread a product as every rank has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankThreadsCache


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankThreadsCache]:
    cache = RankThreadsCache()
    yield cache
    cache.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
