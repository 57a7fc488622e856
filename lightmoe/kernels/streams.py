"""Work for another stream of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream, current: torch.cuda.Stream) -> Iterator[None]:
    """What torch.cuda.stream does where the current stream is known: a layer does it ten times.

    That one asks for the device and for its current stream each time, which takes longer than a
    launch.
    """
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(current)
