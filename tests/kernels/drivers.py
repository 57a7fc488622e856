"""Runs liblight_ops over a driver made here (fake_driver.cpp), in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cute_kernels"
TILE = (128, 64, 32, 2, 2, 2, 0, 0, 1)
KERNEL = "grouped_gemm_f16_w128_t64_d32_s2_2x2_plain"
PRODUCT = {
    "groups": (0, 16, 16, 16, 8, 1000),
    "tile": TILE,
    "dtype": 0,
    "rows": 16,
    "pair_row": 0,
    "weights": 16,
    "slot_bytes": 1 << 20,
    "pair_weight": 0,
    "output": 16,
    "depth": 256,
    "num_features": 512,
    "swiglu": False,
    "output_float32": False,
    "max_ctas": 0,
    "stream": 7,
}
BIND = ("bind_device", [0], {})


def compile_driver(folder: Path, source: Path) -> Path:
    """Make `source` the libcuda.so.1 of a folder."""
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{KERNELS}"]
    subprocess.run([*command, str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def break_driver(folder: Path) -> Path:
    """A folder whose libcuda.so.1 does not load: also hides the driver of a machine with one."""
    folder.mkdir()
    (folder / "libcuda.so.1").write_text("no library")
    return folder


Call = tuple[str, list, dict]


def call(host: Path, driver: Path, *calls: Call, **environment: object) -> list[str]:
    """Make these calls in a process that sees `driver`; what it and the driver say, in order."""
    done = subprocess.run(
        [sys.executable, str(HERE / "call_binding.py"), str(host)],
        input=json.dumps(calls),
        env=os.environ
        | {"LD_LIBRARY_PATH": str(driver)}
        | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def opened(kernels: Path, architecture: str = "") -> Call:
    return ("open", [str(kernels), architecture], {})


def product(**changes: Any) -> Call:
    return ("grouped_gemm", [], PRODUCT | changes)


def launches(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("launch")]
