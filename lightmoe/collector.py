"""Python's garbage collector, in the processes of ours where steps would wait for it."""

from __future__ import annotations

import gc


def settle_objects() -> None:
    """Let the collector never look again at what has been made by now.

    Else it walks all of it from time to time, a quarter of a million objects of libraries alone,
    for a hundred milliseconds. Not for a process that is someone else's: what was made by now and
    holds itself would stay for ever.
    """
    gc.collect()
    gc.freeze()
