"""The picture of a trace: what every rank computes and moves in two layers of one step.

A rank has a row of compute and below it one of communication, coloured by stage. Communication
that no compute hides is hatched. Two traces, before and after, share one time axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightmoe.telemetry.intervals import intersect, subtract, union
from lightmoe.telemetry.overlap import StepActivity, overlap_of, step_activities
from lightmoe.telemetry.records import STAGES, Record, Trace

INK = "#1b2330"
QUIET = "#66707f"
EXPOSED = "#b3202c"
GROUND = "#f3f4f6"
COLOURS = {
    "attention": "#8aa37b",
    "gate": "#b79ac8",
    "route": "#8f7fb0",
    "dispatch": "#4f7fb5",
    "exchange": "#4f9aa8",
    "experts": "#e0913f",
    "combine": "#5fb0a0",
    "mlp": "#c9b458",
    "sampler": "#9a8478",
    "": "#c9cdd4",
}
"""By stage; what belongs to none, such as norms, is grey."""
_NUM_LAYERS = 2
_ROW_INCHES = 0.46
_COMPUTE, _COMMUNICATION = (0.06, 0.5), (0.6, 0.32)
"""Top and height of the two rows, in parts of a rank's."""

Bars = dict[str, np.ndarray]
"""Intervals by stage."""


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


def save_figure(path: Path, trace: Trace, before: Trace | None = None) -> None:
    """Draw one trace, or one above the other with the same time axis, as a PNG."""
    traces = [trace] if before is None else [before, trace]
    with rc_context({"hatch.linewidth": 0.8}):
        draw_timeline([panel_of(one) for one in traces]).savefig(path, format="png")


