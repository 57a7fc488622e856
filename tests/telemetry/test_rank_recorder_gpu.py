"""On a card: kernels of recorded steps, with the spans that launched them, graphs included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightmoe.telemetry.overlap import overlap_of
from lightmoe.telemetry.rank_recorder import RankRecorder, TraceConfig
from lightmoe.telemetry.trace import span
from lightmoe.telemetry.trace_folder import collect

pytestmark = pytest.mark.gpu


def test_kernels_belong_to_the_steps_and_stages_that_launched_them(tmp_path: Path) -> None:
    recorder = RankRecorder(0, TraceConfig(folder=tmp_path, first_step=2, num_steps=2), on_gpu=True)
    square = torch.randn(2048, 2048, device="cuda")
    square @ square  # cuBLAS makes its handle, which it cannot inside a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), span("experts"):
        product = square @ square
    for number in range(6):
        with recorder.step(number):
            with span("attention", 1):
                torch.softmax(square, dim=-1)
            with span("experts", 1, chunk=0):
                square @ square
            graph.replay()
            torch.cuda.synchronize()
    trace = collect(tmp_path, 1, "card")

    assert trace.source == "kernels"
    assert [step for _, step in trace.steps] == [2, 3]
    for records in trace.steps.values():
        (step,) = [one for one in records if one.name == "step"]
        kernels = [one for one in records if one.kind == "kernel"]
        stages = {one.stage for one in kernels}
        assert {"attention", "experts"} <= stages
        assert any(one.stage not in ("attention", "experts") for one in kernels), "the graph's"
        assert {one.layer for one in kernels if one.stage == "experts"} == {1}
        # The last one ends before the synchronize that ends the step: the clocks are the same.
        assert all(step.start_ns < one.start_ns < one.end_ns < step.end_ns for one in kernels)
    assert overlap_of(trace)["hidden_fraction"] is None
    assert product.isfinite().all()


def test_kernels_beside_copies_between_host_and_device_are_told_apart(tmp_path: Path) -> None:
    recorder = RankRecorder(0, TraceConfig(folder=tmp_path, first_step=0, num_steps=1), on_gpu=True)
    rows = torch.randn(64, 1024, 1024, device="cuda")
    host = torch.empty(rows.shape, pin_memory=True)
    lane = torch.cuda.Stream()
    torch.matmul(rows, rows)  # what the first one takes is more than the copy
    with recorder.step(0):
        lane.wait_stream(torch.cuda.current_stream())
        with span("experts", 0, chunk=0):
            for _ in range(20):
                torch.matmul(rows, rows)
        with torch.cuda.stream(lane), span("dispatch", 0, chunk=0):
            host.copy_(rows, non_blocking=True)
        torch.cuda.synchronize()
    trace = collect(tmp_path, 1, "card")
    copies = [one for one in trace.records if one.role == "communication" and one.kind == "copy"]
    assert [(one.name, one.num_bytes) for one in copies] == [("DtoH", rows.numel() * 4)]
    found = overlap_of(trace)
    assert found["dispatch_ms"] > 0
    assert found["hidden_fraction"] > 0.5
