"""What is settled is not walked again."""

from __future__ import annotations

import gc

from lightmoe.collector import settle_objects


def test_the_collector_does_not_look_at_what_is_settled() -> None:
    before = gc.get_freeze_count()
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    settle_objects()
    try:
        assert gc.get_freeze_count() >= before + len(kept)
        assert not any(one is kept for one in gc.get_objects())
    finally:
        gc.unfreeze()
