"""torch.profiler's JSON: kernels go to the step and the stage in which they were launched."""

from __future__ import annotations

from typing import Any

import pytest

from lightmoe.errors import MachineError
from lightmoe.telemetry.kineto import device_records
from lightmoe.telemetry.records import Record
from tests.telemetry.traces import BASE_NS, record

SPANS = [
    record("step", 0, 1000, kind="span", step=5, track=11),
    record("dispatch", 100, 200, kind="span", step=5, layer=2, chunk=1, stage="pipeline", track=11),
    record(
        "collective", 120, 180, kind="span", step=5, layer=2, chunk=1, stage="dispatch", track=11
    ),
    record("experts", 200, 300, kind="span", step=5, layer=2, chunk=0, stage="pipeline", track=11),
]


def event(category: str, name: str, begin: float, end: float, **values: Any) -> dict[str, Any]:
    arguments = {key: value for key, value in values.items() if key != "tid"}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 0,
        "tid": values.get("tid", 7),
        "ts": begin,
        "dur": end - begin,
        "args": arguments,
    }


def launch(begin: float, correlation: int, thread: int = 11) -> dict[str, Any]:
    name = "cudaLaunchKernel"
    return event("cuda_runtime", name, begin, begin + 5, correlation=correlation, tid=thread)


def read(*events: dict[str, Any]) -> list[Record]:
    document = {"baseTimeNanoseconds": BASE_NS, "traceEvents": [{"ph": "M"}, *events]}
    return device_records(document, 3, SPANS)


def test_a_kernel_belongs_to_the_span_that_launched_it_however_late_it_runs() -> None:
    (found,) = read(
        launch(250, 1), event("kernel", "void lm::gemm<4>(int)", 900.5, 1200.25, stream=7,
                              correlation=1)
    )  # fmt: skip
    assert (found.rank, found.kind, found.name, found.track) == (3, "kernel", "gemm", 7)
    assert (found.stage, found.layer, found.chunk, found.step) == ("experts", 2, 0, 5)
    assert (found.start_ns, found.end_ns) == (BASE_NS + 900_500, BASE_NS + 1_200_250)
    assert found.role == "compute"


def test_what_a_transport_launches_is_of_the_stage_around_it() -> None:
    kernel, copy = read(
        launch(150, 1),
        event("kernel", "ncclDevKernel_SendRecv(ncclArgs)", 160, 190, stream=20, correlation=1),
        launch(151, 2),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 190, 195, stream=20, correlation=2,
              bytes=4096),
    )  # fmt: skip
    assert (kernel.name, kernel.stage, kernel.role) == (
        "ncclDevKernel_SendRecv",
        "dispatch",
        "communication",
    )
    assert (copy.name, copy.stage, copy.num_bytes) == ("DtoH", "dispatch", 4096)
    assert copy.role == "communication"


def test_inputs_are_copied_but_not_communicated() -> None:
    (copy,) = read(
        launch(20, 1),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 30, 35, correlation=1, bytes=64),
    )
    assert (copy.name, copy.role) == ("HtoD", "other")


def test_kernels_of_a_graph_are_known_by_their_names() -> None:
    names = ["exchange_pull", "exchange_combine_bf16", "grouped_gemm_bf16", "topk_gate_x", "other"]
    found = read(
        launch(20, 1),
        *(event("kernel", name, 100 + place, 101 + place, correlation=1)
          for place, name in enumerate(names)),
    )  # fmt: skip
    stages = ["dispatch", "combine", "experts", "gate", "step"]
    assert [one.stage for one in found] == stages
    assert [one.role for one in found] == ["communication"] * 2 + ["compute"] * 3


@pytest.mark.parametrize("name", ["exchange_give", "exchange_sum_bf16"])
def test_what_takes_results_home_belongs_to_combine(name: str) -> None:
    (found,) = read(launch(20, 1), event("kernel", name, 100, 101, correlation=1))
    assert (found.stage, found.role) == ("combine", "communication")


def test_what_was_launched_outside_the_steps_is_left_out() -> None:
    found = read(
        launch(250, 1),
        event("kernel", "inside", 260, 270, correlation=1),
        launch(2000, 2),
        event("kernel", "outside", 2010, 2020, correlation=2),
        event("kernel", "nobody's, in the step", 400, 500),
        event("gpu_memset", "Memset (Device)", 300, 301, correlation=1),
        event("cpu_op", "aten::add", 300, 301),
    )
    assert [one.name for one in found] == ["inside", "nobody's, in the step", "memset"]


def test_a_launch_of_a_thread_without_spans_is_of_the_innermost_span_of_any() -> None:
    (found,) = read(launch(250, 1, thread=99), event("kernel", "k", 260, 270, correlation=1))
    assert found.stage == "experts"


def test_clocks_that_differ_are_an_error_and_not_an_empty_trace() -> None:
    with pytest.raises(MachineError, match="rank 3: none of 1 kernels .* --nsys"):
        read(launch(50_000, 1), event("kernel", "k", 50_010, 50_020, correlation=1))


def test_without_any_kernel_there_is_nothing_to_say() -> None:
    assert read() == []
