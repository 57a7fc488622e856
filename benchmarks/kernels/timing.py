"""How every kernel bench times: replays of one CUDA graph, medians over many of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

GRAPH_MS = 1.0  # a replay lasts at least this long: the events' half microsecond stays under 0.1 %
MAX_CALLS = 2000  # captured calls per graph
MIN_REPLAYS = 5
SLOW_MS = 200.0  # rounds longer than this are timed once: the spread drowns in their length


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and spread over the replays."""

    ms: float
    ms_p10: float
    ms_p90: float
    num_replays: int


def time_graph(calls: Sequence[Callable[[], object]], seconds: float) -> Timing:
    """One call's time when `calls` follow each other in a CUDA graph, replayed for `seconds`.

    Each call works on its own set of inputs: with enough sets, none is in the L2 when its turn
    comes again. The graph repeats the round until a replay is long enough for the events.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # module loads and allocations happen outside the capture
            call()
        first = _milliseconds(lambda: [call() for call in calls], stream)
        if first > SLOW_MS:
            return Timing(first / len(calls), first / len(calls), first / len(calls), 1)
        graph = _capture(calls, 1, stream)
        num_rounds = math.ceil(GRAPH_MS / _milliseconds(graph.replay, stream))
        num_rounds = max(1, min(num_rounds, MAX_CALLS // len(calls)))
        if num_rounds > 1:
            graph = _capture(calls, num_rounds, stream)
        num_replays = max(MIN_REPLAYS, int(seconds * 1e3 / _milliseconds(graph.replay, stream)))
        samples = _replays(graph, num_replays, stream)
    per_call = [sample / (num_rounds * len(calls)) for sample in samples]
    return Timing(
        statistics.median(per_call), quantile(per_call, 0.1), quantile(per_call, 0.9), num_replays
    )


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of the others lie, interpolated between neighbours."""
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _capture(
    calls: Sequence[Callable[[], object]], num_rounds: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """The calls, some times over, as a graph that has run once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(num_rounds):
            for call in calls:
                call()
    graph.replay()
    return graph


def _replays(
    graph: torch.cuda.CUDAGraph, num_replays: int, stream: torch.cuda.Stream
) -> list[float]:
    """Milliseconds of each replay, without a gap between them; the clocks settle first."""
    for _ in range(max(1, num_replays // 4)):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    events[0].record(stream)
    for event in events[1:]:
        graph.replay()
        event.record(stream)
    stream.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _milliseconds(call: Callable[[], object], stream: torch.cuda.Stream) -> float:
    stream.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end))
