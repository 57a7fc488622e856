"""What a stream waits for, with streams and events that only take down what is asked of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lightmoe.kernels import streams

calls: list[tuple[str, object]] = []


class Stream:
    """Of one device."""

    def __init__(self, name: str, device_index: int) -> None:
        self.name, self.device_index = name, device_index


class Event:
    """Counts how many there are."""

    made = 0

    def __init__(self) -> None:
        Event.made += 1

    def record(self, stream: Stream) -> None:
        calls.append(("record", stream.name))

    def wait(self, stream: Stream) -> None:
        calls.append(("wait", stream.name))


@pytest.fixture(autouse=True)
def _events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(streams, "_events", streams._Events())
    calls.clear()
    Event.made = 0


def test_a_stream_follows_another_by_the_same_event_every_time() -> None:
    first, second = (Stream(name, 0) for name in ("first", "second"))
    pair: Any = (first, second)

    for _ in range(3):
        streams.follow(*pair)

    assert calls == [("record", "second"), ("wait", "first")] * 3
    assert Event.made == 1


def test_each_device_and_each_thread_has_an_event_of_its_own() -> None:
    def follow_on_both() -> None:
        for device in (0, 1, 0):
            pair: Any = (Stream("first", device), Stream("second", device))
            streams.follow(*pair)

    follow_on_both()
    thread = threading.Thread(target=follow_on_both)
    thread.start()
    thread.join()

    assert Event.made == 4


def test_the_current_stream_comes_back_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    names: Any = ("other", "mine")

    def fail() -> None:
        with streams.on_stream(*names):
            assert current == ["other"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert current == ["other", "mine"]


def test_the_current_stream_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    name: Any = "mine"

    with streams.on_stream(name, name):
        assert current == []

    assert current == []
