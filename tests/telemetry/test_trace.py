"""Spans: nothing while off, and on all that a reader of the trace needs to know of them."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from lightmoe.telemetry import trace
from lightmoe.telemetry.trace import SpanRecorder, recording, span


def test_off_a_span_is_one_shared_nothing() -> None:
    assert span("gate", 3) is span("experts", 1, chunk=2)
    assert not recording()
    with span("gate") as entered:
        assert entered is None


def test_a_record_has_times_thread_rank_layer_chunk_and_step() -> None:
    recorder = SpanRecorder(2, annotate=False)
    before = time.time_ns()
    with recorder.recording(7):
        assert recording()
        with span("experts", 3, chunk=1):
            time.sleep(0.01)
    after = time.time_ns()

    (record,) = recorder.records
    assert (record.rank, record.kind, record.name) == (2, "span", "experts")
    assert (record.layer, record.chunk, record.step, record.stage) == (3, 1, 7, "")
    assert record.track == threading.get_native_id()
    assert record.end_ns - record.start_ns >= 10_000_000
    # perf_counter and the wall clock may drift apart, but not by this much in 10 ms.
    assert before - 1_000_000 <= record.start_ns <= record.end_ns <= after + 1_000_000


def test_an_inner_span_takes_over_layer_and_chunk_and_knows_the_outer_one() -> None:
    recorder = SpanRecorder(0, annotate=False)
    with recorder.recording(0), span("step"):
        with span("pipeline", 4), span("dispatch", chunk=1), span("collective"):
            pass
        with span("sampler"):
            pass
    found = {record.name: record for record in recorder.records}

    assert (found["collective"].layer, found["collective"].chunk) == (4, 1)
    assert found["collective"].stage == "dispatch"
    assert found["pipeline"].stage == "step"
    assert (found["sampler"].layer, found["sampler"].stage) == (None, "step")


def test_a_span_ends_with_an_error_in_it() -> None:
    recorder = SpanRecorder(0, annotate=False)
    with recorder.recording(0):
        with pytest.raises(ValueError, match="broken"), span("gate"):
            raise ValueError("broken")
        with span("route"):
            pass
    assert [(one.name, one.stage) for one in recorder.records] == [("gate", ""), ("route", "")]
    assert not recording()


def test_ranks_that_are_threads_keep_their_spans_apart() -> None:
    recorders = [SpanRecorder(rank, annotate=False) for rank in range(4)]
    barrier = threading.Barrier(4)

    def run(recorder: SpanRecorder) -> None:
        for step in range(20):
            with recorder.recording(step):
                barrier.wait()
                with span("gate", recorder.rank):
                    pass
                barrier.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, recorders))
    for rank, recorder in enumerate(recorders):
        assert [(one.rank, one.layer, one.step) for one in recorder.records] == [
            (rank, rank, step) for step in range(20)
        ]


def test_a_helper_thread_records_for_the_only_rank_of_its_process() -> None:
    recorder = SpanRecorder(0, annotate=False)

    def help_out() -> None:
        with span("copy_engine"):
            pass

    with recorder.recording(0):
        helper = threading.Thread(target=help_out)
        helper.start()
        helper.join()
    assert [one.name for one in recorder.records] == ["copy_engine"]


def test_records_are_bounded() -> None:
    recorder = SpanRecorder(0, annotate=False, max_spans=3)
    for step in range(4):
        with recorder.recording(step):
            for _ in range(2):
                with span("gate"):
                    pass
    assert [one.step for one in recorder.records] == [0, 0, 1]
    assert recorder.first_incomplete_step == 1


def test_profilers_see_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    fake = SimpleNamespace(push_range=pushed.append, pop_range=lambda: pushed.append("pop"))
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    recorder = SpanRecorder(3, annotate=True)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        recorder.recording(9),
        span("step"),
        span("experts", 2, chunk=0),
    ):
        torch.ones(2).add_(1)

    assert pushed == ["step number 9 rank 3", "experts layer 2 chunk 0", "pop", "pop"]
    names = {event.key for event in profiler.key_averages()}
    assert {"step number 9 rank 3", "experts layer 2 chunk 0"} <= names


def test_without_nvtx_and_without_cuda_annotating_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recorder = SpanRecorder(0, annotate=True)
    with recorder.recording(0), span("gate"):
        pass
    assert [one.name for one in recorder.records] == ["gate"]


def test_the_clock_offset_leads_to_the_wall_clock() -> None:
    offset = trace._clock_offset_ns()
    assert abs(time.perf_counter_ns() + offset - time.time_ns()) < 5_000_000
