"""How nsys is run, with programs that stand in for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightmoe.errors import MachineError, UsageError
from lightmoe.telemetry.nsys_run import find_nsys, run_nsys

STAND_IN = """#!{python}
import pathlib, subprocess, sys
verb, *rest = sys.argv[1:]
output = pathlib.Path(rest[rest.index("-o") + 1])
log = pathlib.Path({log!r})
with log.open("a") as file:
    print(verb, *rest, file=file)
if verb == "profile":
    print("words of nsys")
    command = rest[rest.index("-o") + 2 :]
    code = subprocess.run(command).returncode
    output.with_suffix("{left}").write_text("report")
    sys.exit(code)
if {exports}:
    output.write_text("database of " + pathlib.Path(rest[-1]).read_text())
"""
IMPORTER = """#!{python}
import os, pathlib, sys
assert os.environ["LD_LIBRARY_PATH"].startswith(str(pathlib.Path(__file__).parent))
pathlib.Path(sys.argv[2]).with_suffix(".nsys-rep").write_text("imported report")
"""


def stand_in(folder: Path, *, left: str = ".nsys-rep", exports: bool = True) -> Path:
    """A program that takes nsys's arguments, logs them, and leaves what nsys leaves."""
    path = folder / "target-linux-x64" / "nsys"
    path.parent.mkdir(parents=True)
    script = STAND_IN.format(
        python=sys.executable, log=str(folder / "log"), left=left, exports=exports
    )
    path.write_text(script)
    path.chmod(0o755)
    return path


def test_the_command_runs_under_nsys_and_is_exported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nsys, run = stand_in(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "trace.sqlite").write_text("of an earlier run")
    command = [sys.executable, "-c", "print('words of the workload')"]

    database = run_nsys(nsys, command, run)

    assert database == run / "trace.sqlite"
    assert database.read_text() == "database of report"
    profiled, exported = (tmp_path / "log").read_text().splitlines()
    options = "-t cuda,nvtx -s none --cpuctxsw=none --cuda-graph-trace=node"
    assert profiled.startswith(f"profile {options} -o {run / 'trace'} {sys.executable} -c")
    assert exported == f"export --type sqlite -o {database} {run / 'trace.nsys-rep'}"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "words of nsys" in printed.err
    assert "words of the workload" in printed.err


def test_a_workload_that_fails_is_an_error(tmp_path: Path) -> None:
    nsys = stand_in(tmp_path)
    with pytest.raises(MachineError, match="the workload under nsys ended with code 3"):
        run_nsys(nsys, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_a_raw_report_is_imported_by_what_lies_beside_nsys(tmp_path: Path) -> None:
    nsys = stand_in(tmp_path, left=".qdstrm")
    importer = tmp_path / "linux-desktop" / "QdstrmImporter"
    importer.parent.mkdir()
    importer.write_text(IMPORTER.format(python=sys.executable))
    importer.chmod(0o755)
    database = run_nsys(nsys, [sys.executable, "-c", ""], tmp_path)
    assert database.read_text() == "database of imported report"


def test_a_raw_report_without_an_importer_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    nsys = stand_in(tmp_path, left=".qdstrm")
    with pytest.raises(MachineError, match=r"left no .*try QdstrmImporter -i .*trace\.qdstrm"):
        run_nsys(nsys, [sys.executable, "-c", ""], tmp_path)


def test_an_export_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    nsys = stand_in(tmp_path, exports=False)
    with pytest.raises(MachineError, match=r"nsys wrote no .*trace\.sqlite"):
        run_nsys(nsys, [sys.executable, "-c", ""], tmp_path)


def test_nsys_is_found_where_one_says_or_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsys = stand_in(tmp_path)
    assert find_nsys(str(nsys)) == nsys
    monkeypatch.setenv("PATH", str(nsys.parent))
    assert find_nsys() == nsys
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="nsys is not on the PATH; install Nsight Systems"):
        find_nsys()
    with pytest.raises(UsageError, match="--nsys-path /no/nsys is no program"):
        find_nsys("/no/nsys")
