"""The picture of a LoadTable: layer x expert and layer x rank, hot in red, idle in blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightmoe.telemetry.heatmap import LoadTable

INK = "#1b2330"
QUIET = "#66707f"
SPARE = "#0f8a66"
MAX_NUMBERED_CELLS = 160

COLOURS = LinearSegmentedColormap.from_list(
    "load",
    [(0.0, "#7ea6cf"), (0.5, "#f5f4f0"), (0.66, "#f4b183"), (0.83, "#d4473b"), (1.0, "#6d0f2c")],
)
"""Pale blue below the layer's mean, near white at it, red above: only heat draws the eye."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes in inches, so that a cell is as large as the number of cells allows."""

    experts: float
    ranks: float
    height: float

    @classmethod
    def of(cls, num_layers: int, num_experts: int, num_ranks: int) -> Layout:
        return cls(
            experts=float(np.clip(0.62 * num_experts, 4.6, 13.0)),
            ranks=float(np.clip(0.46 * num_ranks, 2.2, 6.0)),
            height=float(np.clip(0.5 * num_layers, 1.6, 8.5)),
        )


def draw_load(table: LoadTable) -> Figure:
    """The figure, not yet written anywhere."""
    experts, ranks = table.expert_ratios, table.rank_ratios
    layout = Layout.of(len(experts), experts.shape[1], ranks.shape[1])
    left, gap, right, top, bottom = 0.75, 0.75, 1.15, 1.1, 0.6
    width = left + layout.experts + gap + layout.ranks + right
    height = top + layout.height + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def place(start: float, size: float) -> Axes:
        box = (start / width, bottom / height, size / width, layout.height / height)
        return figure.add_axes(box)

    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, float(experts.max()), float(ranks.max())))
    expert_axes = place(left, layout.experts)
    rank_axes = place(left + layout.experts + gap, layout.ranks)
    for axes, ratios, name in (expert_axes, experts, "expert"), (rank_axes, ranks, "rank"):
        draw_panel(axes, ratios, norm, name, has_numbers=bool(table.expert_tokens.any()))
    mark_spares(rank_axes, table)
    bar_axes = place(left + layout.experts + gap + layout.ranks + 0.25, 0.16)
    colour_bar(figure, bar_axes, rank_axes, norm)
    _titles(figure, table, left / width, height)
    return figure


def draw_panel(
    axes: Axes, ratios: np.ndarray, norm: TwoSlopeNorm, column_name: str, *, has_numbers: bool
) -> None:
    """Layers x columns: `ratios` [L, columns] to their layer's mean; numbers where they fit."""
    num_rows, num_columns = ratios.shape
    axes.imshow(ratios, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xlabel(column_name, fontsize=9, color=QUIET)
    axes.set_ylabel("layer", fontsize=9, color=QUIET)
    axes.set_xticks(ticks(num_columns))
    axes.set_yticks(ticks(num_rows))
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.spines[:].set_visible(False)
    if num_rows * num_columns <= MAX_NUMBERED_CELLS:
        _separate(axes, num_rows, num_columns)
        if has_numbers:
            _number(axes, ratios, norm)


def ticks(count: int) -> list[int]:
    """At most 16 round numbers from 0 on."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count <= 16 * step)
    return list(range(0, count, step))


def _separate(axes: Axes, num_rows: int, num_columns: int) -> None:
    """White lines between cells."""
    axes.set_xticks(np.arange(num_columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _number(axes: Axes, ratios: np.ndarray, norm: TwoSlopeNorm) -> None:
    for (row, column), ratio in np.ndenumerate(ratios):
        is_dark = norm(ratio) > 0.76
        text = f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark else INK,
        )


def mark_spares(axes: Axes, table: LoadTable) -> None:
    """Hatches the columns of the spares and writes their numbers in another colour."""
    spares: list[int] = np.flatnonzero(table.rank_is_spare).tolist()
    num_layers = len(table.expert_tokens)
    for rank in spares:
        axes.add_patch(
            Rectangle(
                (rank - 0.5, -0.5),
                1,
                num_layers,
                fill=False,
                hatch="////",
                edgecolor=SPARE,
                linewidth=0,
                alpha=0.35,
            )
        )
        axes.text(
            rank,
            -0.62,
            "spare",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=SPARE,
            rotation=90 if len(spares) > 2 or len(table.rank_kinds) > 13 else 0,
        )
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        if tick in spares:
            label.set_color(SPARE)
            label.set_fontweight("bold")


def colour_bar(figure: Figure, bar_axes: Axes, axes: Axes, norm: TwoSlopeNorm) -> None:
    """What the colours of `axes` mean, in `bar_axes`."""
    bar = figure.colorbar(axes.images[0], cax=bar_axes)
    bar.set_ticks(_bar_ticks(norm.vmax or 2.0), labels=_bar_labels(norm.vmax or 2.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=QUIET, length=0)
    bar.set_label("times the layer's mean", fontsize=8.5, color=QUIET)


def _bar_ticks(most: float) -> list[float]:
    return [0.0, 0.5, 1.0, (1.0 + most) / 2, most]


def _bar_labels(most: float) -> list[str]:
    return [f"{tick:.2g}×" for tick in _bar_ticks(most)]


def _titles(figure: Figure, table: LoadTable, left: float, height: float) -> None:
    title = f"{table.model}: expert load"
    top, below = 1 - 0.3 / height, 1 - 0.56 / height
    figure.text(left, top, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(left, below, _summary(table), fontsize=9.5, color=QUIET, va="center")


def _summary(table: LoadTable) -> str:
    """What is hot, in words."""
    num_pairs = int(table.expert_tokens.sum())
    if num_pairs == 0:
        return "no tokens counted yet"
    layer, expert = np.unravel_index(table.expert_ratios.argmax(), table.expert_tokens.shape)
    ranks = table.rank_pairs.sum(axis=1)
    busiest = int(ranks.argmax())
    kind = " (spare)" if table.rank_is_spare[busiest] else ""
    over_mean = ranks[busiest] / ranks.mean() if ranks.any() else 1.0
    return (
        f"{num_pairs:,} (token, expert) pairs in {table.num_steps:,} steps · "
        f"hottest: layer {layer} expert {expert}, {table.expert_ratios.max():.1f}× mean · "
        f"busiest: rank {busiest}{kind}, {over_mean:.2f}× mean"
    )
