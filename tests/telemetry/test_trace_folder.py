"""A run's folder, from the parts of its ranks to what a person opens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightmoe.errors import RankError, UsageError
from lightmoe.telemetry import trace, trace_folder
from lightmoe.telemetry.overlap import overlap_of
from lightmoe.telemetry.rank_recorder import RankRecorder, TraceConfig, rank_file
from lightmoe.telemetry.records import Trace
from lightmoe.telemetry.trace import span
from lightmoe.telemetry.trace_file import read_trace, write_trace
from lightmoe.telemetry.trace_folder import (
    collect,
    finish_folder,
    prepare_folder,
    with_bytes_of,
    write_folder,
)
from tests.telemetry.traces import gpu_trace, record


def run_steps(recorder: RankRecorder, numbers: range) -> None:
    """Steps with one span each, in which as many bytes go out as the step's number says."""
    for number in numbers:
        with recorder.step(number) as note:
            with span("experts", 0):
                pass
            note.bytes_sent = (number, 0)


def test_ranks_record_their_window_and_nothing_else(tmp_path: Path) -> None:
    config = TraceConfig(folder=tmp_path, first_step=2, num_steps=3)
    for rank in (0, 1):
        run_steps(RankRecorder(rank, config, on_gpu=False), range(10))
    found = collect(tmp_path, 2, "two ranks")

    assert list(found.steps) == [(rank, step) for rank in (0, 1) for step in (2, 3, 4)]
    assert [one.name for one in found.steps[1, 3]] == ["experts", "step"]
    assert overlap_of(found)["bytes_per_link"] == [[3, 0], [3, 0]]
    assert found.title == "two ranks"
    assert list(tmp_path.iterdir()) == []


def test_a_window_from_the_very_first_step(tmp_path: Path) -> None:
    config = TraceConfig(folder=tmp_path, first_step=0, num_steps=1)
    run_steps(RankRecorder(0, config, on_gpu=False), range(2))
    assert list(collect(tmp_path, 1, "").steps) == [(0, 0)]


def test_a_step_of_which_spans_are_lost_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace.SpanRecorder.__init__, "__kwdefaults__", {"max_spans": 5})
    config = TraceConfig(folder=tmp_path, first_step=0, num_steps=9)
    run_steps(RankRecorder(0, config, on_gpu=False), range(9))  # two spans a step
    assert list(collect(tmp_path, 1, "").steps) == [(0, 0), (0, 1)]


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    config = TraceConfig(folder=tmp_path, first_step=2, num_steps=100)
    recorder = RankRecorder(0, config, on_gpu=False)
    run_steps(recorder, range(5))
    assert not rank_file(tmp_path, 0).exists()
    recorder.close()
    recorder.close()
    lines = finish_folder(tmp_path, 1, "early")
    assert lines[0].startswith("exposed share 0.0%")
    assert list(read_trace(tmp_path / "trace.json.gz").steps) == [(0, 2), (0, 3), (0, 4)]


def test_a_run_that_ends_before_the_window_says_so(tmp_path: Path) -> None:
    recorder = RankRecorder(0, TraceConfig(folder=tmp_path), on_gpu=False)
    run_steps(recorder, range(3))
    recorder.close()
    (line,) = finish_folder(tmp_path, 1, "")
    assert line.startswith(f"no trace in {tmp_path}: fewer steps ran")


def test_ranks_without_a_part_are_named(tmp_path: Path) -> None:
    write_trace(gpu_trace(), rank_file(tmp_path, 1))
    with pytest.raises(RankError, match=r"ranks \[0, 2\] left no trace in"):
        collect(tmp_path, 3, "")


def test_an_earlier_runs_parts_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert prepare_folder(folder) == folder.resolve()
    write_trace(gpu_trace(), rank_file(folder, 0))
    (folder / "notes.txt").write_text("mine")
    prepare_folder(folder)
    assert [one.name for one in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match=r"cannot be written: .*; give another folder"):
        prepare_folder(folder / "notes.txt")


def test_everything_is_written_and_listed(tmp_path: Path) -> None:
    lines = write_folder(gpu_trace(num_steps=2), tmp_path)
    names = ["overlap.json", "trace.json.gz", "timeline.png"]
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(names)
    assert len(lines) == 4
    for line, name in zip(lines[1:], names, strict=True):
        assert line.startswith(str(tmp_path / name))
    overlap = json.loads((tmp_path / "overlap.json").read_text())
    assert overlap == overlap_of(read_trace(tmp_path / "trace.json.gz"))


def test_a_trace_that_was_cut_says_so_and_the_figures_are_of_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_folder, "MAX_TRACE_BYTES", 1)
    lines = write_folder(gpu_trace(num_steps=3), tmp_path)
    assert lines[2].endswith("(open it at ui.perfetto.dev, the first 1 steps)")
    assert json.loads((tmp_path / "overlap.json").read_text())["num_steps"] == 3


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lightmoe.telemetry.timeline_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = write_folder(gpu_trace(), tmp_path)
    assert lines[-1].startswith("no timeline.png: ")
    assert "pip install 'lightmoe[plot]'" in lines[-1]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["overlap.json", "trace.json.gz"]


def test_a_report_learns_from_the_ranks_what_they_sent() -> None:
    seen = Trace((record("step", 0, 9, kind="span", step=4), record("gemm", 1, 2, step=4)))
    counted = Trace(
        (record("step", 0, 9, kind="span", step=4, bytes_sent=(0, 8)),), "as its ranks saw it"
    )
    told = with_bytes_of(seen, counted)
    assert [one.bytes_sent for one in told.records] == [(0, 8), ()]
    assert told.title == "as its ranks saw it"
