"""The picture of a trace: what is in it, and that it is one."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex

from lightmoe.errors import UsageError
from lightmoe.telemetry.timeline_figure import (
    COLOURS,
    draw_timeline,
    layer_labels,
    save_figure,
)
from lightmoe.telemetry.timeline_panel import panel_of
from lightmoe.telemetry.trace_folder import save_timeline
from tests.telemetry.traces import gpu_trace, in_halves


def test_two_traces_share_one_axis_and_one_headline() -> None:
    panels = [panel_of(gpu_trace(overlapped=False)), panel_of(gpu_trace())]
    figure = draw_timeline(panels)
    assert len(figure.axes) == 2
    limits = {axes.get_xlim() for axes in figure.axes}
    assert limits == {(0.0, max(panel.length_ns for panel in panels) / 1e6)}
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "exposed share 43% → 27%"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "attention"
    assert labels[-1] == "exposed: the rank only waits"


@pytest.mark.parametrize(
    ("second_ns", "labels"),
    [
        (50_000_000, [(0, "layer 23"), (50_000_000, "layer 24")]),
        (5_000_000, [(0, "layers 23, 24")]),
    ],
)
def test_layers_too_near_for_two_names_have_one(
    second_ns: int, labels: list[tuple[int, str]]
) -> None:
    assert layer_labels([(0, 23), (second_ns, 24)], axis_ns=100_000_000) == labels


def test_names_of_layers_do_not_overlap_in_the_figure() -> None:
    panels = [panel_of(in_halves()), panel_of(gpu_trace())]
    panels[1].layers.append((panels[1].layers[-1][0] + 1000, 9))
    figure = draw_timeline(panels)
    renderer = RendererAgg(*figure.bbox.size, figure.dpi)
    for axes in figure.axes:
        names = [text for text in axes.texts if text.get_text().startswith("layer")]
        boxes = [text.get_window_extent(renderer) for text in names]
        assert len(boxes) == 2
        assert boxes[0].x1 < boxes[1].x0


def test_stages_that_compute_at_once_share_the_row() -> None:
    (axes,) = draw_timeline([panel_of(in_halves())]).axes
    green, orange = (
        {
            (round(low, 2), round(high, 2))
            for bars in axes.collections
            if to_hex(bars.get_facecolor()[0]) == COLOURS[stage]
            for path in bars.get_paths()
            for low, high in [(path.vertices[:, 1].min(), path.vertices[:, 1].max())]
        }
        for stage in ("attention", "experts")
    )
    whole, lower = (0.06, 0.56), (0.31, 0.56)
    assert green == {whole}
    assert orange == {whole, lower}


def test_the_file_is_a_png_that_grows_with_the_ranks(tmp_path: Path) -> None:
    heights = []
    for num_ranks in (1, 10):
        save_figure(tmp_path / "timeline.png", gpu_trace(num_ranks=num_ranks))
        content = (tmp_path / "timeline.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        heights.append(struct.unpack(">II", content[16:24])[1])
    assert heights[0] < heights[1] < 1500


def test_without_matplotlib_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lightmoe.telemetry.timeline_figure")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"needs matplotlib.*; pip install 'lightmoe\[plot\]'"):
        save_timeline(tmp_path / "timeline.png", gpu_trace())
