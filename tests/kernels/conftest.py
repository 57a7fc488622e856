"""What the tests of kernels share: one thread a product, and a liblight_ops to look into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As every rank has: a second one may cut a sum elsewhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toolchain(host_library: Path, checkout: Path) -> Path:
    """Where NVRTC and the headers are, once something has been built."""
    return checkout / "build/toolchain"


@pytest.fixture(scope="session")
def host_library(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with liblight_ops.so and its binding, built now, without kernels."""
    out = tmp_path_factory.mktemp("host")
    command = [sys.executable, str(checkout / "cute_kernels/build.py"), "--host-only"]
    subprocess.run([*command, "--out", str(out)], check=True)
    return out
