"""What every benchmark does alike: medians with spread, and one result file per run.

A result file is benchmarks/results/<bench>-<machine>-<date>.json with
{bench, device, date, commit, command, rows: [...]}; `tables.py` reads them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "num_samples": len(samples),
    }


def measure(call: Callable[[], float], num_warmups: int, num_samples: int) -> dict[str, float]:
    """Spread of what `call` returns, after some calls that do not count."""
    for _ in range(num_warmups):
        call()
    return spread([call() for _ in range(num_samples)])


def device_name() -> str:
    """The processor and the cores this process may use."""
    cores = len(os.sched_getaffinity(0))
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {cores} cores"


def machine_name() -> str:
    """Short name for file names."""
    return f"cpu-{len(os.sched_getaffinity(0))}-cores"


def commit() -> str:
    """The commit that was measured, with + where the tree had changes."""
    root = Path(__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", "../lightmoe"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def write(
    bench: str,
    rows: list[dict[str, Any]],
    *,
    gpu: str | None = None,
    measured_commit: str | None = None,
) -> Path:
    """Write one run's result file and say where it is.

    `gpu` names the card that was measured, `measured_commit` the commit where git does not know.
    """
    date = datetime.date.today().isoformat()
    result = {
        "bench": bench,
        "device": device_name() if gpu is None else f"{gpu}; {device_name()}",
        "date": date,
        "commit": measured_commit or commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    machine = machine_name() if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.lower())
    path = RESULTS / f"{bench}-{machine}-{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return path
