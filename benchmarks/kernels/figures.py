"""The pictures of the kernel benches: shares of the floor beside other implementations, rooflines.

python benchmarks/kernels/figures.py        # bar charts of the newest moe_layer results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peers
import results
from floors import SHAPES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1b2330"
QUIET = "#66707f"
GRID = "#e6e8ec"
OURS = "#d4473b"
OURS_DETERMINISTIC = "#f4b183"
PEER_HERE = "#b9c3cf"
PEER_PUBLISHED = "#7ea6cf"
KERNEL_MARKERS = {"layer": "o", "grouped_gemm": "^", "quant_gemm": "s"}
DTYPE_COLOURS = {"bf16": OURS, "fp16": "#0f8a66", "int4": "#3d6fb4", "int8": "#8d5aa8"}
ROOF_NAMES = {
    "half_k8": "m16n8k8, fp16",
    "half_k8_half": "m16n8k8, fp16 sums",
    "half_k16": "m16n8k16, fp16",
    "bfloat_k16": "m16n8k16, bf16",
}
LABEL_STEP = 0.032  # of the axes' height, between two labels
DPI = 150


def main() -> int:
    """Draw a bar chart for every card, path and dtype that has results."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the pictures")
    arguments = parser.parse_args()
    measured = results.newest("moe_layer", arguments.results)
    if not measured:
        print(f"no moe_layer result in {arguments.results}: run moe_layer.py on a card first")
        return 1
    for result in measured:
        for path, dtype in dict.fromkeys((row["path"], row["dtype"]) for row in result["rows"]):
            print(draw_bars(result, path, dtype, arguments.out))
    return 0


def draw_bars(result: dict[str, Any], path: str, dtype: str, folder: Path) -> Path:
    """Share of the floor by shape and T: ours in both modes, who ran beside it, the best peer."""
    wanted = {"path": path, "dtype": dtype, "routing": "uniform"}
    rows = [row for row in result["rows"] if wanted.items() <= row.items()]
    shapes = [name for name in SHAPES if any(row["shape"] == name for row in rows)]
    figure = Figure(figsize=(4.6 * len(shapes) + 0.8, 4.4), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(all_axes, shapes, strict=True):
        _bars(axes, [row for row in rows if row["shape"] == shape], shape, dtype)
    all_axes[0].set_ylabel("share of the floor", fontsize=9, color=QUIET)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower left", ncol=len(labels), fontsize=8, frameon=False,
        labelcolor=INK, bbox_to_anchor=(0.01, -0.005),
    )  # fmt: skip
    _title(
        figure,
        f"One MoE layer, {dtype}, {path} path: how near the floor",
        f"{result['device']}, {result['date']}, commit {result['commit']}; uniform routing, "
        f"medians. Best peer: {peers.published()['label']}.",
    )
    figure.subplots_adjust(left=0.07, right=0.99, top=0.8, bottom=0.19, wspace=0.06)
    machine = results.machine_name(result["device"])
    return _save(figure, folder, f"moe_layer-{path}-{dtype}-{machine}")


def bar_series(
    rows: list[dict[str, Any]], shape: str, dtype: str
) -> list[tuple[str, str, dict[int, float]]]:
    """(label, colour, share of the floor by T) of each kind of bar that has a value."""
    ours = {mode: _by_tokens(rows, "lightmoe", mode) for mode in ("free", "deterministic")}
    tokens = sorted({row["tokens"] for row in rows})
    best = {t: found[1] for t in tokens if (found := peers.best(shape, t, dtype)) is not None}
    others = dict.fromkeys(row["impl"] for row in rows if row["impl"] != "lightmoe")
    series = [
        ("Light-MoE", OURS, ours["free"]),
        ("Light-MoE, deterministic", OURS_DETERMINISTIC, ours["deterministic"]),
        *((f"{name}, this run", PEER_HERE, _by_tokens(rows, name, "free")) for name in others),
        ("best peer, other run", PEER_PUBLISHED, best),
    ]
    return [entry for entry in series if entry[2]]


def _by_tokens(rows: list[dict[str, Any]], impl: str, mode: str) -> dict[int, float]:
    return {
        row["tokens"]: row["share_of_floor"]
        for row in rows
        if row["impl"] == impl and row["mode"] == mode
    }


