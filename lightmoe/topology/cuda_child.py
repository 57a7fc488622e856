"""The process that touches the cards for a probe: one JSON request a line in, one answer out.

It is apart because a broken peer-to-peer copy can hang for ever: who asked then ends it. It answers
{"value": ...} or {"error": "..."}; the requests are the functions in `_REQUESTS`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HOST = -1
COPY_BYTES = 64 << 20
PATTERN_BYTES = 8 << 20
SMALL_BYTES = 1 << 10
SMALL_COPIES = 100
MATMUL_SIZE = 8192
SPEED_SECONDS = 0.3


@dataclass(slots=True)
class Lane:
    """One stream of copies. A copy between cards has a stream on both, or all copies into one card
    would wait for each other."""

    target: Tensor
    source: Tensor
    streams: tuple[torch.cuda.Stream, ...]
    started: torch.cuda.Event
    ended: torch.cuda.Event

    def copy(self, count: int = 1) -> None:
        """So many copies in a row, not waited for."""
        with ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(torch.cuda.stream(stream))
            for _ in range(count):
                self.target.copy_(self.source, non_blocking=True)

    @property
    def own_stream(self) -> torch.cuda.Stream:
        """The stream that does the copies: of the source card, or of the only one."""
        return self.streams[-1]


def uuids() -> list[str]:
    """The cards that ranks here would see, in their order; they are started."""
    cards = range(torch.cuda.device_count())
    for card in cards:
        torch.zeros(1, device=f"cuda:{card}")
    return [str(torch.cuda.get_device_properties(card).uuid) for card in cards]


def test_p2p(source: int, target: int) -> str:
    """As Hardware.test_p2p, but for "hangs": then there is no answer."""
    if not torch.cuda.can_device_access_peer(source, target):
        return "not offered"
    generator = torch.Generator().manual_seed(1000 * source + target)
    pattern = torch.randint(0, 256, (PATTERN_BYTES,), dtype=torch.uint8, generator=generator)
    sent = pattern.to(f"cuda:{source}")
    received = torch.full_like(pattern, 0xA5).to(f"cuda:{target}")
    torch.cuda.synchronize(target)
    received.copy_(sent)
    for card in (source, target):
        torch.cuda.synchronize(card)
    return "works" if torch.equal(received.cpu(), pattern) else "wrong bytes"


def copy_rates(copies: list[list[int]], cpus: list[list[int]], seconds: float) -> list[float]:
    """Bytes per second of each [source, target], all at once; cpus[card] are near that card."""
    lanes = [_lane(source, target, cpus, COPY_BYTES) for source, target in copies]
    _run(lanes, 1)
    count = max(2, round(seconds / max(_run(lanes, 2)) * 2))
    return [count * COPY_BYTES / elapsed for elapsed in _run(lanes, count)]


def latency_seconds(source: int, target: int, cpus: list[list[int]]) -> float:
    """Least time of one small copy of many in a row on the cards' own streams."""
    lane = _lane(source, target, cpus, SMALL_BYTES)
    _run([lane], SMALL_COPIES)
    return min(_run([lane], SMALL_COPIES)[0] for _ in range(10)) / SMALL_COPIES


def speed(card: int) -> dict[str, float]:
    """As Hardware.speed: the best of several runs."""
    with torch.cuda.device(card):
        dtype = (
            torch.bfloat16 if torch.cuda.get_device_capability(card) >= (8, 0) else torch.float16
        )
        left = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype)
        right, product = torch.randn_like(left), torch.empty_like(left)
        flops = 2 * MATMUL_SIZE**3 / _best_seconds(lambda: torch.mm(left, right, out=product))
        free, _ = torch.cuda.mem_get_info(card)
        num_bytes = min(1 << 30, free // 4)
        source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        moved = 2 * num_bytes / _best_seconds(lambda: target.copy_(source))
    return {"flops_per_second": flops, "bytes_per_second": moved}


def _best_seconds(call: Callable[[], object]) -> float:
    """Least time of one call, by events on the current card."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    best, deadline = float("inf"), time.perf_counter() + SPEED_SECONDS
    while time.perf_counter() < deadline:
        events[0].record()
        for _ in range(3):
            call()
        events[1].record()
        events[1].synchronize()
        best = min(best, events[0].elapsed_time(events[1]) / 3e3)
    return best


def _lane(source: int, target: int, cpus: list[list[int]], num_bytes: int) -> Lane:
    cards = [card for card in (target, source) if card != HOST]
    ends = []
    for role, card in (("target", target), ("source", source)):
        other = source if role == "target" else target
        # Each pair has its target for itself; one buffer a card serves all that read it.
        key = (role, card, other) if role == "target" or card == HOST else (role, card, card)
        ends.append(_buffer(key, num_bytes, tuple(cpus[other]) if card == HOST else ()))
    streams = tuple(torch.cuda.Stream(device=card) for card in cards)
    with torch.cuda.device(cards[-1]):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    return Lane(ends[0], ends[1], streams, *events)


@functools.cache
def _buffer(key: tuple[str, int, int], num_bytes: int, cpus: tuple[int, ...]) -> Tensor:
    """Memory of a card, or pinned memory of the socket that those processors belong to."""
    card = key[1]
    if card != HOST:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=f"cuda:{card}")
    allowed = os.sched_getaffinity(0)
    near = allowed & set(cpus)
    os.sched_setaffinity(0, near or allowed)
    try:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    finally:
        os.sched_setaffinity(0, allowed)


def _run(lanes: list[Lane], count: int) -> list[float]:
    """Seconds of `count` copies on every lane, from each lane's first to its last."""
    for lane in lanes:
        lane.started.record(lane.own_stream)
    if len(lanes) == 1:
        lanes[0].copy(count)
    else:
        for _ in range(count):
            for lane in lanes:
                lane.copy()
    for lane in lanes:
        lane.ended.record(lane.own_stream)
    for lane in lanes:
        for stream in lane.streams:
            stream.synchronize()
    return [lane.started.elapsed_time(lane.ended) / 1e3 for lane in lanes]


_REQUESTS: dict[str, Callable[..., object]] = {
    call.__name__: call for call in (uuids, test_p2p, copy_rates, latency_seconds, speed)
}


def main() -> None:
    """Answer until the requests end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            answer = {"value": _REQUESTS[request.pop("request")](**request)}
        except (RuntimeError, AssertionError) as error:  # what torch and CUDA raise
            answer = {"error": str(error).strip().partition("\n")[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
