"""The picture of a replay: max/mean over the steps for each route, plans, predicted step times."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightmoe.balancer.replay import Replay

INK = "#1b2330"
QUIET = "#66707f"
COLOURS = {"none": "#d4473b", "even": "#e0912f", "waterfill": "#0f8a66", "lp": "#5b7fb5"}
MAX_POINTS = 400


def draw_replay(result: Replay, step_ms: dict[str, float], name: str) -> Figure:
    """The figure, not yet written anywhere; `step_ms` {route: predicted milliseconds}."""
    figure = Figure(figsize=(11.0, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    lines, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    figure.suptitle(f"{name}: fullest rank over mean rank", color=INK, fontweight="bold")
    _draw_lines(lines, result)
    _draw_bars(bars, step_ms)
    for axes in (lines, bars):
        axes.tick_params(labelsize=8, colors=QUIET, length=0)
        axes.spines[:].set_visible(False)
    return figure


def _draw_lines(axes: Axes, result: Replay) -> None:
    num_steps = len(result.mean_pairs)
    width = -(-num_steps // MAX_POINTS)
    starts = np.arange(0, num_steps, width)
    sizes = np.diff(np.append(starts, num_steps))
    for route in result.max_pairs:
        ratios = np.add.reduceat(result.max_over_mean(route).mean(axis=1), starts) / sizes
        axes.plot(starts, ratios, color=COLOURS[route], linewidth=1.4, label=route)
    axes.plot(
        result.planned_after,
        np.ones(len(result.planned_after)),
        linestyle="none",
        marker="|",
        color=QUIET,
        label="plan",
    )
    axes.axhline(1.0, color=QUIET, linewidth=0.6)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.set_ylabel("max/mean, mean of the layers", fontsize=9, color=QUIET)
    axes.legend(fontsize=8, frameon=False, ncols=5, loc="upper right")


def _draw_bars(axes: Axes, step_ms: dict[str, float]) -> None:
    bars = axes.barh(list(step_ms), list(step_ms.values()), color=[COLOURS[r] for r in step_ms])
    axes.bar_label(bars, fmt=" %.2f", fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("predicted step, ms", fontsize=9, color=QUIET)