def _bars(axes: Axes, rows: list[dict[str, Any]], shape: str, dtype: str) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    series = bar_series(rows, shape, dtype)
    width = 0.84 / len(series)
    for number, (label, colour, values) in enumerate(series):
        places = np.arange(len(tokens)) + (number - (len(series) - 1) / 2) * width
        heights = [100 * values.get(count, 0.0) for count in tokens]
        axes.bar(places, heights, width * 0.92, color=colour, label=label, zorder=2)
        for place, height in zip(places, heights, strict=True):
            if height and colour == OURS:
                axes.text(place, height + 1, f"{height:.0f}", ha="center", va="bottom",
                          fontsize=6.5, color=INK)  # fmt: skip
    axes.set_xticks(range(len(tokens)), [str(count) for count in tokens])
    axes.set_xlabel("tokens", fontsize=9, color=QUIET)
    axes.set_title(shape, fontsize=10, color=INK, loc="left")
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    _quiet(axes)


def draw_roofline(roofline: dict[str, Any], folder: Path) -> Path:
    """FLOP/s over FLOP per byte: the card's roofs, and a point for every layer and kernel."""
    figure = Figure(figsize=(8.6, 5.4), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.11, 0.7, 0.73))
    _roofs(axes, roofline)
    _points(axes, roofline["points"], hollow=roofline["predicted"])
    axes.set_xlabel("FLOP per byte of device memory", fontsize=9, color=QUIET)
    axes.set_ylabel("TFLOP/s", fontsize=9, color=QUIET)
    axes.grid(which="major", color=GRID, linewidth=0.8, zorder=0)
    _quiet(axes)
    axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=INK)
    title = "Roofline of one MoE layer"
    if roofline["predicted"]:
        title += ": PREDICTED, NOT MEASURED"
        axes.text(
            0.02, 0.95, "predicted,\nnot measured", transform=axes.transAxes, fontsize=17,
            color=OURS, alpha=0.75, va="top", weight="bold",
        )  # fmt: skip
    _title(figure, title, f"{roofline['device']}; {roofline['note']}")
    return _save(figure, folder, f"roofline-{results.machine_name(roofline['device'])}")


def _roofs(axes: Axes, roofline: dict[str, Any]) -> None:
    bandwidth, rates = roofline["bandwidth"], roofline["rates"]
    top = max(rates.values())
    low, high = 0.5, 40 * top / bandwidth
    slope = np.geomspace(low, top / bandwidth, 50)
    axes.plot(slope, slope * bandwidth / 1e12, color=INK, linewidth=1.4, zorder=3)
    axes.text(
        low * 1.25, low * 1.85 * bandwidth / 1e12, f"{bandwidth / 1e12:.2f} TB/s", fontsize=8,
        color=INK, rotation=36, rotation_mode="anchor",
    )  # fmt: skip
    for name, rate in rates.items():
        library = name.startswith("library")
        style = "--" if library else "-"
        axes.plot([rate / bandwidth, high], [rate / 1e12] * 2, color=QUIET, linewidth=1.1,
                  linestyle=style, zorder=2)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low * bandwidth / 1e12 / 2, top / 1e12 * 2)
    bottom, ceiling = np.log10(axes.get_ylim())
    last = -1.0
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        height = (np.log10(rate / 1e12) - bottom) / (ceiling - bottom)
        last = max(float(height), last + LABEL_STEP)
        axes.text(
            1.01, last, f"{ROOF_NAMES.get(name, name)}: {rate / 1e12:.0f}", fontsize=7.5,
            color=QUIET, va="center", transform=axes.transAxes,
        )  # fmt: skip


def _points(axes: Axes, points: list[dict[str, Any]], *, hollow: bool) -> None:
    for kernel, marker in KERNEL_MARKERS.items():
        for dtype, colour in DTYPE_COLOURS.items():
            found = [p for p in points if p["kernel"] == kernel and p["dtype"] == dtype]
            if found:
                axes.scatter(
                    [p["intensity"] for p in found],
                    [p["rate"] / 1e12 for p in found],
                    s=22, marker=marker, zorder=4, linewidths=1.1, edgecolors=colour,
                    facecolors="none" if hollow else colour,
                    label=f"{kernel} {dtype}{' (predicted)' if hollow else ''}",
                )  # fmt: skip


def _quiet(axes: Axes) -> None:
    axes.tick_params(which="both", labelsize=8, colors=QUIET, length=0)
    axes.spines[:].set_visible(False)


def _title(figure: Figure, title: str, below: str) -> None:
    figure.text(0.012, 0.95, title, fontsize=13, color=INK, weight="bold", va="center")
    figure.text(0.012, 0.895, below, fontsize=8.5, color=QUIET, va="center")


def _save(figure: Figure, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, format="png")
    return path


if __name__ == "__main__":
    sys.exit(main())
