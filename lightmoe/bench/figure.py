"""The charts of a bench: delays and tokens/s over the batch size, one row a prompt length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from lightmoe.bench.measure import Row
from lightmoe.bench.report import Report

INK = "#1b2330"
QUIET = "#66707f"
_LEFT = 0.022
COLOURS = {"natural": "#0f8a66", "uniform": "#3b76af"}
HOT_COLOURS = ("#d4473b", "#a06a00", "#6d0f2c")
"""Of skewed routing."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """A field of the rows; `middle` is drawn as a line, `low` to `high` as a band around it."""

    field: str
    title: str
    unit: str
    low: str
    middle: str
    high: str


_PANELS = (
    _Panel("ttft_ms", "Time to first token", "ms, p50 to p99", "p50", "p50", "p99"),
    _Panel("inter_token_ms", "Between two tokens", "ms, p50 to p99", "p50", "p50", "p99"),
    _Panel("prefill_tokens_per_second", "Prefill", "tokens/s", "min", "median", "max"),
    _Panel("decode_tokens_per_second", "Decode", "tokens/s", "min", "median", "max"),
)


def draw(report: Report) -> Figure:
    """The figure, not yet written anywhere."""
    lengths = sorted({row["prompt_length"] for row in report.rows})
    routings = list(dict.fromkeys(row["routing"] for row in report.rows))
    height = 1.45 + 2.3 * len(lengths) + 0.3
    figure = Figure(figsize=(13.0, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(lengths), len(_PANELS), squeeze=False, sharex=True)
    for axes_row, length in zip(grid, lengths, strict=True):
        rows = [row for row in report.rows if row["prompt_length"] == length]
        for axes, panel in zip(axes_row, _PANELS, strict=True):
            for routing, colour in zip(routings, _colours(routings), strict=True):
                _line(axes, panel, [row for row in rows if row["routing"] == routing], colour)
            _dress(axes, panel, sorted({row["batch_size"] for row in rows}))
        axes_row[0].set_ylabel(f"prompts of {length} tokens", fontsize=9.5, color=INK, labelpad=10)
    for axes, panel in zip(grid[0], _PANELS, strict=True):
        axes.set_title(panel.title, fontsize=10, color=INK, loc="left", pad=18, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("batch size", fontsize=9, color=QUIET)
    _titles(figure, report, routings, height)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 1.55 / height, bottom=0.5 / height, wspace=0.24, hspace=0.3
    )
    return figure


def _colours(routings: Sequence[str]) -> list[str]:
    hot = itertools.cycle(HOT_COLOURS)
    return [COLOURS.get(routing) or next(hot) for routing in routings]


def _line(axes: Axes, panel: _Panel, rows: Sequence[Row], colour: str) -> None:
    """Rows whose figure is missing leave a gap: that batch never ran as the panel says."""
    measured = [row for row in rows if row[panel.field] is not None]
    sizes = [row["batch_size"] for row in measured]
    low, middle, high = (
        [row[panel.field][name] for row in measured]
        for name in (panel.low, panel.middle, panel.high)
    )
    axes.fill_between(sizes, low, high, color=colour, alpha=0.14, linewidth=0)
    axes.plot(sizes, middle, color=colour, linewidth=1.8, marker="o", markersize=4)


def _dress(axes: Axes, panel: _Panel, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.set_ylim(bottom=0)
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, fontsize=8, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=0, labelbottom=True)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _number(value: float, _: int) -> str:
    return f"{value / 1000:,.3g}k" if value >= 10_000 else f"{value:,.4g}"


def _titles(figure: Figure, report: Report, routings: Sequence[str], height: float) -> None:
    what = "uniform and skewed routing" if len(routings) > 1 else f"{routings[0]} routing"
    title, words = f"{report.model}: {what}", f"{report.device} · {report.date}"
    top, below = 1 - 0.28 / height, 1 - 0.54 / height
    figure.text(_LEFT, top, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(_LEFT, below, words, fontsize=9.5, color=QUIET, va="center")
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker="o", label=routing + _worst(report, routing))
            for routing, colour in zip(routings, _colours(routings), strict=True)
        ],
        loc="upper left",
        bbox_to_anchor=(_LEFT, 1 - 0.74 / height),
        borderaxespad=0,
        borderpad=0,
        ncols=len(routings),
        frameon=False,
        fontsize=9.5,
        labelcolor="linecolor",
    )


def _worst(report: Report, routing: str) -> str:
    """How uneven the ranks were, over the rows of a routing."""
    ratios = [r["rank_load_max_over_mean"] for r in report.rows if r["routing"] == routing]
    return f" (fullest rank up to {max(ratios):.2f}× mean)"
