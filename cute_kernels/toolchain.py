"""The compiler of the kernels: pinned wheels of NVRTC and of the headers, unpacked into one folder.

CUDA 12.2 is what driver 535 speaks, the newest driver of the reference box. CCCL is newer than the
rest: the wheel of 12.2 lacks its headers without a suffix, and CuTe includes those. Hopper has a
newer NVRTC of its own: with that of 12.2 the large tiles ran at two thirds of the speed on an H100.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WHEELS = (
    "nvidia-cutlass==4.2.0.0",
    "nvidia-cuda-nvrtc-cu12==12.2.140",
    "nvidia-cuda-runtime-cu12==12.2.140",
    "nvidia-cuda-cccl-cu12==12.9.27",
    "pybind11==3.1.0",
)
HOPPER_WHEELS = ("nvidia-cuda-nvrtc-cu12==12.9.86",)  # sm_90 and later, in a folder of its own
DISASSEMBLER_WHEELS = ("nvidia-cuda-nvdisasm==13.5.37",)  # only the tests read machine code
_NVRTC = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
_INCLUDES = (
    "cutlass_library/source/include",
    "nvidia/cuda_runtime/include",
    "nvidia/cuda_cccl/include",
)


class ToolchainError(Exception):
    """The compiler cannot be had: what is missing, and the remedy."""


@dataclass(frozen=True)
class Toolchain:
    """An unpacked toolchain: the NVRTC library and the folders of the headers."""

    root: Path

    def nvrtc(self, architecture: int) -> Path:
        """The libnvrtc.so.12 that compiles for `architecture`; its builtins lie beside it."""
        return (self.root / "hopper" if architecture >= 90 else self.root) / _NVRTC

    @property
    def includes(self) -> tuple[Path, ...]:
        """Folders of CuTe, the CUDA runtime's headers and CCCL."""
        return tuple(self.root / folder for folder in _INCLUDES)

    @property
    def pybind11(self) -> Path:
        """The folder of pybind11's headers."""
        return self.root / "pybind11/include"


def find(root: Path) -> Toolchain:
    """The toolchain under `root`; its wheels are installed there first where one is missing."""
    toolchain = Toolchain(root)
    if missing_wheels(root, WHEELS):
        install(root, WHEELS)
    if missing_wheels(root / "hopper", HOPPER_WHEELS):
        install(root / "hopper", HOPPER_WHEELS)
    for path in (toolchain.nvrtc(75), toolchain.nvrtc(90), *toolchain.includes, toolchain.pybind11):
        if not path.exists():
            raise ToolchainError(f"no {path}; remove {root} and build again")
    return toolchain


def find_disassembler(root: Path) -> Path:
    """nvdisasm, in a folder of its own under `root`: pip replaces what packages share."""
    if missing_wheels(root, DISASSEMBLER_WHEELS):
        install(root, DISASSEMBLER_WHEELS)
    return root / "nvidia/cu13/bin/nvdisasm"


def missing_wheels(root: Path, wheels: tuple[str, ...]) -> list[str]:
    """Those of `wheels` that are not unpacked in `root` in that version."""
    metadata = {path.name.lower().replace("-", "_") for path in root.glob("*.dist-info")}
    names = {wheel: wheel.replace("==", "-").replace("-", "_") for wheel in wheels}
    return [wheel for wheel, name in names.items() if f"{name}.dist_info" not in metadata]


def install(root: Path, wheels: tuple[str, ...]) -> None:
    """Unpack `wheels` into `root` with pip, without what they depend on."""
    if importlib.util.find_spec("pip") is None:
        raise ToolchainError(f"{sys.executable} has no pip; give a toolchain: --toolchain DIR")
    print(f"toolchain: {' '.join(wheels)} into {root}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(root), *wheels]
    if subprocess.run(command, check=False).returncode:
        raise ToolchainError(f"pip could not install {' '.join(wheels)}; is there a network?")
