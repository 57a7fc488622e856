"""Runs cute_kernels/build.py, and reads the machine code that it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# A first run compiles; on two cores the whole set may take ten minutes.
compiles = pytest.mark.timeout(900)


def run_build(checkout: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "cute_kernels/build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build(checkout: Path, out: Path, *arguments: object) -> dict[str, list[dict]]:
    """Build kernels into `out`: architecture -> the manifest's entries."""
    done = run_build(checkout, "--kernels-only", "--out", out, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "manifest.json").read_text())["architectures"]


def machine_code(checkout: Path, toolchain: ModuleType, folder: Path) -> dict[str, str]:
    """The SASS of every cubin in a folder by its program's name; `toolchain` is toolchain.py."""
    disassembler = toolchain.find_disassembler(checkout / "build/disassembler")
    code = {}
    for path in sorted(folder.glob("*.cubin")):
        command = [str(disassembler), "-c", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        code[path.stem] = done.stdout
    assert code
    return code
