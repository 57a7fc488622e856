"""Work for another stream of the device."""

from __future__ import annotations

import threading

import torch


def raw_stream(device: torch.device) -> int:
    """The current stream of a CUDA device with an index, as launches take it.

    As torch's compiler asks for it: torch.cuda.current_stream takes longer than a launch.
    """
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


class on_stream:  # noqa: N801  (as torch.cuda.stream)
    """What torch.cuda.stream does where the current stream is known: a layer does it ten times.

    That one asks for the device and for its current stream each time, which takes longer than a
    launch. Nothing where the stream is the current one.
    """

    __slots__ = ("_current", "_stream")

    def __init__(self, stream: torch.cuda.Stream, current: torch.cuda.Stream) -> None:
        self._stream, self._current = stream, current

    def __enter__(self) -> None:
        if self._stream is not self._current:
            torch.cuda.set_stream(self._stream)

    def __exit__(self, *failure: object) -> None:
        if self._stream is not self._current:
            torch.cuda.set_stream(self._current)


def follow(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    """Let `stream` wait for what `other` has so far: stream.wait_stream(other) without a new event.

    A wait is for what was recorded before it, so each thread has one event a device.
    """
    event = _events.of_device.get(other.device_index)
    if event is None:
        event = _events.of_device[other.device_index] = torch.cuda.Event()
    event.record(other)
    event.wait(stream)


class _Events(threading.local):
    def __init__(self) -> None:
        self.of_device: dict[int, torch.cuda.Event] = {}


_events = _Events()
