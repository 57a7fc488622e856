"""Reports of nsys: kernels and copies with their ranks, steps and stages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lightmoe.errors import UsageError
from lightmoe.telemetry.nsys import read_report
from tests.telemetry.reports import Report, two_ranks


def test_a_report_of_ours_has_ranks_stages_layers_and_chunks(tmp_path: Path) -> None:
    trace = read_report(two_ranks(tmp_path / "run.sqlite"))

    assert (trace.source, trace.num_ranks, trace.title) == ("kernels", 2, "run")
    assert set(trace.steps) == {(0, 4), (1, 4)}
    for rank in (0, 1):
        found = {one.name: one for one in trace.steps[rank, 4] if one.kind != "span"}
        assert found.keys() == {"ncclDevKernel_SendRecv", "grouped_gemm_bf16", "PtoP", "HtoD"}
        nccl, gemm = found["ncclDevKernel_SendRecv"], found["grouped_gemm_bf16"]
        assert (nccl.stage, nccl.layer, nccl.chunk, nccl.track) == ("dispatch", 6, 1, 20)
        assert (gemm.stage, gemm.layer, gemm.chunk) == ("experts", 6, 1)
        assert (gemm.start_ns, gemm.end_ns) == (300_000, 700_000)
        assert (found["PtoP"].stage, found["PtoP"].num_bytes) == ("combine", 4096)
        assert [found[name].role for name in ("PtoP", "HtoD")] == ["communication", "other"]
    # Process 1 came second and says that it is rank 0.
    (first, *_) = [one for one in trace.steps[0, 4] if one.name == "step"]
    assert first.track == 1001


def test_a_report_of_others_needs_only_its_steps(tmp_path: Path) -> None:
    trace = read_report(two_ranks(tmp_path / "other.sqlite", marked=False))
    assert set(trace.steps) == {(0, 0), (1, 0)}
    names = sorted(one.name for one in trace.steps[0, 0] if one.kind != "span")
    assert names == ["HtoD", "PtoP", "grouped_gemm_bf16", "ncclDevKernel_SendRecv"]


def test_steps_of_others_are_numbered_and_named_as_told(tmp_path: Path) -> None:
    report = Report()
    for one in range(3):
        report.range(0, "iteration", 100 * one, 100 * one + 90)
        report.kernel(0, "gemm", 100 * one + 50, 100 * one + 95, launched=100 * one + 5)
    report.kernel(0, "late", 60, 61, launched=95)
    report.kernel(0, "of nobody", 40, 41, launched=None)
    path = report.write(tmp_path / "other.sqlite")

    with pytest.raises(UsageError, match="named 'step'; give --step-range, one of: iteration"):
        read_report(path)
    trace = read_report(path, step_range="iteration")
    assert [step for _, step in trace.steps] == [0, 1, 2]
    assert [one.name for one in trace.steps[0, 0] if one.kind != "span"] == ["gemm", "of nobody"]


def test_one_process_with_several_devices_is_several_ranks(tmp_path: Path) -> None:
    report = Report()
    report.range(0, "step", 0, 100)
    for device in (2, 5):
        report.kernel(0, f"on_{device}", 10, 20, launched=5, device=device)
    trace = read_report(report.write(tmp_path / "one.sqlite"))
    names = [[one.name for one in trace.steps[rank, 0]] for rank in (0, 1)]
    assert names == [["step", "on_2"], ["step", "on_5"]]


def test_a_report_without_copies_or_api_calls_is_read_by_time(tmp_path: Path) -> None:
    report = Report()
    report.range(0, "step", 0, 100)
    report.range(0, "experts", 10, 30)
    report.kernel(0, "k", 20, 25, launched=12)
    report.copy(0, 1, 10, 20, launched=5, target=0)
    path = report.write(tmp_path / "a.sqlite", without="CUPTI_ACTIVITY_KIND_RUNTIME")
    kernel = next(one for one in read_report(path).records if one.name == "k")
    # The device's clock says nothing about what the host did: only the step is known.
    assert (kernel.step, kernel.stage) == (0, "step")


@pytest.mark.parametrize("table", ["NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "StringIds"])
def test_a_missing_table_is_named(tmp_path: Path, table: str) -> None:
    report = Report()
    report.range(0, "step", 0, 100)
    report.kernel(0, "k", 20, 25, launched=12)
    path = report.write(tmp_path / "report.sqlite", without=table)
    with pytest.raises(UsageError, match=f"no table {table}; profile with `nsys profile"):
        read_report(path)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    path.write_text("not a database, and longer than a header of SQLite would be" * 10)
    with pytest.raises(UsageError, match="report.sqlite is no readable export of nsys"):
        read_report(path)
    with pytest.raises(UsageError, match="is no readable export of nsys"):
        read_report(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()


def test_a_report_is_only_read(tmp_path: Path) -> None:
    path = two_ranks(tmp_path / "what? #1.sqlite")
    before = hashlib.sha256(path.read_bytes()).digest()
    read_report(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert [one.name for one in tmp_path.iterdir()] == ["what? #1.sqlite"]
