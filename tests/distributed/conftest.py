"""Gloo groups among threads of this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankThreadsCache


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankThreadsCache]:
    cache = RankThreadsCache()
    yield cache
    cache.close()
