"""The picture of a recorded routing, before and after: experts, and what ranks made of them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from lightmoe.telemetry.heatmap import LoadTable
from lightmoe.telemetry.heatmap_figure import (
    COLOURS,
    INK,
    QUIET,
    SPARE,
    Layout,
    colour_bar,
    draw_panel,
    mark_spares,
    ticks,
)

WHEN = ("before: no replicas", "after: replicas, water-filled")


def draw_before_and_after(
    tables: tuple[LoadTable, LoadTable], levels: tuple[float, float]
) -> Figure:
    """The load of the experts, and what the ranks made of it before and after: not yet written.

    Both tables have the same expert_tokens; `levels` are the fullest rank's load over the mean
    one's, before and after, which sums over many steps do not show.
    """
    experts, ranks = tables[0].expert_ratios, [table.rank_ratios for table in tables]
    layout = Layout.of(len(experts), experts.shape[1], ranks[0].shape[1])
    left, gap, right, top, bottom, bars = 0.75, 0.75, 1.15, 1.35, 0.6, 1.3
    width = left + layout.experts + 2 * (gap + layout.ranks) + right
    height = top + layout.height + 0.55 + bars + bottom
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)

    def place(start: float, size: float, low: float, tall: float) -> Axes:
        return figure.add_axes((start / width, low / height, size / width, tall / height))

    low = height - top - layout.height
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, *(float(one.max()) for one in (experts, *ranks))))
    axes = place(left, layout.experts, low, layout.height)
    draw_panel(axes, experts, norm, "expert", has_numbers=True)
    axes.set_title("chosen by the gates", fontsize=9.5, color=INK, loc="left", pad=14)
    most = max(float(_totals(table).max()) for table in tables)
    for number, (table, ratios, level) in enumerate(zip(tables, ranks, levels, strict=True)):
        start = left + layout.experts + gap + number * (layout.ranks + gap)
        axes = place(start, layout.ranks, low, layout.height)
        draw_panel(axes, ratios, norm, "rank", has_numbers=True)
        mark_spares(axes, table)
        axes.set_title(WHEN[number], fontsize=9.5, color=INK, loc="left", pad=14)
        _rank_bars(place(start, layout.ranks, bottom, bars), table, most, level)
    bar_axes = place(width - right + 0.25, 0.16, low, layout.height)
    colour_bar(figure, bar_axes, axes, norm)
    figure.text(
        left / width,
        1 - 0.3 / height,
        f"{tables[0].model}: expert load, before and after",
        fontsize=13,
        fontweight="bold",
        color=INK,
        va="center",
    )
    figure.text(
        left / width,
        1 - 0.58 / height,
        _levels_text(tables[0], levels),
        fontsize=9.5,
        color=QUIET,
        va="center",
    )
    return figure


def _totals(table: LoadTable) -> np.ndarray:
    """Pairs of each rank in all layers, over the mean rank's: [W]."""
    pairs = table.rank_pairs.sum(axis=1)
    return np.asarray(pairs / max(1.0, float(pairs.mean())))


def _rank_bars(axes: Axes, table: LoadTable, most: float, level: float) -> None:
    totals = _totals(table)
    colours = [SPARE if spare else COLOURS(0.7) for spare in table.rank_is_spare]
    axes.bar(np.arange(len(totals)), totals, color=colours, width=0.8)
    axes.axhline(1.0, color=QUIET, linewidth=0.8)
    axes.set_xlim(-0.5, len(totals) - 0.5)
    axes.set_ylim(0, 1.12 * most)
    axes.set_xticks(ticks(len(totals)))
    axes.set_xlabel(
        f"pairs of each rank; a step's fullest: {level:.2f}× mean", fontsize=9, color=QUIET
    )
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.spines[:].set_visible(False)


def _levels_text(table: LoadTable, levels: tuple[float, float]) -> str:
    before, after = levels
    return (
        f"{int(table.expert_tokens.sum()):,} (token, expert) pairs in {table.num_steps:,} steps · "
        f"fullest rank over mean rank, mean of steps and layers: {before:.2f} before, {after:.2f}"
        " after"
    )
