"""The picture of a trace: what every rank computes and moves in two layers of one step.

A rank has a row of compute and below it one of communication, coloured by stage; two stages that
compute at once share the row. Communication that no compute hides is hatched. Two traces, before
and after, share one time axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightmoe.telemetry.intervals import intersect, subtract, union
from lightmoe.telemetry.records import STAGES, Trace
from lightmoe.telemetry.timeline_panel import Bars, Panel, panel_of

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
_ROW_INCHES = 0.46
_COMPUTE, _COMMUNICATION = (0.06, 0.5), (0.6, 0.32)
"""Top and height of the two rows, in parts of a rank's."""
_LEFT, _RIGHT, _TOP, _GAP, _BOTTOM, _WIDTH = 0.75, 1.15, 1.0, 0.62, 0.88, 11.0
"""Margins around and between the panels and the figure's width, in inches."""
_LABEL_INCHES = 0.7
"""Room that the name of a layer takes, with some air."""


def save_figure(path: Path, trace: Trace, before: Trace | None = None) -> None:
    """Draw one trace, or one above the other with the same time axis, as a PNG."""
    traces = [trace] if before is None else [before, trace]
    with rc_context({"hatch.linewidth": 0.8}):
        draw_timeline([panel_of(one) for one in traces]).savefig(path, format="png")


def draw_timeline(panels: Sequence[Panel]) -> Figure:
    """The figure, not yet written anywhere; the last panel is the one that counts."""
    heights = [_ROW_INCHES * len(panel.rows) for panel in panels]
    height = _TOP + sum(heights) + _GAP * (len(panels) - 1) + _BOTTOM
    left, width = _LEFT / _WIDTH, 1 - (_LEFT + _RIGHT) / _WIDTH
    figure = Figure(figsize=(_WIDTH, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    most_ns = max(panel.length_ns for panel in panels)
    upper = height - _TOP
    names = ("before", "after") if len(panels) > 1 else ("",)
    for panel, inches, name in zip(panels, heights, names, strict=True):
        axes = figure.add_axes((left, (upper - inches) / height, width, inches / height))
        _draw_panel(axes, panel, most_ns, name, is_last=panel is panels[-1])
        upper -= inches + _GAP
    _titles(figure, panels, left, height)
    _legend(figure, panels, left, 0.14 / height)
    return figure


def _draw_panel(axes: Axes, panel: Panel, most_ns: int, name: str, *, is_last: bool) -> None:
    for place, row in enumerate(panel.rows):
        whole = [(0.0, panel.length_ns / 1e6)]
        axes.broken_barh(whole, (place + 0.02, 0.94), facecolors=GROUND, linewidth=0, zorder=0)
        _draw_bars(axes, row.compute, panel.start_ns, place, _COMPUTE)
        _draw_bars(axes, row.communication, panel.start_ns, place, _COMMUNICATION)
        _hatch(axes, row.exposed, panel.start_ns, place)
    for start, _ in panel.layers:
        at = (start - panel.start_ns) / 1e6
        axes.axvline(at, color=INK, linewidth=0.6, alpha=0.5, zorder=4)
    for start, text in layer_labels(panel.layers, most_ns):
        at = (start - panel.start_ns) / 1e6
        axes.annotate(text, (at, 0), (3, 2), textcoords="offset points", fontsize=8, color=QUIET)
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


def layer_labels(layers: Sequence[tuple[int, int]], axis_ns: int) -> list[tuple[int, str]]:
    """Where in ns each name of a layer begins: one name for layers too near for one each."""
    least_ns = axis_ns * _LABEL_INCHES / (_WIDTH - _LEFT - _RIGHT)
    groups: list[tuple[int, list[int]]] = []
    for start, number in layers:
        if groups and start - groups[-1][0] < least_ns:
            groups[-1][1].append(number)
        else:
            groups.append((start, [number]))
    return [
        (start, f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}")
        for start, numbers in groups
    ]


def _draw_bars(axes: Axes, bars: Bars, start_ns: int, place: int, row: tuple[float, float]) -> None:
    begin, size = place + row[0], row[1]
    drawn = union(())
    for stage in (stage for stage in COLOURS if stage in bars):
        alone, beside = subtract(bars[stage], drawn), intersect(bars[stage], drawn)
        # What computes beside another stage gets the lower half of the row.
        for intervals, box in ((alone, (begin, size)), (beside, (begin + size / 2, size / 2))):
            spans = _spans(intervals, start_ns)
            axes.broken_barh(spans, box, facecolors=COLOURS[stage], linewidth=0, zorder=2)
        drawn = union([*drawn.tolist(), *bars[stage].tolist()])


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
