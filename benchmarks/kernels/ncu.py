"""What the hardware counters say of our kernels, read by Nsight Compute.

    python benchmarks/kernels/ncu.py [--arch 75ptx] [--ncu /opt/.../ncu]

Each kernel runs once under `ncu --clock-control none`, caches flushed before it. The rows {kernel,
us, dram_gb_per_second, dram_share, tensor_share, occupancy, bound} go to the results and, as a
markdown table, to the terminal.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import results
from floors import SHAPES, path_of

DURATION = "gpu__time_duration.sum"
DRAM_BYTES = "dram__bytes.sum"
DRAM_SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
# The tensor pipe's counter has another name on every generation; the first that exists is read.
TENSOR_COUNTERS = (
    "sm__pipe_tensor_op_hmma_cycles_active",
    "sm__inst_executed_pipe_tensor_op_hmma",
    "sm__pipe_tensor_cycles_active",
    "sm__inst_executed_pipe_tensor",
)
TENSOR_SUFFIX = ".avg.pct_of_peak_sustained_elapsed"
BOUND_SHARE = 60.0  # per cent of a peak from which on it is what bounds the kernel
DECODE, PREFILL = 64, 4096


def main() -> int:
    """Profile, print, write; or, as the child of ncu, run the kernels."""
    arguments = parse_arguments()
    if arguments.child:
        run_kernels(arguments.arch)
        return 0
    commit = results.commit(arguments.commit)
    tensor = tensor_counter(command_output([arguments.ncu, "--query-metrics"]))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        subprocess.run(ncu_command(arguments, tensor, log), check=True)
        rows = read_rows(log.read_text(encoding="utf-8"), tensor)
    print(markdown(rows))
    import torch

    ceilings = {"device": torch.cuda.get_device_name()}
    results.write("ncu", rows, ceilings, commit, arguments.out)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--arch", help="folder of kernels, such as 75ptx; the card's by default")
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's command")
    parser.add_argument("--commit", help="of a copy without .git")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def ncu_command(arguments: argparse.Namespace, tensor: str, log: Path) -> list[str]:
    """ncu around this file, its kernels named by the NVTX ranges they run in."""
    metrics = ",".join((DURATION, DRAM_BYTES, DRAM_SHARE, OCCUPANCY, tensor))
    architecture = ["--arch", arguments.arch] if arguments.arch else []
    return [
        arguments.ncu, "--clock-control", "none", "--profile-from-start", "off",
        "--nvtx", "--print-nvtx-rename", "kernel",
        "--csv", "--page", "raw", "--print-units", "base",
        "--metrics", metrics, "--log-file", str(log),
        sys.executable, __file__, "--child", *architecture,
    ]  # fmt: skip


def command_output(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tensor_counter(listing: str) -> str:
    """The tensor pipe's metric among those that ncu lists for this card."""
    known = set(re.findall(r"^\s*(\w+)", listing, re.MULTILINE))
    for name in TENSOR_COUNTERS:
        if name in known:
            return name + TENSOR_SUFFIX
    raise SystemExit(f"ncu knows none of {', '.join(TENSOR_COUNTERS)} on this card")


def read_rows(log: str, tensor: str) -> list[dict[str, Any]]:
    """The kernels in ncu's raw CSV: a line of names, one of units, then one per kernel."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    table = csv.DictReader(io.StringIO("\n".join(lines)))
    return [read_row(entry, tensor) for entry in table if entry["ID"]]


def read_row(entry: dict[str, str], tensor: str) -> dict[str, Any]:
    """One kernel's figures."""
    seconds = 1e-9 * number(entry[DURATION])
    dram_share, tensor_share = number(entry[DRAM_SHARE]), number(entry[tensor])
    return {
        "kernel": entry["Kernel Name"].partition("/")[0],  # the range's name comes first
        "us": 1e6 * seconds,
        "dram_gb_per_second": 1e-9 * number(entry[DRAM_BYTES]) / seconds,
        "dram_share": dram_share / 100,
        "tensor_share": tensor_share / 100,
        "occupancy": number(entry[OCCUPANCY]) / 100,
        "bound": bound(dram_share, tensor_share),
    }


def bound(dram_percent: float, tensor_percent: float) -> str:
    """What holds a kernel up: the larger of the two shares, or neither."""
    if max(dram_percent, tensor_percent) < BOUND_SHARE:
        return "latency"
    return "memory" if dram_percent >= tensor_percent else "tensor cores"


def number(text: str) -> float:
    """A number as ncu prints it, thousands apart by commas."""
    return float(text.replace(",", ""))


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| kernel | us | DRAM GB/s | of DRAM peak | tensor pipe | occupancy | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['kernel']} | {row['us']:.1f} | {row['dram_gb_per_second']:.0f} | "
            f"{row['dram_share']:.0%} | {row['tensor_share']:.0%} | {row['occupancy']:.0%} | "
            f"{row['bound']} |"
        )
    return "\n".join(lines)


def run_kernels(architecture: str | None) -> None:
    """Every kernel once to load it, then once in a range of its name with the profiler on."""
    import torch

    from lightmoe.kernels.library import using

    major, minor = torch.cuda.get_device_capability()
    path = path_of(architecture, 10 * major + minor)
    with using(architecture=architecture):
        calls = labelled_calls("fp16" if path == "sm75" else "bf16")
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for label, call in calls.items():
            with torch.cuda.nvtx.range(label):
                call()
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def labelled_calls(dtype: str) -> dict[str, Callable[[], object]]:
    """The steps of Mixtral's layer at decode and prefill, 16-bit and int4."""
    from adapters.lightmoe_layer import steps
    from moe_layer import one_problem
    from problem import TORCH_DTYPES, ExpertWeights

    calls: dict[str, Callable[[], object]] = {}
    for kind in (dtype, "int4"):
        weights: list[ExpertWeights] = []
        for tokens in (DECODE, PREFILL):
            problem = one_problem(
                SHAPES["mixtral"], tokens, "uniform", TORCH_DTYPES[dtype], weights, kind, 0
            )
            for name, call in steps(problem).items():
                calls[f"{name} {kind} T={tokens}"] = call
    return calls


if __name__ == "__main__":
    sys.exit(main())
