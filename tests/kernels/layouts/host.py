"""Device headers compiled by the host's C++ compiler, and the tables of cute_kernels/."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
KERNELS = CHECKOUT / "cute_kernels"


def kernels_module(name: str) -> ModuleType:
    """A script of cute_kernels/, which is no package: its files import each other by bare names."""
    sys.path.insert(0, str(KERNELS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(KERNELS))


def cute_includes() -> list[Path]:
    """Folders of CuTe's headers and of what they include; pip fetches them where they are not."""
    found = kernels_module("toolchain").find(CHECKOUT / "build/toolchain")
    return [HERE / "shim", *found.includes]


def compile_library(
    source: str, folder: Path, includes: list[Path] | None = None, defines: list[str] | None = None
) -> ctypes.CDLL:
    """Compile one source of this folder without any warning and load it."""
    library = folder / f"{source}.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra"]
    # CuTe's atoms have empty bodies on the host.
    command += ["-Werror", "-Wno-unused-parameter", f"-I{KERNELS}"]
    command += [option for path in includes or [] for option in ("-isystem", str(path))]
    command += [f"-D{define}" for define in defines or []]
    command += [str(HERE / source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
