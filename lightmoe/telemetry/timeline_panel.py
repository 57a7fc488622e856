"""What a picture of a trace shows: every rank's work in two whole layers of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightmoe.telemetry.intervals import intersect, subtract, union
from lightmoe.telemetry.overlap import StepActivity, overlap_of, step_activities, worked_records
from lightmoe.telemetry.records import STAGES, Record, Trace

_NUM_LAYERS = 2
_SHOWN_STAGES = frozenset({*STAGES, "exchange"})

Bars = dict[str, np.ndarray]
"""Intervals by stage; what belongs to none is under the empty name."""


@dataclass(frozen=True, slots=True)
class RankRow:
    """What is drawn for one rank: intervals of the window, in ns."""

    rank: int
    compute: Bars
    communication: Bars
    exposed: np.ndarray


@dataclass(frozen=True, slots=True)
class Panel:
    """One trace's part of the picture. `layers` are (begin in ns, number)."""

    title: str
    start_ns: int
    end_ns: int
    rows: list[RankRow]
    layers: list[tuple[int, int]]
    exposed_share: float
    source: str

    @property
    def length_ns(self) -> int:
        """Of the window."""
        return self.end_ns - self.start_ns


def panel_of(trace: Trace) -> Panel:
    """The middle step's middle layers, of every rank. Raises UsageError without a step.

    A layer lasts from the first thing that a rank computes for it (its attention's first kernel,
    or span where nothing ran on a device) to the first of the next layer. So in a step of two
    halves the previous layer's last products and sums, which run beside this layer's attention,
    are in the picture, and this layer's own are beyond its end. The window opens when the first
    rank begins the first layer, and closes when the last has begun the layer after, or the step
    ends. Where nothing says its layer, as in a CUDA graph, the window is the whole step.
    """
    activities = step_activities(trace)
    numbers = sorted({one.step for one in activities})
    step = numbers[len(numbers) // 2]
    of_step = [one for one in activities if one.step == step]
    on_device = trace.source == "kernels"
    worked = [worked_records(trace.steps[one.rank, step], on_device=on_device) for one in of_step]
    layers, end = _middle_layers(worked)
    start = layers[0][0] if layers else min(one.start_ns for one in of_step)
    if end is None:
        end = max(one.end_ns for one in of_step)
    window = np.array([[start, end]], dtype=np.int64)
    return Panel(
        title=trace.title,
        start_ns=start,
        end_ns=end,
        rows=[
            _row(activity, records, window, on_device=on_device)
            for activity, records in zip(of_step, worked, strict=True)
        ],
        layers=layers,
        exposed_share=overlap_of(trace)["exposed_share"],
        source=trace.source,
    )


def _middle_layers(ranks: Sequence[Sequence[Record]]) -> tuple[list[tuple[int, int]], int | None]:
    """The middle layers and when the first rank begins each; when the last begins the next."""
    begins: dict[int, list[int]] = defaultdict(list)
    for records in ranks:
        for layer, begin in _layer_begins(records).items():
            begins[layer].append(begin)
    numbers = sorted(begins)
    first = max(0, (len(numbers) - _NUM_LAYERS) // 2)
    shown, following = numbers[first : first + _NUM_LAYERS], numbers[first + _NUM_LAYERS :]
    end = max(begins[following[0]]) if following else None
    return [(min(begins[number]), number) for number in shown], end


def _layer_begins(records: Sequence[Record]) -> dict[int, int]:
    """When a rank first computes for each layer. Copies for it may run long before."""
    begins: dict[int, int] = {}
    for one in records:
        if one.layer is not None and one.role == "compute":
            begins[one.layer] = min(one.start_ns, begins.get(one.layer, one.start_ns))
    return begins


def _row(
    activity: StepActivity, worked: Sequence[Record], window: np.ndarray, *, on_device: bool
) -> RankRow:
    moves = [one for one in worked if one.role == "communication"]
    computes = [one for one in worked if one.role == "compute"]
    return RankRow(
        rank=activity.rank,
        compute=_bars(computes, window, activity.compute, innermost=not on_device),
        communication=_bars(moves, window, activity.communication, innermost=False),
        exposed=intersect(activity.exposed, window),
    )


def _bars(
    records: Sequence[Record], window: np.ndarray, allowed: np.ndarray, *, innermost: bool
) -> Bars:
    """Intervals by stage, within the window. With `innermost` a time counts for its inmost span."""
    found: dict[str, list[tuple[int, int]]] = {}
    taken = union(())
    # A span is shorter than those around it.
    for one in sorted(records, key=lambda record: record.end_ns - record.start_ns):
        name = one.name if innermost else one.stage
        pairs = intersect(union([(one.start_ns, one.end_ns)]), window)
        if innermost:
            pairs = subtract(pairs, taken)
            taken = union([*taken.tolist(), *pairs.tolist()])
        found.setdefault(name if name in _SHOWN_STAGES else "", []).extend(pairs.tolist())
    return {stage: intersect(union(pairs), allowed) for stage, pairs in found.items()}
