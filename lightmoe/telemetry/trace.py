"""`span("experts")`: a stage of a step as a range in every profiler, and in a record of our own.

Off, which is the rule, a span is one look at a module variable. On, it is an NVTX range, a
torch.profiler range where such a profiler runs, and one record of this rank's SpanRecorder.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from lightmoe.telemetry.records import Record

_Raw = tuple[str, int, int, int, str, int | None, int | None, int | None]
"""A span as it ends, quick to make: times of perf_counter_ns, else in Record's order."""
_NOTHING: AbstractContextManager[None] = nullcontext()
_current = threading.local()
_running: list[SpanRecorder] = []
"""Recorders of this process: one, or one a rank where ranks are threads."""


def span(
    name: str, layer: int | None = None, chunk: int | None = None
) -> AbstractContextManager[None]:
    """A stage, named as its file's stem. Inside another span, layer and chunk are that one's.

    `layer` counts the layers that have experts; of attention, all layers.
    """
    if not _running:
        return _NOTHING
    recorder = _recorder_here()
    return _NOTHING if recorder is None else _Span(recorder, name, layer, chunk)


def recording() -> bool:
    """Whether this thread's rank records spans now."""
    return bool(_running) and _recorder_here() is not None


def _recorder_here() -> SpanRecorder | None:
    """This thread's recorder; a helper thread's is the process's, if that has one only."""
    recorder: SpanRecorder | None = getattr(_current, "recorder", None)
    return recorder or (_running[0] if len(_running) == 1 else None)


MAX_SPANS = 200_000
"""That a rank keeps, about 30 MB."""


class SpanRecorder:
    """The spans of one rank, at most `max_spans`; from `first_incomplete_step` on some are lost.

    With `annotate` every span is also a range of NVTX and of a torch.profiler that runs.
    """

    def __init__(self, rank: int, *, annotate: bool, max_spans: int = MAX_SPANS) -> None:
        self.rank = rank
        self.first_incomplete_step: int | None = None
        self.step: int | None = None
        self._max_spans = max_spans
        self._spans: list[_Raw] = []
        self._clock_offset_ns = _clock_offset_ns()
        self._push, self._pop = _range_functions() if annotate else (None, None)

    @contextlib.contextmanager
    def recording(self, step: int | None) -> Iterator[None]:
        """Record this thread's spans as those of a step; None: as those of none."""
        self.step = step
        _current.recorder = self
        _running.append(self)
        try:
            yield
        finally:
            _running.remove(self)
            _current.recorder = None

    @property
    def records(self) -> list[Record]:
        """What was recorded, in the order in which it ended, on the clock of all processes."""
        offset = self._clock_offset_ns
        return [
            Record(
                rank=self.rank,
                kind="span",
                name=name,
                start_ns=start + offset,
                end_ns=end + offset,
                track=thread,
                stage=stage,
                layer=layer,
                chunk=chunk,
                step=step,
            )
            for name, start, end, thread, stage, layer, chunk, step in self._spans
        ]

    def add(self, span: _Raw) -> None:
        """Keep a span, within the bound."""
        if len(self._spans) < self._max_spans:
            self._spans.append(span)
        elif self.first_incomplete_step is None:
            self.first_incomplete_step = self.step

    def push(self, text: str) -> AbstractContextManager[Any] | None:
        """Open the range in the profilers; `pop` closes it."""
        if self._push is None:
            return None
        self._push(text)
        import torch

        if not torch._C._autograd._profiler_enabled():
            return None
        annotation = torch.profiler.record_function(text)
        annotation.__enter__()
        return annotation

    def pop(self, annotation: AbstractContextManager[Any] | None) -> None:
        """Close what `push` opened."""
        if annotation is not None:
            annotation.__exit__(None, None, None)
        if self._pop is not None:
            self._pop()


class _Span:
    """One open span; a linked list of them leads to the outermost of the thread."""

    __slots__ = ("_annotation", "_outer", "_recorder", "_start", "chunk", "layer", "name")

    def __init__(
        self, recorder: SpanRecorder, name: str, layer: int | None, chunk: int | None
    ) -> None:
        self._recorder = recorder
        self.name, self.layer, self.chunk = name, layer, chunk

    def __enter__(self) -> None:
        outer: _Span | None = getattr(_current, "span", None)
        self._outer = outer
        if outer is not None:
            self.layer = outer.layer if self.layer is None else self.layer
            self.chunk = outer.chunk if self.chunk is None else self.chunk
        _current.span = self
        self._annotation = self._recorder.push(self._text())
        self._start = time.perf_counter_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = time.perf_counter_ns()
        recorder = self._recorder
        recorder.pop(self._annotation)
        _current.span = self._outer
        stage = "" if self._outer is None else self._outer.name
        thread, step = threading.get_native_id(), recorder.step
        recorder.add((self.name, self._start, end, thread, stage, self.layer, self.chunk, step))

    def _text(self) -> str:
        """What profilers show and nsys.py reads: "experts layer 3 chunk 1"; a step has its rank."""
        text = self.name
        if self.name == "step":
            text += f" number {self._recorder.step} rank {self._recorder.rank}"
        if self.layer is not None:
            text += f" layer {self.layer}"
        return text if self.chunk is None else f"{text} chunk {self.chunk}"


def _clock_offset_ns() -> int:
    """Unix time less `perf_counter_ns`, the best of a few readings: the narrowest is right."""
    readings = []
    for _ in range(16):
        before, unix, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, unix - (before + after) // 2))
    return min(readings)[1]


def _range_functions() -> tuple[Callable[[str], Any] | None, Callable[[], Any] | None]:
    """NVTX's push and pop, of the package `nvtx`, else of torch where there is CUDA."""
    with contextlib.suppress(ModuleNotFoundError):
        import nvtx

        return nvtx.push_range, nvtx.pop_range
    import torch

    if torch.cuda.is_available():
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return (lambda text: None), (lambda: None)
