"""Runs a command under NVIDIA's nsys, and exports what it recorded to SQLite."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lightmoe.errors import MachineError, UsageError

# Sampling and context switches would make the report hundreds of times as large; without `node`
# a CUDA graph is one interval, and what overlaps within it is not seen.
_PROFILE = ("-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--cuda-graph-trace=node")
_IMPORTER = "QdstrmImporter"


def find_nsys(path: str | None = None) -> Path:
    """nsys itself: where `path` says, else on the PATH. UsageError or MachineError without it."""
    found = shutil.which(path or "nsys")
    if found is not None:
        return Path(found)
    if path is not None:
        raise UsageError(f"--nsys-path {path} is no program that can be run")
    raise MachineError(
        "--nsys: nsys is not on the PATH; install Nsight Systems, give --nsys-path, or profile"
        " without --nsys"
    )


def run_nsys(nsys: Path, command: Sequence[str], folder: Path) -> Path:
    """Run `command` under nsys; leaves trace.nsys-rep and trace.sqlite, and returns the latter.

    Raises MachineError where the command or nsys fails; both have said why on stderr.
    """
    report, database = folder / "trace.nsys-rep", folder / "trace.sqlite"
    for old in (report, report.with_suffix(".qdstrm"), database):
        old.unlink(missing_ok=True)
    output = str(report.with_suffix(""))
    _run([str(nsys), "profile", *_PROFILE, "-o", output, *command], "the workload under nsys")
    if not report.is_file():
        _import(nsys, report.with_suffix(".qdstrm"))
    _run(
        [str(nsys), "export", "--type", "sqlite", "-o", str(database), str(report)],
        "the export of nsys",
    )
    if not database.is_file():
        raise MachineError(f"nsys wrote no {database}; does `{nsys} status -e` report a problem?")
    return database


def _import(nsys: Path, raw: Path) -> None:
    """What `nsys profile` does itself where its importer finds all its libraries."""
    places = nsys.resolve().parents
    importers = [found for place in places[1:3] for found in place.glob(f"*/{_IMPORTER}")]
    if not raw.is_file() or not importers:
        raise MachineError(
            f"nsys left no {raw.with_suffix('.nsys-rep')}; see what it said, and try"
            f" {_IMPORTER} -i {raw}"
        )
    libraries = f"{importers[0].parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    _run([str(importers[0]), "-i", str(raw)], _IMPORTER, {"LD_LIBRARY_PATH": libraries})


def _run(command: Sequence[str], what: str, extra: dict[str, str] | None = None) -> None:
    # Its words go to stderr: stdout is for what was asked for.
    ended = subprocess.run(command, stdout=2, env={**os.environ, **(extra or {})}, check=False)
    if ended.returncode:
        raise MachineError(f"{what} ended with code {ended.returncode}; its words are above")
