"""One rank's part of a trace: spans of a few steps, what ran on its device then, one file."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightmoe.telemetry.kineto import device_records
from lightmoe.telemetry.records import Record, Trace
from lightmoe.telemetry.trace import SpanRecorder, span
from lightmoe.telemetry.trace_file import write_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceConfig:
    """Steps first_step .. first_step + num_steps - 1 are recorded, into `folder`.

    The step before them runs under the profilers too, which are slow at first, and is dropped.
    These steps run alone: enqueued behind another, a step would begin on the host while that one
    runs, so its span would hold both, and the bytes sent, counted on the device, would be of both.
    All other steps run as without a trace.
    Without `device_records` what runs on the device is somebody else's to record: nsys.
    """

    folder: Path
    first_step: int = 4
    num_steps: int = 16
    device_records: bool = True


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its part."""
    return folder / f"rank-{rank:04}.json.gz"


class StepNote:
    """What a step learns while it runs: the bytes that this rank sent to each rank."""

    def __init__(self) -> None:
        self.bytes_sent: tuple[int, ...] = ()


class RankRecorder:
    """Counts steps, records those of the window, and writes its file after the last one."""

    def __init__(self, rank: int, config: TraceConfig, *, on_gpu: bool) -> None:
        self._rank = rank
        self._config = config
        self._on_gpu = on_gpu
        self._spans = SpanRecorder(rank, annotate=on_gpu)
        self._notes: dict[int, StepNote] = {}
        self._profiler: Any = None
        self._done = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[StepNote]:
        """Run one step in it; its number counts from the engine's start."""
        note = StepNote()
        if not self.covers(number):
            yield note
            return
        first = self._config.first_step
        self._start_profiler()
        with self._spans.recording(number if number >= first else None), span("step"):
            yield note
        self._notes[number] = note
        if number == self._last_step:
            self.close()

    def covers(self, number: int) -> bool:
        """Whether that step runs under the profilers, and so alone."""
        return not self._done and self._config.first_step - 1 <= number <= self._last_step

    @property
    def _last_step(self) -> int:
        return self._config.first_step + self._config.num_steps - 1

    def close(self) -> None:
        """Write what was recorded, if anything was and it has not been written."""
        if self._done:
            return
        self._done = True
        spans = [self._noted(one) for one in self._spans.records if self._is_kept(one.step)]
        device = self._stop_profiler(spans)
        if spans:
            write_trace(Trace((*spans, *device)), rank_file(self._config.folder, self._rank))

    def _is_kept(self, step: int | None) -> bool:
        """Whether a step is of the window, and no span of it was lost."""
        incomplete = self._spans.first_incomplete_step
        return step is not None and (incomplete is None or step < incomplete)

    def _noted(self, record: Record) -> Record:
        if record.name != "step" or record.step not in self._notes:
            return record
        return replace(record, bytes_sent=self._notes[record.step].bytes_sent)

    def _start_profiler(self) -> None:
        if not self._on_gpu or not self._config.device_records or self._profiler is not None:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        self._profiler = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
        self._profiler.start()

    def _stop_profiler(self, spans: list[Record]) -> list[Record]:
        if not self._on_gpu:
            return []
        import torch

        torch.cuda.synchronize()
        if self._profiler is None:
            torch.cuda.profiler.stop()  # nsys writes out here what it has: a rank may be killed
            return []
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kineto.json"
            self._profiler.export_chrome_trace(str(path))
            document = json.loads(path.read_text(encoding="utf-8"))
        return device_records(document, self._rank, spans)
