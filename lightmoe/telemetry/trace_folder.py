"""A run's folder: trace.json.gz of all ranks, overlap.json, timeline.png."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightmoe.errors import RankError, UsageError
from lightmoe.telemetry.overlap import headline, overlap_of
from lightmoe.telemetry.rank_recorder import rank_file
from lightmoe.telemetry.records import Record, Trace
from lightmoe.telemetry.trace_file import read_trace, write_bounded

MAX_TRACE_BYTES = 2 << 20
"""Of trace.json.gz: small enough to be committed or sent. The figures are of all steps."""


def prepare_folder(folder: Path) -> Path:
    """Make a run's folder, without an earlier run's parts; its absolute path."""
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("rank-*.json.gz"):
            part.unlink()
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror or error}; give another folder"
        ) from None
    return folder


def collect(folder: Path, num_ranks: int, title: str) -> Trace:
    """The parts of all ranks as one trace; the parts are removed.

    Raises RankError with the ranks that left none.
    """
    parts = [rank_file(folder, rank) for rank in range(num_ranks)]
    missing = [rank for rank, part in enumerate(parts) if not part.is_file()]
    if missing:
        raise RankError(
            f"ranks {missing} left no trace in {folder}; did fewer steps run than were to be"
            " recorded, or do those ranks not share this folder?"
        )
    records = [record for part in parts for record in read_trace(part).records]
    for part in parts:
        part.unlink()
    return Trace(tuple(records), title)


def finish_folder(folder: Path, num_ranks: int, title: str) -> list[str]:
    """Collect and write, or a line that says why there is nothing; as write_folder."""
    if not any(rank_file(folder, rank).is_file() for rank in range(num_ranks)):
        return [f"no trace in {folder}: fewer steps ran than come before the first to be recorded"]
    return write_folder(collect(folder, num_ranks, title), folder)


def with_bytes_of(trace: Trace, counted: Trace) -> Trace:
    """`trace`, its steps saying what `counted`, the same run as its ranks saw it, says they sent.

    A profiler from outside sees kernels, not what they send.
    """
    sent = {(one.rank, one.step): one.bytes_sent for one in counted.records if one.name == "step"}

    def told(record: Record) -> Record:
        if record.name != "step":
            return record
        return replace(record, bytes_sent=sent.get((record.rank, record.step), ()))

    return Trace(tuple(map(told, trace.records)), counted.title)


def write_folder(trace: Trace, folder: Path) -> list[str]:
    """Write everything; what was written, a line each, the headline first."""
    overlap = overlap_of(trace)
    lines = [headline(overlap)]
    path = folder / "overlap.json"
    path.write_text(json.dumps(overlap, indent=2) + "\n", encoding="utf-8")
    lines.append(str(path))
    path = folder / "trace.json.gz"
    num_steps = write_bounded(trace, path, MAX_TRACE_BYTES)
    cut = f", the first {num_steps} steps" if num_steps < overlap["num_steps"] else ""
    lines.append(f"{path} (open it at ui.perfetto.dev{cut})")
    try:
        save_timeline(folder / "timeline.png", trace)
        lines.append(str(folder / "timeline.png"))
    except UsageError as error:
        lines.append(f"no timeline.png: {error}")
    return lines


def save_timeline(path: Path, trace: Trace, before: Trace | None = None) -> None:
    """Draw a trace, or two with one time axis; UsageError without matplotlib."""
    draw = _drawing(path)
    draw(path, trace, before)


def _drawing(path: Path) -> Callable[[Path, Trace, Trace | None], None]:
    try:
        from lightmoe.telemetry.timeline_figure import save_figure
    except ModuleNotFoundError as error:
        raise UsageError(f"{path} needs {error.name}; pip install 'lightmoe[plot]'") from None
    return save_figure