def panel_of(trace: Trace) -> Panel:
    """The middle step's middle layers, of every rank. Raises UsageError without a step."""
    activities = step_activities(trace)
    numbers = sorted({one.step for one in activities})
    step = numbers[len(numbers) // 2]
    of_step = [one for one in activities if one.step == step]
    records = [one for one in trace.records if one.step == step]
    layers = _layers(records)
    if layers:
        start, end = layers[0][0], _end(records, layers)
    else:
        start, end = min(one.start_ns for one in of_step), max(one.end_ns for one in of_step)
    window = np.array([[start, end]], dtype=np.int64)
    return Panel(
        title=trace.title,
        start_ns=start,
        end_ns=end,
        rows=[_row(activity, trace, window) for activity in of_step],
        layers=layers,
        exposed_share=overlap_of(trace)["exposed_share"],
        source=trace.source,
    )


def _layers(records: Sequence[Record]) -> list[tuple[int, int]]:
    """The middle layers and when the first rank begins each; empty where none is known."""
    begins: dict[int, int] = {}
    for one in records:
        if one.layer is not None and one.name != "step":
            begins[one.layer] = min(one.start_ns, begins.get(one.layer, one.start_ns))
    numbers = sorted(begins)
    first = max(0, (len(numbers) - _NUM_LAYERS) // 2)
    return [(begins[number], number) for number in numbers[first : first + _NUM_LAYERS]]


def _end(records: Sequence[Record], layers: Sequence[tuple[int, int]]) -> int:
    shown = {number for _, number in layers}
    return max(one.end_ns for one in records if one.layer in shown)


def _row(activity: StepActivity, trace: Trace, window: np.ndarray) -> RankRow:
    records = trace.steps[activity.rank, activity.step]
    on_device = trace.source == "kernels"
    worked = [one for one in records if (one.kind != "span") == on_device]
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
    """Intervals by stage, within the window. With `innermost` the shorter span stands on top."""
    found: dict[str, list[tuple[int, int]]] = {}
    for one in records:
        name = one.name if innermost else one.stage
        found.setdefault(name if name in COLOURS else "", []).append((one.start_ns, one.end_ns))
    bars = {stage: intersect(union(pairs), allowed) for stage, pairs in found.items()}
    if innermost:
        known = union(
            (begin, end) for stage, part in bars.items() if stage for begin, end in part.tolist()
        )
        bars[""] = subtract(bars.get("", union(())), known)
    return {stage: intersect(part, window) for stage, part in bars.items()}


def draw_timeline(panels: Sequence[Panel]) -> Figure:
    """The figure, not yet written anywhere; the last panel is the one that counts."""
    left, right, top, gap, bottom = 0.75, 1.15, 1.0, 0.62, 0.88
    heights = [_ROW_INCHES * len(panel.rows) for panel in panels]
    width = 11.0
    height = top + sum(heights) + gap * (len(panels) - 1) + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    most_ns = max(panel.length_ns for panel in panels)
    upper = height - top
    names = ("before", "after") if len(panels) > 1 else ("",)
    for panel, inches, name in zip(panels, heights, names, strict=True):
        box = (left / width, (upper - inches) / height, 1 - (left + right) / width, inches / height)
        axes = figure.add_axes(box)
        _draw_panel(axes, panel, most_ns, name, is_last=panel is panels[-1])
        upper -= inches + gap
    _titles(figure, panels, left / width, height)
    _legend(figure, panels, left / width, 0.14 / height)
    return figure


def _draw_panel(axes: Axes, panel: Panel, most_ns: int, name: str, *, is_last: bool) -> None:
    for place, row in enumerate(panel.rows):
        whole = [(0.0, panel.length_ns / 1e6)]
        axes.broken_barh(whole, (place + 0.02, 0.94), facecolors=GROUND, linewidth=0, zorder=0)
        _draw_bars(axes, row.compute, panel.start_ns, place, _COMPUTE)
        _draw_bars(axes, row.communication, panel.start_ns, place, _COMMUNICATION)
        _hatch(axes, row.exposed, panel.start_ns, place)
    for start, number in panel.layers:
        at = (start - panel.start_ns) / 1e6
        axes.axvline(at, color=INK, linewidth=0.6, alpha=0.5, zorder=4)
        axes.annotate(
            f"layer {number}", (at, 0), (3, 2), textcoords="offset points", fontsize=8, color=QUIET
        )
    rows = (("compute", _COMPUTE), ("communication", _COMMUNICATION))
    for text, (begin, size) in rows if name != "after" else ():
        axes.annotate(
            text, (1, begin + size / 2), (6, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=7.5, color=QUIET,
        )  # fmt: skip
    axes.set_xlim(0, most_ns / 1e6)
    axes.set_ylim(len(panel.rows), 0)
    axes.set_yticks(
        np.arange(len(panel.rows)) + 0.5, [f"rank {row.rank}" for row in panel.rows], fontsize=8.5
    )
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
    axes.spines[:].set_visible(False)
    if is_last:
        axes.set_xlabel("ms", fontsize=9, color=QUIET)
    else:
        axes.set_xticklabels([])
    if name:
        text = f"{name}: exposed share {panel.exposed_share:.0%}"
        axes.annotate(
            text, (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points",
            ha="right", fontsize=9.5, color=INK, fontweight="bold",
        )  # fmt: skip


def _draw_bars(axes: Axes, bars: Bars, start_ns: int, place: int, row: tuple[float, float]) -> None:
    for stage, intervals in bars.items():
        if len(intervals):
            axes.broken_barh(
                _spans(intervals, start_ns), (place + row[0], row[1]),
                facecolors=COLOURS[stage], linewidth=0, zorder=2,
            )  # fmt: skip


def _hatch(axes: Axes, exposed: np.ndarray, start_ns: int, place: int) -> None:
    if len(exposed):
        spans, row = _spans(exposed, start_ns), (place + _COMMUNICATION[0], _COMMUNICATION[1])
        axes.broken_barh(spans, row, facecolors="white", alpha=0.45, linewidth=0, zorder=3)
        axes.broken_barh(
            spans, row, facecolors="none", edgecolor=EXPOSED, hatch="/////", linewidth=0, zorder=3
        )


def _spans(intervals: np.ndarray, start_ns: int) -> list[tuple[float, float]]:
    return [((begin - start_ns) / 1e6, (end - begin) / 1e6) for begin, end in intervals.tolist()]


def _titles(figure: Figure, panels: Sequence[Panel], left: float, height: float) -> None:
    shares = " → ".join(f"{panel.exposed_share:.0%}" for panel in panels)
    top, below = 1 - 0.3 / height, 1 - 0.56 / height
    title = f"exposed share {shares}"
    figure.text(left, top, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(left, below, _summary(panels[-1]), fontsize=9.5, color=QUIET, va="center")


def _summary(panel: Panel) -> str:
    shown = f"{len(panel.layers)} layers of one step" if panel.layers else "one step"
    times = "times of kernels" if panel.source == "kernels" else "times of the host's spans"
    return " · ".join(part for part in (panel.title, shown, times) if part)


def _legend(figure: Figure, panels: Sequence[Panel], left: float, bottom: float) -> None:
    used = {
        stage
        for panel in panels
        for row in panel.rows
        for bars in (row.compute, row.communication)
        for stage, intervals in bars.items()
        if len(intervals)
    }
    order = [stage for stage in (*STAGES[:4], "exchange", *STAGES[4:], "") if stage in used]
    handles = [Patch(facecolor=COLOURS[stage], label=stage or "other") for stage in order]
    hatched = Patch(
        facecolor="white", edgecolor=EXPOSED, hatch="/////", linewidth=0,
        label="exposed: the rank only waits",
    )  # fmt: skip
    figure.legend(
        handles=[*handles, hatched], loc="lower left", bbox_to_anchor=(left, bottom),
        ncols=len(handles) + 1, fontsize=8.5, frameon=False, labelcolor=QUIET, borderaxespad=0,
        handlelength=1.3, handleheight=0.9, handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip
