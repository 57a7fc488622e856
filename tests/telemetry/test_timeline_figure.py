"""The picture of a trace: what is in it, and that it is one."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from lightmoe.errors import UsageError
from lightmoe.telemetry.intervals import length
from lightmoe.telemetry.records import Trace
from lightmoe.telemetry.timeline_figure import draw_timeline, panel_of, save_figure
from lightmoe.telemetry.trace_folder import save_timeline
from tests.telemetry.traces import BASE_NS, gpu_trace, record


def test_a_panel_shows_two_layers_of_the_middle_step_of_every_rank() -> None:
    panel = panel_of(gpu_trace(num_ranks=3, num_chunks=2, num_steps=3))
    # A layer takes 550 us, so the second step begins at 1650; rank 2 is 20 us late.
    assert (panel.start_ns - BASE_NS, panel.length_ns) == (1650_000, 1120_000)
    assert panel.layers == [(BASE_NS + 1650_000, 0), (BASE_NS + 2200_000, 1)]
    assert [row.rank for row in panel.rows] == [0, 1, 2]
    for row in panel.rows[:1]:
        assert length(row.compute["attention"]) == 220_000
        assert length(row.compute["experts"]) == 600_000
        assert length(row.communication["dispatch"]) == 200_000
        assert length(row.communication["combine"]) == 400_000
        assert length(row.exposed) == 300_000


def test_on_the_cpu_a_stage_is_what_is_left_of_it_without_waiting() -> None:
    spans = (
        record("step", 0, 100, kind="span"),
        record("pipeline", 5, 95, kind="span", layer=0, stage="step"),
        record("dispatch", 10, 50, kind="span", layer=0, stage="pipeline"),
        record("collective", 20, 50, kind="span", layer=0, stage="dispatch"),
        record("experts", 50, 90, kind="span", layer=0, stage="pipeline"),
    )
    panel = panel_of(Trace(spans))
    (row,) = panel.rows
    assert {stage: length(part) for stage, part in row.compute.items()} == {
        "": 10_000,
        "dispatch": 10_000,
        "experts": 40_000,
    }
    assert length(row.communication["dispatch"]) == length(row.exposed) == 30_000
    assert (panel.source, panel.exposed_share) == ("spans", pytest.approx(0.3))


def test_without_layers_the_whole_step_is_shown() -> None:
    kernels = (record("step", 0, 100, kind="span"), record("exchange_pull", 10, 140))
    panel = panel_of(Trace(kernels))
    assert (panel.length_ns, panel.layers) == (140_000, [])


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
