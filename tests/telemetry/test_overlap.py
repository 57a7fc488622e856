"""overlap.json against traces whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightmoe import cli
from lightmoe.errors import UsageError
from lightmoe.telemetry.overlap import headline, overlap_of, read_any
from lightmoe.telemetry.records import Record, Trace, short_name
from lightmoe.telemetry.trace_file import write_trace
from tests.telemetry.reports import two_ranks
from tests.telemetry.traces import gpu_trace, record

CONTRACT = {
    "step_ms",
    "dispatch_ms",
    "combine_ms",
    "experts_ms",
    "exposed_comm_ms",
    "exposed_share",
    "hidden_fraction",
    "chunks",
    "bytes_per_link",
}


def test_without_overlap_all_communication_is_exposed() -> None:
    found = overlap_of(gpu_trace(num_ranks=3, num_chunks=2, overlapped=False, num_steps=4))
    assert found.keys() >= CONTRACT
    assert found["step_ms"] == pytest.approx(2.1)
    assert found["dispatch_ms"] == pytest.approx(0.3)
    assert found["combine_ms"] == pytest.approx(0.6)
    assert found["experts_ms"] == pytest.approx(0.9)
    assert found["exposed_comm_ms"] == pytest.approx(0.9)
    assert found["exposed_share"] == pytest.approx(3 / 7, abs=1e-6)
    assert found["hidden_fraction"] == 0
    assert (found["chunks"], found["num_ranks"], found["num_steps"]) == (2, 3, 4)
    assert (found["source"], found["bytes_per_link"]) == ("kernels", None)


def test_with_overlap_only_the_first_dispatch_and_the_last_combine_are_exposed() -> None:
    found = overlap_of(gpu_trace(num_chunks=2))
    # A layer: attention 100, dispatch 50 exposed, experts 300, combine 100 exposed.
    assert found["step_ms"] == pytest.approx(3 * 0.55)
    assert found["exposed_comm_ms"] == pytest.approx(3 * 0.15)
    assert found["comm_ms"] == pytest.approx(3 * 0.3)
    assert found["hidden_fraction"] == pytest.approx(0.5)
    assert [one["rank"] for one in found["by_rank"]] == [0, 1]


def test_communication_of_two_streams_at_once_counts_once() -> None:
    trace = Trace(
        (
            record("step", 0, 100, kind="span"),
            record("ncclDevKernel_SendRecv", 10, 40, stage="dispatch"),
            record("PtoP", 20, 60, kind="copy", stage="combine", track=8),
            record("gemm", 50, 70, stage="experts", track=9),
        )
    )
    found = overlap_of(trace)
    assert found["comm_ms"] == pytest.approx(0.05)
    assert found["dispatch_ms"] + found["combine_ms"] == pytest.approx(0.07)
    assert found["exposed_comm_ms"] == pytest.approx(0.04)
    assert found["exposed_share"] == pytest.approx(0.4)
    assert found["hidden_fraction"] == pytest.approx(0.2)
    assert found["experts_ms"] == pytest.approx(0.02)


def test_a_kernel_that_is_there_before_its_turn_waits() -> None:
    """Programmatic dependent launch: it starts when the one before it lets it, and waits."""
    trace = Trace(
        (
            record("step", 0, 100, kind="span"),
            record("exchange_pull", 0, 40, stage="dispatch"),
            record("grouped_gemm_bf16", 5, 90, stage="experts"),
            record("exchange_meet", 30, 60, stage="combine"),
        )
    )
    found = overlap_of(trace)
    assert found["compute_ms"] == pytest.approx(0.05)
    assert found["exposed_comm_ms"] == pytest.approx(0.04)


def test_one_group_of_both_ways_counts_as_dispatch_and_as_combine() -> None:
    both = record("ncclDevKernel_SendRecv", 10, 40, stage="exchange")
    found = overlap_of(Trace((record("step", 0, 100, kind="span"), both)))
    assert found["dispatch_ms"] == found["combine_ms"] == found["comm_ms"] == pytest.approx(0.03)


def test_a_step_lasts_until_its_last_kernel() -> None:
    trace = Trace((record("step", 0, 100, kind="span"), record("gemm", 90, 150)))
    assert overlap_of(trace)["step_ms"] == pytest.approx(0.15)


def test_on_the_cpu_a_thread_that_waits_does_not_compute_but_another_may() -> None:
    spans = [
        record("step", 0, 100, kind="span", track=1),
        record("dispatch", 10, 50, kind="span", track=1, stage="pipeline"),
        record("collective", 20, 50, kind="span", track=1, stage="dispatch"),
        record("experts", 50, 90, kind="span", track=1, stage="pipeline"),
    ]
    found = overlap_of(Trace(tuple(spans)))
    assert (found["source"], found["hidden_fraction"]) == ("spans", 0)
    assert found["dispatch_ms"] == found["exposed_comm_ms"] == pytest.approx(0.03)
    assert found["compute_ms"] == pytest.approx(0.05)
    assert found["experts_ms"] == pytest.approx(0.04)

    helped = [*spans, record("mlp", 20, 35, kind="span", track=2)]
    assert overlap_of(Trace(tuple(helped)))["hidden_fraction"] == pytest.approx(0.5)


def test_bytes_are_means_over_the_steps() -> None:
    trace = Trace(
        tuple(
            record("step", 100 * step, 100 * step + 90, kind="span", rank=rank, step=step,
                   bytes_sent=(0, 10 * step) if rank == 0 else (6, 0))
            for rank in (0, 1)
            for step in (1, 2)
        )
    )  # fmt: skip
    assert overlap_of(trace)["bytes_per_link"] == [[0, 15], [6, 0]]


def test_nothing_travels_on_one_rank() -> None:
    found = overlap_of(Trace((record("step", 0, 10, kind="span"), record("gemm", 1, 9))))
    assert (found["exposed_share"], found["hidden_fraction"], found["comm_ms"]) == (0, None, 0)
    assert headline(found) == "exposed share 0.0% of a step of 0.01 ms, nothing travels"


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="the trace has no step"):
        overlap_of(Trace((record("gemm", 0, 10),)))


KERNELS = st.lists(
    st.builds(
        lambda name, begin, size, stage: record(name, begin, begin + size, stage=stage),
        st.sampled_from(["exchange_pull", "ncclDevKernel_A", "gemm", "permute"]),
        st.integers(0, 900),
        st.integers(1, 100),
        st.sampled_from(["dispatch", "combine", "experts", ""]),
    ),
    max_size=20,
)


@given(KERNELS)
def test_shares_stay_within_their_bounds(kernels: list[Record]) -> None:
    found = overlap_of(Trace((record("step", 0, 1000, kind="span"), *kernels)))
    assert 0 <= found["exposed_comm_ms"] <= found["comm_ms"] <= found["step_ms"]
    assert found["exposed_comm_ms"] + found["compute_ms"] <= found["step_ms"] + 1e-9
    assert max(found["dispatch_ms"], found["combine_ms"]) <= found["comm_ms"]
    assert found["hidden_fraction"] is None or 0 <= found["hidden_fraction"] <= 1


@given(KERNELS, KERNELS)
def test_more_compute_never_exposes_more(kernels: list[Record], more: list[Record]) -> None:
    step = record("step", 0, 1000, kind="span")
    computing = [replace(one, track=8) for one in more if one.role == "compute"]
    alone = overlap_of(Trace((step, *kernels)))
    together = overlap_of(Trace((step, *kernels, *computing)))
    assert together["exposed_comm_ms"] <= alone["exposed_comm_ms"]
    assert together["comm_ms"] == alone["comm_ms"]


@pytest.mark.parametrize(
    ("name", "kind", "stage", "role"),
    [
        ("ncclDevKernel_SendRecv", "kernel", "", "communication"),
        ("exchange_await", "kernel", "route", "communication"),
        ("exchange_share", "kernel", "", "communication"),
        ("permute_bf16", "kernel", "dispatch", "compute"),
        ("combine_bf16", "kernel", "combine", "compute"),
        ("memset", "kernel", "", "compute"),
        ("PtoP", "copy", "", "communication"),
        ("DtoD", "copy", "attention", "compute"),
        ("DtoD", "copy", "dispatch", "communication"),
        ("DtoH", "copy", "dispatch", "communication"),
        ("DtoH", "copy", "sampler", "other"),
        ("HtoD", "copy", "", "other"),
        ("collective", "span", "route", "communication"),
        ("experts", "span", "", "compute"),
        ("step", "span", "", "other"),
    ],
)
def test_roles(name: str, kind: str, stage: str, role: str) -> None:
    assert record(name, 0, 1, kind=kind, stage=stage).role == role


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void at::native::elementwise_kernel<4, at::X<int>>(int, T)", "elementwise_kernel"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_SendRecv"),
        ("void (anonymous namespace)::softmax<float>(x)", "softmax"),
        ("grouped_gemm_bf16_64", "grouped_gemm_bf16_64"),
        ("<odd>", "<odd>"),
    ],
)
def test_names_of_kernels_are_shortened(kernel: str, name: str) -> None:
    assert short_name(kernel) == name


def test_the_command_takes_reports_of_nsys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two_ranks(tmp_path / "run.sqlite")
    with pytest.raises(SystemExit) as ended:
        cli.main(["overlap", str(path)])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["step_ms"] == pytest.approx(1.0)
    assert found["comm_ms"] == pytest.approx(0.3)
    assert found["dispatch_ms"] == pytest.approx(0.2)
    assert found["combine_ms"] == pytest.approx(0.1)
    assert found["experts_ms"] == pytest.approx(0.4)
    assert found["exposed_share"] == pytest.approx(0.2)
    assert found["hidden_fraction"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["chunks"] == 2
    assert "exposed share 20.0% of a step of 1.00 ms" in printed.err


def test_the_command_takes_traces_of_ours_and_draws_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(gpu_trace(), tmp_path / "after.json.gz")
    write_trace(gpu_trace(overlapped=False), tmp_path / "before.json")
    picture = tmp_path / "timeline.png"
    arguments = [str(tmp_path / "after.json.gz"), "--before", str(tmp_path / "before.json")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["overlap", *arguments, "--timeline", str(picture)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["hidden_fraction"] == pytest.approx(0.5)
    assert picture.read_bytes().startswith(b"\x89PNG")

    with pytest.raises(SystemExit) as ended:
        cli.main(["overlap", *arguments])
    assert ended.value.code == 2
    assert "drawn only with --timeline" in capsys.readouterr().err


def test_the_same_numbers_from_a_report_and_from_its_trace(tmp_path: Path) -> None:
    report = read_any(two_ranks(tmp_path / "run.sqlite"))
    write_trace(report, tmp_path / "trace.json.gz")
    assert overlap_of(read_any(tmp_path / "trace.json.gz")) == overlap_of(report)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"none\.sqlite is no file"):
        read_any(Path("none.sqlite"))
